"""Logits of a stored decoder, one layer in memory at a time, and the same from PyTorch.

Both run in float32 whatever the weights are stored in, so that they can be compared closely.
"""

import dataclasses
import operator
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aromni_jax import model_dir
from aromni_jax.convert.decoders import ReleasedDecoder
from aromni_jax.convert.layouts import LAYOUTS
from aromni_jax.convert.writers import hf_config
from aromni_jax.models import decoder as decoder_lib
from aromni_jax.storage import StoredArrays

_PROMPT_LENGTH = 16
_COLUMNS = 8192  # of the head that are read at once


def fixed_prompt(vocab_size: int) -> np.ndarray:
  """Returns int32[16] ids from all over the vocabulary, bos first: what certificates are about."""
  return (np.arange(_PROMPT_LENGTH, dtype=np.int64) * 40_503 % vocab_size).astype(np.int32)


def digest(logits: np.ndarray) -> list[dict[str, float]]:
  """Returns the likeliest id, its logit and the log of the sum of exponentials per position."""
  best = logits.argmax(-1)
  total = np.asarray(jax.nn.logsumexp(logits, axis=-1))
  return [
    {"id": int(i), "logit": round(float(row[i]), 4), "logsumexp": round(float(s), 4)}
    for i, row, s in zip(best, logits, total, strict=True)
  ]


def stored_logits(directory: str | pathlib.Path, tokens: np.ndarray) -> np.ndarray:
  """Returns float32[T, V], the logits of a model directory's decoder after int32[T] tokens."""
  config = dataclasses.replace(
    model_dir.decoder_config(directory), dtype="float32", attention="xla"
  )
  arrays = StoredArrays(pathlib.Path(directory) / "decoder")
  positions = jnp.arange(len(tokens))[None]
  rotary = decoder_lib.rotary_angles(positions, config, jnp.float32)

  def read(name: str, index=slice(None)) -> np.ndarray:
    return arrays.read(name, index).astype(np.float32)

  layer = nnx.eval_shape(lambda: decoder_lib.Layer(config, rngs=nnx.Rngs(0)))
  parameters = [name for name in arrays.dtypes if name.startswith("layers.")]
  with jax.default_matmul_precision("highest"):
    x = jnp.asarray(np.stack([read("embedding", int(t)) for t in tokens]))[None]
    for i in range(config.num_layers):
      for name in parameters:  # as they are stored; the layer casts them
        parameter = operator.attrgetter(name.removeprefix("layers."))(layer)
        parameter.set_value(jnp.asarray(arrays.read(name, i)))
      # Not compiled: so one matrix after the other is cast to float32, not all at once.
      x = layer(x, rotary, positions, None, None)[0].block_until_ready()
    x = _rms_norm(x[0], read("norm.scale"), config.norm_eps)
    columns = (
      slice(i, min(i + _COLUMNS, config.vocab_size)) for i in range(0, config.vocab_size, _COLUMNS)
    )
    return np.concatenate([x @ read("head", (slice(None), c)) for c in columns], axis=1)


def _rms_norm(x: jax.Array, scale: np.ndarray, epsilon: float) -> jax.Array:
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale


def torch_logits(decoder: ReleasedDecoder, tokens: np.ndarray) -> np.ndarray:
  """Returns float32[T, V] of the source's weights in the layers of PyTorch `transformers`.

  The source is read again, tensor by tensor.

  Raises:
    ImportError: without the extra `hf`.
  """
  try:
    import torch
    from transformers import ChameleonConfig
    from transformers.models.chameleon import modeling_chameleon as modeling
  except ImportError as e:
    raise ImportError(
      f"--verify_against needs PyTorch and transformers ({e}): pip install 'aromni_jax[hf]'"
    ) from e
  config = decoder.config
  theirs = ChameleonConfig(**hf_config(config))
  theirs._attn_implementation = "eager"
  swin = config.norm_placement == "swin"
  make = modeling.ChameleonSwinDecoderLayer if swin else modeling.ChameleonDecoderLayer
  names = decoder.layout.names(config.num_layers)
  peer = LAYOUTS["hf"]
  wanted = peer.names(1)

  def read(path: str, i: int = 0):
    tensor = decoder.tensors[names[path][i]].read()
    ours = decoder.layout.from_released(tensor, path, config)
    out = peer.to_released(ours, path, config)
    return torch.from_numpy(np.ascontiguousarray(out, np.float32))

  length = len(tokens)
  with torch.inference_mode():
    positions = torch.arange(length)[None]
    x = read("embedding")[torch.from_numpy(tokens).long()][None]
    rotary = modeling.ChameleonRotaryEmbedding(theirs)(x, positions)
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    layer = make(theirs, 0).eval()
    for i in range(config.num_layers):
      state = {
        wanted[path][0].removeprefix("model.layers.0."): read(path, i)
        for path in wanted
        if path.startswith("layers.")
      }
      layer.load_state_dict(state)
      x = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=rotary)[0]
    norm = modeling.ChameleonRMSNorm(config.embed_dim, eps=config.norm_eps)
    norm.weight.data = read("norm.scale")
    return (norm(x)[0] @ read("head").T).numpy()
