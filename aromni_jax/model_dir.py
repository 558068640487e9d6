"""Model directories: the one format of shipped, trained and converted models.

`DIR/model.json` says what the parts are; `DIR/decoder`, `DIR/image_codec` and `DIR/speech_codec`
are Orbax checkpoints of their parameters; `DIR/text.model` (SentencePiece) or `DIR/tokenizer.json`
is the tokenizer. A directory may lack the decoder (what a training starts from), and a converted
one the codec of a modality that its files did not have.
"""

import dataclasses
import functools
import hashlib
import json
import operator
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from aromni_jax import saved, storage
from aromni_jax.codecs.registry import CODECS, CODED, kind_of
from aromni_jax.codecs.text import SentencePieceText, TextCodec, TokenizerJsonText
from aromni_jax.fields import to_dataclass
from aromni_jax.models import decoder as decoder_lib
from aromni_jax.models import params as codec_params
from aromni_jax.models.config import DecoderConfig
from aromni_jax.recipes import Recipe, get_recipe
from aromni_jax.vocabulary import Vocabulary

VERSION = 1  # of model.json; files that do not say it are of version 1
SHIPPED = pathlib.Path(__file__).parent / "pretrained"


def read_identity(directory: str | pathlib.Path) -> tuple[Vocabulary, dict[str, str]]:
  """Returns what token shards are checked against: the vocabulary and the fingerprints that
  `Model` has, without loading any parameters. Raises FileNotFoundError without a directory."""
  path = pathlib.Path(directory)
  vocabulary, _, fingerprints = identity(path, read_info(path))
  return vocabulary, fingerprints


def identity(
  path: pathlib.Path, info: dict[str, Any]
) -> tuple[Vocabulary, TextCodec, dict[str, str]]:
  """Returns vocabulary, text codec and fingerprints of a directory and its model.json."""
  with saved.naming(path / "model.json"):
    vocabulary = Vocabulary.from_dict(saved.get(info, "vocabulary", dict))
    parts = {name: saved.get(info, name, dict) for name in CODECS if name in info}
    fingerprints = {name: saved.get(part, "fingerprint", str) for name, part in parts.items()}
  released = (path / "tokenizer.json").is_file()
  text_codec, file = (
    (TokenizerJsonText, "tokenizer.json") if released else (SentencePieceText, "text.model")
  )
  text = text_codec(path / file, vocabulary)
  return vocabulary, text, fingerprints | {"text": text.fingerprint()}


def read_recipe(path: pathlib.Path, info: dict[str, Any]) -> Recipe:
  """Returns the recipe of a directory and its model.json. Raises ValueError, naming the file."""
  with saved.naming(path / "model.json"):
    return get_recipe(saved.get(info, "recipe", str))


def read_info(path: pathlib.Path) -> dict[str, Any]:
  """Returns model.json. Raises FileNotFoundError or ValueError, naming the file."""
  file = path / "model.json"
  if not file.is_file():
    raise FileNotFoundError(f"{path} is not a model directory: it has no model.json")
  return saved.read(file, VERSION)


def create(directory: str | pathlib.Path, vocabulary: Vocabulary, recipe: Recipe) -> None:
  """Starts (or goes on with) a model directory: writes vocabulary and recipe."""
  path = pathlib.Path(directory)
  path.mkdir(parents=True, exist_ok=True)
  _update(path, {"vocabulary": vocabulary.to_dict(), "recipe": recipe.name})


def save_codec(
  directory: str | pathlib.Path, name: str, codec: nnx.Module, dtype: str = "bfloat16"
) -> None:
  """Writes a codec of `CODECS` in a storage dtype and notes it in model.json."""
  path = pathlib.Path(directory)
  storage.save_params(path / name, codec_params.to_params(codec), dtype)
  info = {"config": dataclasses.asdict(codec.config)}
  info["fingerprint"] = fingerprint(info["config"], storage.load_params(path / name))
  _update(path, {name: info})


