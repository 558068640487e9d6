"""Names and layouts of Hugging Face Chameleon decoders, as our decoder has them.

Two Hugging Face layouts exist: the mainline one, whose q/k rows are half-split as ours are and
whose q/k norms stand once per head, and the AR-Omni/Anole fork, whose rows are interleaved pairs
and whose norms are shared. The rank of `q_norm.weight` tells them apart.
"""

import numpy as np

_LAYER = {
  "input_layernorm.weight": "attention_norm.scale",
  "post_attention_layernorm.weight": "mlp_norm.scale",
  "self_attn.q_proj.weight": "attention.q.kernel",
  "self_attn.k_proj.weight": "attention.k.kernel",
  "self_attn.v_proj.weight": "attention.v.kernel",
  "self_attn.o_proj.weight": "attention.out.kernel",
  "self_attn.q_norm.weight": "attention.q_norm.scale",
  "self_attn.q_norm.bias": "attention.q_norm.bias",
  "self_attn.k_norm.weight": "attention.k_norm.scale",
  "self_attn.k_norm.bias": "attention.k_norm.bias",
  "mlp.gate_proj.weight": "mlp.gate.kernel",
  "mlp.up_proj.weight": "mlp.up.kernel",
  "mlp.down_proj.weight": "mlp.down.kernel",
}
_TOP = {
  "model.embed_tokens.weight": "embedding",
  "model.norm.weight": "norm.scale",
  "lm_head.weight": "head",
}


def from_hf(tensors: dict[str, np.ndarray], head_dim: int) -> dict:
  """Renames and transposes a decoder's state dict; layers are stacked.

  Args:
    tensors: `model.*` and `lm_head.*`; linear weights are (out, in). `model.vqmodel.*` is left out.
    head_dim: dimensions of a head.

  Returns:
    Nested dicts of arrays with the names of `models.decoder.Decoder`. Per-head norms that are equal
    in all heads of all layers become one; else they stay (`DecoderConfig.per_head_norm`).

  Raises:
    ValueError: for a tensor without a place.
  """
  per_layer: dict[str, dict[int, np.ndarray]] = {}
  params: dict = {}
  for name, tensor in tensors.items():
    if name.startswith("model.vqmodel."):
      continue
    if name in _TOP:
      tensor = tensor.T if name == "lm_head.weight" else tensor
      _put(params, _TOP[name], tensor)
      continue
    parts = name.split(".", 3)
    if parts[:2] != ["model", "layers"] or parts[3] not in _LAYER:
      raise ValueError(f"decoder tensor {name!r} has no place in the Chameleon decoder")
    interleaved = tensors[f"model.layers.{parts[2]}.self_attn.q_norm.weight"].ndim == 1
    tensor = _to_ours(name, tensor, head_dim, interleaved)
    per_layer.setdefault(_LAYER[parts[3]], {})[int(parts[2])] = tensor
  stacked = {
    path: np.stack([layers[i] for i in range(len(layers))]) for path, layers in per_layer.items()
  }
  norms = [path for path in stacked if "q_norm" in path or "k_norm" in path]
  if all(
    stacked[path].ndim == 3 and (stacked[path] == stacked[path][:, :1]).all() for path in norms
  ):
    stacked |= {path: stacked[path][:, 0] for path in norms}
  for path, tensor in stacked.items():
    _put(params, "layers." + path, tensor)
  return params


def _to_ours(name: str, tensor: np.ndarray, head_dim: int, interleaved: bool) -> np.ndarray:
  half_split = np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])
  if "q_norm" in name or "k_norm" in name:
    return tensor[half_split] if interleaved else tensor
  if interleaved and ("q_proj" in name or "k_proj" in name):
    rows = tensor.reshape(-1, head_dim, tensor.shape[-1])
    tensor = rows[:, half_split].reshape(tensor.shape)
  return tensor.T if tensor.ndim == 2 else tensor


def _put(params: dict, path: str, tensor: np.ndarray) -> None:
  *parents, leaf = path.split(".")
  for key in parents:
    params = params.setdefault(key, {})
  params[leaf] = tensor
