"""What samples while training take of a chip's memory, reckoned from the configuration."""

import functools
import math

import jax
import numpy as np
from flax import nnx

from aromni_jax.codecs.image_vq import PRESETS as IMAGE_CODECS
from aromni_jax.codecs.image_vq import ImageVQ
from aromni_jax.codecs.speech_codec import PRESETS as SPEECH_CODECS
from aromni_jax.codecs.speech_codec import SpeechCodec
from aromni_jax.models.config import DecoderConfig

# Of `evaluation/samples.py`: sequences of a batch, twins for guidance included, and positions of
# the longest, a picture of the released codec with its prompt.
SEQUENCES, POSITIONS = 8, 1152


@functools.cache
def codec_bytes() -> float:
  """Returns the bytes of the released codecs in float32, on the first chip of a host."""

  def size(make) -> float:
    return sum(x.size for x in jax.tree.leaves(nnx.state(nnx.eval_shape(make), nnx.Param)))

  image = size(lambda: ImageVQ(IMAGE_CODECS["chameleon"], rngs=nnx.Rngs(0)))
  return 4.0 * (image + size(lambda: SpeechCodec(SPEECH_CODECS["wavtokenizer"], rngs=nnx.Rngs(0))))


def engine_memory(model: DecoderConfig, sizes: tuple[int, int, int]) -> dict[str, float]:
  """Returns the bytes that the engine takes on a chip while it samples, by part.

  Args:
    model: the decoder.
    sizes: sizes of the mesh axes data, fsdp and tensor.
  """
  width = np.dtype(model.dtype).itemsize
  copied = model.num_params() - model.vocab_size * model.embed_dim  # all but the embedding
  return {
    "the engine's copy of the decoder": copied * width / math.prod(sizes[1:]),
    # The compiler may split them over tensor; that is not counted on.
    "keys and values": SEQUENCES * POSITIONS * kv_cache_bytes(model),
  }


def kv_cache_bytes(model: DecoderConfig) -> float:
  """Returns the bytes of keys and values per token and row in generation."""
  width = np.dtype(model.dtype).itemsize
  return 2.0 * model.num_layers * model.num_kv_heads * model.head_dim * width
