"""The model: everything that reads and writes text, pictures and speech."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from flax import nnx

from aromni_jax import model_dir
from aromni_jax.codecs.registry import CODECS, kind_of
from aromni_jax.codecs.text import TextCodec
from aromni_jax.models.decoder import Decoder
from aromni_jax.recipes import Recipe
from aromni_jax.vocabulary import Vocabulary

if TYPE_CHECKING:
  from aromni_jax.codecs.image_vq import ImageVQ
  from aromni_jax.codecs.speech_codec import SpeechCodec


@dataclasses.dataclass(frozen=True)
class Model:
  """Everything that reading and writing all modalities needs.

  Attributes:
    path: the directory. vocabulary: id space. text: text codec.
    codecs: name of `CODECS` -> the codec, for those that the directory has.
    decoder: the Transformer, or None if the directory has none yet.
    recipe: prompts and rules of decoding.
    fingerprints: of each codec by its name, and of "text" -> 16 hex digits.
  """

  path: pathlib.Path
  vocabulary: Vocabulary
  text: TextCodec
  codecs: Mapping[str, nnx.Module]
  decoder: Decoder | None
  recipe: Recipe
  fingerprints: dict[str, str]

  @property
  def image_codec(self) -> "ImageVQ | None":
    return self.codecs.get(kind_of("image", self.codecs).name)

  @property
  def speech_codec(self) -> "SpeechCodec | None":
    return self.codecs.get(kind_of("speech", self.codecs).name)

  def needed(self, codec: str) -> nnx.Module:
    """Returns the codec of a name of `CODECS`. Raises ValueError if there is none."""
    if codec not in self.codecs:
      raise ValueError(f"{self.path} has no {codec}. {CODECS[codec].hint}")
    return self.codecs[codec]


class _StoredCodecs(Mapping):
  """The codecs of a model directory; each is loaded when it is first asked for."""

  def __init__(self, path: pathlib.Path, names: list[str]):
    self._path, self._names = path, names
    self._loaded: dict[str, nnx.Module] = {}

  def __getitem__(self, name: str) -> nnx.Module:
    if name not in self._names:
      raise KeyError(name)
    if name not in self._loaded:
      self._loaded[name] = model_dir.load_codec(self._path, name)
    return self._loaded[name]

  def __contains__(self, name: object) -> bool:
    return name in self._names

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


def load_model(directory: str | pathlib.Path | None = None, *, decoder: bool = True) -> Model:
  """Returns the model of a directory, the shipped one by default; codecs are loaded when needed.

  Args:
    directory: the model directory.
    decoder: False leaves the decoder out, for whoever places its parameters himself.

  Raises:
    FileNotFoundError: if the directory or a part of it does not exist.
    ValueError: if a part is damaged or does not fit model.json.
  """
  path = pathlib.Path(directory or model_dir.SHIPPED)
  info = model_dir.read_info(path)
  vocabulary, text, fingerprints = model_dir.identity(path, info)
  if "decoder" in info and (size := model_dir.decoder_config(path).vocab_size) != vocabulary.size:
    raise ValueError(f"{path}: the decoder has {size} ids, the vocabulary {vocabulary.size}")
  return Model(
    path=path,
    vocabulary=vocabulary,
    text=text,
    codecs=_StoredCodecs(path, [name for name in CODECS if name in info]),
    decoder=model_dir.load_decoder(path) if decoder and "decoder" in info else None,
    recipe=model_dir.read_recipe(path, info),
    fingerprints=fingerprints,
  )
