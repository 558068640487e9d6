"""Pictures and sounds, any number of any length, through codecs in batches of few shapes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aromni_jax.codecs import image_vq, speech_codec

_SHORTEST = 32  # hops of a bucket
_MAX_HOPS, _MAX_PIXELS = 4096, 1 << 20  # of a batch of several rows


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
