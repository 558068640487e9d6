"""Names and layouts of released Chameleon decoders, as our decoder has them, in both directions.

Three layouts hold the same function:

  A  Meta's native `consolidated.pth` (what AR-Omni's inference reads)
  B  the Hugging Face fork of AR-Omni and Anole (what AR-Omni's training saves)
  C  mainline Hugging Face

The q/k rows of a head are interleaved pairs in A and B, half-split in C and here. The q/k norms are
shared by the heads in A and B, and stand once per head in C. Linear weights are (out, in) there,
[in, out] here; layers are apart there, stacked here.
"""

import numpy as np

from aromni_jax.models.config import DecoderConfig

LAYOUTS = ("A", "B", "C")

# ours -> (A, B and C); `{}` is the number of the layer.
_TOP = {
  "embedding": ("tok_embeddings.weight", "model.embed_tokens.weight"),
  "norm.scale": ("norm.weight", "model.norm.weight"),
  "head": ("output.weight", "lm_head.weight"),
}
_A, _HF = "layers.{}.", "model.layers.{}."
_LAYER = {
  "attention_norm.scale": ("attention_norm.weight", "input_layernorm.weight"),
  "mlp_norm.scale": ("ffn_norm.weight", "post_attention_layernorm.weight"),
  "attention.q.kernel": ("attention.wq.weight", "self_attn.q_proj.weight"),
  "attention.k.kernel": ("attention.wk.weight", "self_attn.k_proj.weight"),
  "attention.v.kernel": ("attention.wv.weight", "self_attn.v_proj.weight"),
  "attention.out.kernel": ("attention.wo.weight", "self_attn.o_proj.weight"),
  "attention.q_norm.scale": ("attention.q_normalization.weight", "self_attn.q_norm.weight"),
  "attention.q_norm.bias": ("attention.q_normalization.bias", "self_attn.q_norm.bias"),
  "attention.k_norm.scale": ("attention.k_normalization.weight", "self_attn.k_norm.weight"),
  "attention.k_norm.bias": ("attention.k_normalization.bias", "self_attn.k_norm.bias"),
  "mlp.gate.kernel": ("feed_forward.w1.weight", "mlp.gate_proj.weight"),
  "mlp.up.kernel": ("feed_forward.w3.weight", "mlp.up_proj.weight"),
  "mlp.down.kernel": ("feed_forward.w2.weight", "mlp.down_proj.weight"),
}


def names(layout: str, num_layers: int) -> dict[str, list[str]]:
  """Returns our path -> the names of its tensors: one per layer, or the only one."""
  column = int(layout != "A")
  prefix = (_A, _HF)[column]
  out = {path: [pair[column]] for path, pair in _TOP.items()}
  for path, pair in _LAYER.items():
    out["layers." + path] = [prefix.format(i) + pair[column] for i in range(num_layers)]
  return out


def shape(path: str, layout: str, config: DecoderConfig) -> tuple[int, ...]:
  """Returns the shape that each tensor of our path has in a layout."""
  c = config
  q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  shapes = {
    "embedding": (c.vocab_size, c.embed_dim),
    "head": (c.vocab_size, c.embed_dim),
    "q.kernel": (q, c.embed_dim),
    "k.kernel": (kv, c.embed_dim),
    "v.kernel": (kv, c.embed_dim),
    "out.kernel": (c.embed_dim, q),
    "gate.kernel": (c.mlp_dim, c.embed_dim),
    "up.kernel": (c.mlp_dim, c.embed_dim),
    "down.kernel": (c.embed_dim, c.mlp_dim),
  }
  for end, value in shapes.items():
    if path.endswith(end):
      return value
  if _is_head_norm(path):
    heads = c.num_heads if ".q_norm." in path else c.num_kv_heads
    return (heads, c.head_dim) if layout == "C" else (c.head_dim,)
  return (c.embed_dim,)


def from_released(tensor: np.ndarray, path: str, layout: str, config: DecoderConfig) -> np.ndarray:
  """Returns a tensor of a released layout as our decoder has it, for one layer.

  A view wherever possible, in the tensor's dtype. The heads' norms of C become the first head's,
  unless `config.per_head_norm`.
  """
  if _is_head_norm(path):
    if layout == "C":
      return tensor if config.per_head_norm else tensor[0]
    return tensor[_half_split(config.head_dim)]
  if tensor.ndim == 1 or path == "embedding":
    return tensor
  if layout != "C" and path.endswith(("attention.q.kernel", "attention.k.kernel")):
    tensor = _permute_rows(tensor, _half_split(config.head_dim))
  return tensor.T


def to_released(tensor: np.ndarray, path: str, layout: str, config: DecoderConfig) -> np.ndarray:
  """Inverse of `from_released`.

  Raises:
    ValueError: for per-head norms and layout A or B, which have one norm for all heads.
  """
  interleaved = np.argsort(_half_split(config.head_dim))
  if _is_head_norm(path):
    if layout == "C":
      return tensor if config.per_head_norm else np.tile(tensor, (shape(path, "C", config)[0], 1))
    if config.per_head_norm:
      raise ValueError(
        f"{path} differs between heads, and layout {layout} has one norm for all heads; "
        "export with --format=C"
      )
    return tensor[interleaved]
  if tensor.ndim == 1 or path == "embedding":
    return tensor
  tensor = tensor.T
  if layout != "C" and path.endswith(("attention.q.kernel", "attention.k.kernel")):
    tensor = _permute_rows(tensor, interleaved)
  return tensor


def _is_head_norm(path: str) -> bool:
  return ".q_norm." in path or ".k_norm." in path


def _half_split(head_dim: int) -> np.ndarray:
  """Row numbers 0, 2, 4, ..., 1, 3, 5, ...: interleaved pairs -> half-split."""
  return np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])


def _permute_rows(tensor: np.ndarray, order: np.ndarray) -> np.ndarray:
  heads = tensor.reshape(-1, len(order), tensor.shape[-1])
  return heads[:, order].reshape(tensor.shape)
