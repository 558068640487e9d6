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
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from aromni_jax.codecs import image_vq, speech_codec
from aromni_jax.codecs.text import SentencePieceText, TextCodec, TokenizerJsonText
from aromni_jax.models import decoder as decoder_lib
from aromni_jax.models import params as codec_params
from aromni_jax.models.config import DecoderConfig
from aromni_jax.training import checkpoint
from aromni_jax.vocabulary import Vocabulary

SHIPPED = pathlib.Path(__file__).parent / "pretrained"
CODECS = {
  "image_codec": (image_vq.ImageVQConfig, image_vq.ImageVQ),
  "speech_codec": (speech_codec.SpeechCodecConfig, speech_codec.SpeechCodec),
}
_SHORTEST = 32  # hops of a bucket
_MAX_HOPS, _MAX_PIXELS = 4096, 1 << 20  # of a batch of several rows


@dataclasses.dataclass(frozen=True)
class Model:
  """Everything that reading and writing all modalities needs.

  Attributes:
    path: the directory. vocabulary: id space. text: text codec.
    image_codec, speech_codec: codecs, or None if the directory has none.
    decoder: the Transformer, or None if the directory has none yet.
    recipe: prompt family.
    fingerprints: "image_codec", "speech_codec" and "text" -> 16 hex digits.
  """

  path: pathlib.Path
  vocabulary: Vocabulary
  text: TextCodec
  image_codec: image_vq.ImageVQ | None
  speech_codec: speech_codec.SpeechCodec | None
  decoder: decoder_lib.Decoder | None
  recipe: str
  fingerprints: dict[str, str]

  def needed(self, codec: str) -> nnx.Module:
    """Returns the codec "image_codec" or "speech_codec". Raises ValueError if there is none."""
    module = getattr(self, codec)
    if module is None:
      raise ValueError(f"{self.path} has no {codec}. {_GET_CODEC[codec]}")
    return module


_GET_CODEC = {
  "image_codec": "Convert with --vqgan=vqgan.ckpt, or train one with aromni train_codec",
  "speech_codec": "Convert with --wavtokenizer=FILE.ckpt, or train one with aromni train_codec",
}


def load_model(directory: str | pathlib.Path | None = None, *, decoder: bool = True) -> Model:
  """Returns the model of a directory, the shipped one by default.

  Args:
    directory: the model directory.
    decoder: False leaves the decoder out, for whoever places its parameters himself.

  Raises:
    FileNotFoundError: if the directory or a part of it does not exist.
    ValueError: if a part is damaged or does not fit model.json.
  """
  path = pathlib.Path(directory or SHIPPED)
  info = read_info(path)
  vocabulary, text, fingerprints = _identity(path, info)
  if "decoder" in info and (size := decoder_config(path).vocab_size) != vocabulary.size:
    raise ValueError(f"{path}: the decoder has {size} ids, the vocabulary {vocabulary.size}")
  return Model(
    path=path,
    vocabulary=vocabulary,
    text=text,
    **{name: load_codec(path, name) if name in info else None for name in CODECS},
    decoder=load_decoder(path) if decoder and "decoder" in info else None,
    recipe=info["recipe"],
    fingerprints=fingerprints,
  )


def read_identity(directory: str | pathlib.Path) -> tuple[Vocabulary, dict[str, str]]:
  """Returns what token shards are checked against: the vocabulary and the fingerprints that
  `Model` has, without loading any parameters. Raises FileNotFoundError without a directory."""
  path = pathlib.Path(directory)
  vocabulary, _, fingerprints = _identity(path, read_info(path))
  return vocabulary, fingerprints


def _identity(
  path: pathlib.Path, info: dict[str, Any]
) -> tuple[Vocabulary, TextCodec, dict[str, str]]:
  vocabulary = Vocabulary.from_dict(info["vocabulary"])
  released = (path / "tokenizer.json").is_file()
  text_codec, file = (
    (TokenizerJsonText, "tokenizer.json") if released else (SentencePieceText, "text.model")
  )
  text = text_codec(path / file, vocabulary)
  fingerprints = {name: info[name]["fingerprint"] for name in CODECS if name in info}
  return vocabulary, text, fingerprints | {"text": text.fingerprint()}


def read_info(path: pathlib.Path) -> dict[str, Any]:
  """Returns model.json. Raises FileNotFoundError or ValueError, naming the file."""
  file = path / "model.json"
  if not file.is_file():
    raise FileNotFoundError(f"{path} is not a model directory: it has no model.json")
  try:
    return json.loads(file.read_text())
  except json.JSONDecodeError as e:
    raise ValueError(f"{file} is not JSON: {e}") from e


