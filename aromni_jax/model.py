"""The model: everything that reads and writes text, pictures and speech."""

import dataclasses
import pathlib

from flax import nnx

from aromni_jax import model_dir
from aromni_jax.codecs.image_vq import ImageVQ
from aromni_jax.codecs.registry import CODECS
from aromni_jax.codecs.speech_codec import SpeechCodec
from aromni_jax.codecs.text import TextCodec
from aromni_jax.models.decoder import Decoder
from aromni_jax.recipes import Recipe, get_recipe
from aromni_jax.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Model:
  """Everything that reading and writing all modalities needs.

  Attributes:
    path: the directory. vocabulary: id space. text: text codec.
    image_codec, speech_codec: codecs, or None if the directory has none.
    decoder: the Transformer, or None if the directory has none yet.
    recipe: prompts and rules of decoding.
    fingerprints: "image_codec", "speech_codec" and "text" -> 16 hex digits.
  """

  path: pathlib.Path
  vocabulary: Vocabulary
  text: TextCodec
  image_codec: ImageVQ | None
  speech_codec: SpeechCodec | None
  decoder: Decoder | None
  recipe: Recipe
  fingerprints: dict[str, str]

  def needed(self, codec: str) -> nnx.Module:
    """Returns the codec "image_codec" or "speech_codec". Raises ValueError if there is none."""
    module = getattr(self, codec)
    if module is None:
      raise ValueError(f"{self.path} has no {codec}. {CODECS[codec].hint}")
    return module


def load_model(directory: str | pathlib.Path | None = None, *, decoder: bool = True) -> Model:
  """Returns the model of a directory, the shipped one by default.

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
    **{name: model_dir.load_codec(path, name) if name in info else None for name in CODECS},
    decoder=model_dir.load_decoder(path) if decoder and "decoder" in info else None,
    recipe=get_recipe(info["recipe"]),
    fingerprints=fingerprints,
  )