def load_codec(directory: str | pathlib.Path, name: str) -> nnx.Module:
  """Returns a codec.

  Raises:
    FileNotFoundError: if the directory has no such codec.
    ValueError: if the parameters are not those that model.json was written for.
  """
  config, params = _stored_codec(pathlib.Path(directory), name)
  config_class, codec_class = CODECS[name].classes()
  config = _section(pathlib.Path(directory), name, config_class, config)
  return codec_params.from_params(lambda rngs: codec_class(config, rngs=rngs), params, name)


def _stored_codec(path: pathlib.Path, name: str) -> tuple[dict[str, Any], dict]:
  """Returns the configuration and the parameters of a codec; errors as `load_codec`."""
  info = read_info(path)
  if name not in info:
    raise FileNotFoundError(f"{path} has no {name}. {CODECS[name].hint}")
  with saved.naming(path / "model.json"):
    info = saved.get(info, name, dict)
    config, wanted = saved.get(info, "config", dict), saved.get(info, "fingerprint", str)
  params = storage.load_params(path / name)
  if fingerprint(config, params) != wanted:
    raise ValueError(f"{path / name} is damaged: it does not have the fingerprint of model.json")
  return config, params


def _section(path: pathlib.Path, name: str, cls: type, values: dict[str, Any]) -> Any:
  """Returns the configuration of a part, as model.json has it; what it lacks has its default."""
  with saved.naming(path / "model.json"):
    unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
    if unknown:
      raise ValueError(
        f"{name}.config has {', '.join(unknown)}, which this aromni_jax does not know: made by "
        "another version of it, use that or one that reads both"
      )
    return to_dataclass(cls, values, f"{name}.config")


def codebook(directory: str | pathlib.Path, name: str) -> np.ndarray:
  """Returns float32[codes, dimensions], the vectors of a codec's codes; errors as `load_codec`."""
  _, params = _stored_codec(pathlib.Path(directory), name)
  return functools.reduce(operator.getitem, CODECS[name].codebook.split("."), params)