def create(directory: str | pathlib.Path, vocabulary: Vocabulary, recipe: str) -> None:
  """Starts (or goes on with) a model directory: writes vocabulary and recipe."""
  path = pathlib.Path(directory)
  path.mkdir(parents=True, exist_ok=True)
  _update(path, {"vocabulary": vocabulary.to_dict(), "recipe": recipe})


def save_codec(
  directory: str | pathlib.Path, name: str, codec: nnx.Module, dtype: str = "bfloat16"
) -> None:
  """Writes "image_codec" or "speech_codec" in a storage dtype and notes it in model.json."""
  path = pathlib.Path(directory)
  checkpoint.save_params(path / name, codec_params.to_params(codec), dtype)
  info = {"config": dataclasses.asdict(codec.config)}
  info["fingerprint"] = fingerprint(info["config"], checkpoint.load_params(path / name))
  _update(path, {name: info})


def load_codec(directory: str | pathlib.Path, name: str) -> nnx.Module:
  """Returns a codec.

  Raises:
    ValueError: if the parameters are not those that model.json was written for.
  """
  path = pathlib.Path(directory)
  info = read_info(path).get(name)
  if info is None:
    raise FileNotFoundError(f"{path} has no {name}. {_GET_CODEC[name]}")
  config_class, module = CODECS[name]
  config = config_class(**info["config"])
  params = checkpoint.load_params(path / name)
  if fingerprint(info["config"], params) != info["fingerprint"]:
    raise ValueError(f"{path / name} is damaged: it does not have the fingerprint of model.json")
  return codec_params.from_params(lambda rngs: module(config, rngs=rngs), params, name)


def perceptual_table(directory: str | pathlib.Path, codec: image_vq.ImageVQ) -> np.ndarray:
  """Returns float32[codes, dimensions], the image embeddings of the perceptual loss: the codebook,
  or the table that a released model came with (`DIR/perception`)."""
  path = pathlib.Path(directory) / "perception"
  if path.is_dir():
    return checkpoint.load_params(path)["table"]
  return np.asarray(codec.quantize.embedding[...])


def save_decoder(directory: str | pathlib.Path, decoder: nnx.Module, dtype: str) -> None:
  """Writes the decoder in a storage dtype and notes it in model.json."""
  path = pathlib.Path(directory)
  checkpoint.save_params(path / "decoder", codec_params.to_params(decoder), dtype)
  note_decoder(path, dataclasses.replace(decoder.config, param_dtype=dtype))


def note_decoder(directory: str | pathlib.Path, config: DecoderConfig) -> None:
  """Says in model.json what the parameters in `DIR/decoder` are."""
  _update(pathlib.Path(directory), {"decoder": {"config": dataclasses.asdict(config)}})


def decoder_config(directory: str | pathlib.Path) -> DecoderConfig:
  """Returns the configuration of a directory's decoder. Raises FileNotFoundError without one."""
  info = read_info(pathlib.Path(directory)).get("decoder")
  if info is None:
    raise FileNotFoundError(f"{directory} has no decoder; train one with aromni train")
  return DecoderConfig(**info["config"])


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
  codec_params.check(
    wanted, checkpoint.StoredArrays(path).shapes, f"decoder in {directory}", config
  )
  state = jax.tree.map(lambda x: x, abstract)
  nnx.replace_by_pure_dict(state, checkpoint.load_params(path, wanted))
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


@nnx.jit
def _encode_images(codec: image_vq.ImageVQ, pixels: jax.Array) -> jax.Array:
  return codec.encode(pixels)


@nnx.jit
def _decode_images(codec: image_vq.ImageVQ, codes: jax.Array) -> jax.Array:
  return codec.decode(codes)


@nnx.jit
def _encode_speech(codec: speech_codec.SpeechCodec, wav: jax.Array, lengths: jax.Array):
  return codec.encode(wav, lengths)


@nnx.jit
def _decode_speech(codec: speech_codec.SpeechCodec, codes: jax.Array, lengths: jax.Array):
  return codec.decode(codes, lengths)


def encode_images(
  codec: image_vq.ImageVQ, pictures: np.ndarray, batch_size: int = 32
) -> np.ndarray:
  """Returns the codes int32[n, image_length] of pictures, in batches of one shape.

  Args:
    codec: image codec.
    pictures: uint8[n, H, W, 3] or float32 in [-1, 1].
    batch_size: pictures at a time; fewer if they would hold over 2**20 pixels (4 of 512x512).
  """
  if pictures.dtype == np.uint8:
    pictures = pictures.astype(np.float32) / 255 * 2 - 1
  run = functools.partial(_encode_images, codec)
  return _in_batches(run, _fitting(codec, batch_size), pictures)