def codebooks(directory: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the codebook of every modality that has a codec; errors as `load_codec`."""
  info = read_info(pathlib.Path(directory))
  return {m: codebook(directory, kind_of(m, info).name) for m in CODED}


def perceptual_table(directory: str | pathlib.Path) -> np.ndarray:
  """Returns float32[codes, dimensions], the image embeddings of the perceptual loss: the codebook,
  or the table that a released model came with (`DIR/perception`)."""
  path = pathlib.Path(directory) / "perception"
  if path.is_dir():
    return storage.load_params(path)["table"]
  return codebook(directory, kind_of("image", read_info(path.parent)).name)


def save_decoder(directory: str | pathlib.Path, decoder: nnx.Module, dtype: str) -> None:
  """Writes the decoder in a storage dtype and notes it in model.json."""
  path = pathlib.Path(directory)
  storage.save_params(path / "decoder", codec_params.to_params(decoder), dtype)
  note_decoder(path, dataclasses.replace(decoder.config, param_dtype=dtype))


def note_decoder(directory: str | pathlib.Path, config: DecoderConfig) -> None:
  """Says in model.json what the parameters in `DIR/decoder` are."""
  _update(pathlib.Path(directory), {"decoder": {"config": dataclasses.asdict(config)}})


def decoder_config(directory: str | pathlib.Path) -> DecoderConfig:
  """Returns the configuration of a directory's decoder.

  Raises:
    FileNotFoundError: if the directory has none.
    ValueError: if model.json has fields that this version does not know, or wrong values.
  """
  path = pathlib.Path(directory)
  info = read_info(path)
  if "decoder" not in info:
    raise FileNotFoundError(f"{directory} has no decoder; train one with aromni train")
  with saved.naming(path / "model.json"):
    config = saved.get(saved.get(info, "decoder", dict), "config", dict)
  return _section(path, "decoder", DecoderConfig, config)


def load_decoder(directory: str | pathlib.Path) -> decoder_lib.Decoder:
  """Returns the decoder of a model directory, on the first device."""
  config = decoder_config(directory)
  abstract = nnx.eval_shape(lambda: decoder_lib.Decoder(config, rngs=nnx.Rngs(0)))
  graphdef, state = nnx.split(abstract)
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)
  return nnx.merge(graphdef, load_decoder_state(directory, state))


def load_decoder_state(
  directory: str | pathlib.Path, abstract: nnx.State, config: str = "its config"
) -> nnx.State:
  """Returns the parameters of a model directory's decoder; every device reads its own part.

  Args:
    directory: the model directory.
    abstract: shapes, dtypes and shardings of the parameters.
    config: what messages call the configuration that the shapes are from.

  Raises:
    FileNotFoundError: if the directory has no decoder.
    ValueError: if the stored parameters have other names or shapes, naming the differences.
  """
  path = pathlib.Path(directory) / "decoder"
  wanted = codec_params.state_to_params(abstract)
  codec_params.check(wanted, storage.StoredArrays(path).shapes, f"decoder in {directory}", config)
  state = jax.tree.map(lambda x: x, abstract)
  nnx.replace_by_pure_dict(state, storage.load_params(path, wanted))
  return state


def export(
  directory: str | pathlib.Path, source: str | pathlib.Path, decoder: nnx.Module, dtype: str
) -> None:
  """Writes a model directory: the codecs, text model and recipe of `source`, a new decoder.

  Every process of a run calls it; the first one alone writes what is not sharded.
  """
  path, source = pathlib.Path(directory), pathlib.Path(source)
  partial = path.with_name(path.name + ".partial")
  if jax.process_index() == 0:
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns("decoder", "certificate.json"))
  multihost_utils.sync_global_devices("model directory is copied")
  save_decoder(partial, decoder, dtype)
  if jax.process_index() == 0:
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
  multihost_utils.sync_global_devices("model directory is whole")


def fingerprint(config: dict[str, Any], params: dict) -> str:
  """Returns 16 hex digits over a codec's configuration and parameters."""
  # Whether there is a pixel decoder is seen in the parameters; older files do not say it.
  config = {k: v for k, v in config.items() if k != "has_decoder"}
  digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
  for key, leaf in sorted(
    (jax.tree_util.keystr(k), v) for k, v in jax.tree_util.tree_leaves_with_path(params)
  ):
    digest.update(key.encode() + np.asarray(leaf, np.float32).tobytes())
  return digest.hexdigest()[:16]


def _update(path: pathlib.Path, entries: dict[str, Any]) -> None:
  if jax.process_index() != 0:
    return
  file = path / "model.json"
  info = {"version": VERSION} | (read_info(path) if file.is_file() else {})
  partial = file.with_suffix(".partial")
  partial.write_text(json.dumps(info | entries, indent=1) + "\n")
  partial.rename(file)


@dataclasses.dataclass(frozen=True)
class Base:
  """A model directory as a training sees it: what it begins from, and how it ends as another one.

  Attributes:
    path: of the directory.
    vocabulary: id space.
    fingerprints: what token shards are checked against.
  """

  path: pathlib.Path
  vocabulary: Vocabulary
  fingerprints: dict[str, str]

  def perceptual_table(self) -> np.ndarray:
    """See the function of this name."""
    return perceptual_table(self.path)

  def codebooks(self) -> dict[str, np.ndarray]:
    """See the function of this name."""
    return codebooks(self.path)

  def decoder_config(self) -> DecoderConfig:
    """See the function of this name."""
    return decoder_config(self.path)

  def load_decoder(self, abstract: nnx.State) -> nnx.State:
    """See `load_decoder_state`."""
    return load_decoder_state(self.path, abstract, "config.model")

  def export(self, directory: str | pathlib.Path, decoder: nnx.Module, dtype: str) -> None:
    """Writes a model directory like this one with another decoder, see `export`."""
    export(directory, self.path, decoder, dtype)


def open_base(directory: str | pathlib.Path | None = None) -> Base:
  """Returns a model directory, the shipped one by default; errors as `read_identity`."""
  path = pathlib.Path(directory or SHIPPED)
  return Base(path, *read_identity(path))