def decode_images(codec: image_vq.ImageVQ, codes: np.ndarray, batch_size: int = 8) -> np.ndarray:
  """Returns pictures uint8[n, H, W, 3] of codes int32[n, image_length], in batches as above."""
  run = functools.partial(_decode_images, codec)
  return image_vq.to_uint8(_in_batches(run, _fitting(codec, batch_size), codes))


def _fitting(codec: image_vq.ImageVQ, batch_size: int) -> int:
  """Returns the batch size, or fewer: what 2**20 pixels hold of the codec's pictures."""
  return min(batch_size, max(1, _MAX_PIXELS // codec.config.resolution**2))


def encode_speech(
  codec: speech_codec.SpeechCodec, clips: list[np.ndarray], batch_size: int = 16
) -> list[np.ndarray]:
  """Returns the codes int32[ceil(n / hop)] of every clip, float32[n] at the codec's rate.

  Clips are padded to a bucket of hops and encoded together, so few shapes are compiled. With the
  released encoder a clip has the codes that it has alone. To the encoder "log_mel" padding is
  silence, heard by the last codes of a clip.

  Args:
    codec: speech codec.
    clips: sound; of any length, minutes too.
    batch_size: clips at a time; fewer in buckets so long that they would hold over 4096 hops.
  """
  hop = codec.config.hop
  # Codes that hear the padding must stay what they are: their buckets are powers of two for good.
  halves = not codec.config.hears_padding
  run = functools.partial(_encode_speech, codec)
  return _bucketed(clips, run, batch_size, unit=hop, dtype=np.float32, scale=1, halves=halves)


def decode_speech(
  codec: speech_codec.SpeechCodec, codes: list[np.ndarray], batch_size: int = 8
) -> list[np.ndarray]:
  """Returns float32[L * hop] of every sequence of codes int32[L], as it would be decoded alone.

  Sequences are padded to buckets and decoded together, as in `encode_speech`.
  """
  run = functools.partial(_decode_speech, codec)
  return _bucketed(codes, run, batch_size, unit=1, dtype=np.int32, scale=codec.config.hop)


def bucket(units: int, halves: bool = True) -> int:
  """Returns the length that `units` hops are padded to: 32, 48, 64, 96, 128, 192, 256, ...

  Powers of two from 32 and, if `halves`, the lengths halfway between them. So at most a third of
  the work on a bucket of more than 32 is wasted, and all lengths up to three minutes at 40 codes
  per second need 17 compilations.
  """
  power = max(_SHORTEST, 1 << max(units - 1, 0).bit_length())
  half = power * 3 // 4
  return half if halves and max(units, _SHORTEST + 1) <= half else power


def _bucketed(
  items, run, batch_size: int, *, unit: int, dtype, scale: int, halves: bool = True
) -> list[np.ndarray]:
  """Runs ragged items in batches of few shapes.

  Args:
    items: arrays [n] of one dtype.
    run: (rows [b, size * unit], lengths int32[b]) -> results [b, size * scale].
    batch_size: rows at a time.
    unit, scale: values of an item, and of a result, per hop.
    halves: see `bucket`.
  """
  units = [-(-len(item) // unit) for item in items]
  buckets: dict[int, list[int]] = {}
  for i, n in enumerate(units):
    buckets.setdefault(bucket(n, halves), []).append(i)
  out: list[Any] = [None] * len(items)
  for size, members in buckets.items():
    padded = np.zeros((len(members), size * unit), dtype)
    for row, i in zip(padded, members, strict=True):
      row[: len(items[i])] = items[i]
    lengths = np.array([len(items[i]) for i in members], np.int32)
    rows = min(batch_size, max(1, _MAX_HOPS // size))
    for i, result in zip(members, _in_batches(run, rows, padded, lengths), strict=True):
      out[i] = result[: units[i] * scale]
  return out


def _in_batches(run, batch_size: int, *arrays: np.ndarray) -> np.ndarray:
  """Applies `run` to batches of one size; the last is filled up with the first row."""
  out = []
  for start in range(0, len(arrays[0]), batch_size):
    batch = [a[start : start + batch_size] for a in arrays]
    count = len(batch[0])
    filled = [
      np.concatenate([b, np.repeat(a[:1], batch_size - count, axis=0)])
      for a, b in zip(arrays, batch, strict=True)
    ]
    out.append(np.asarray(run(*map(jnp.asarray, filled)))[:count])
  return np.concatenate(out)


def _update(path: pathlib.Path, entries: dict[str, Any]) -> None:
  if jax.process_index() != 0:
    return
  file = path / "model.json"
  info = json.loads(file.read_text()) if file.is_file() else {}
  partial = file.with_suffix(".partial")
  partial.write_text(json.dumps(info | entries, indent=1) + "\n")
  partial.rename(file)
