"""Names and layouts of a WavTokenizer checkpoint, as our speech codec has them."""

import re

import numpy as np

from aromni_jax.models.params import put

_ENCODER = "feature_extractor.encodec.encoder.model."
_CODEBOOK = "feature_extractor.encodec.quantizer.vq.layers.0._codebook."
# In the checkpoint but not in the function: SEANet's decoder, averages of the codebook, the window
# (recomputed), discriminators and losses.
UNUSED = (
  "feature_extractor.encodec.decoder.",
  _CODEBOOK + "embed_avg",
  _CODEBOOK + "cluster_size",
  _CODEBOOK + "inited",
  "head.istft.window",
)
_USED = (_ENCODER, _CODEBOOK + "embed", "backbone.", "head.")


def from_torch(tensors: dict[str, np.ndarray]) -> dict:
  """Renames, transposes and folds the weight norms of a WavTokenizer state dict.

  Args:
    tensors: the `state_dict` of the Lightning checkpoint, as arrays.

  Returns:
    Nested dicts of arrays for `speech_codec.from_params`.

  Raises:
    ValueError: if a used tensor has a name that this table does not know.
  """
  tensors = {
    name: tensor
    for name, tensor in _fold_lstm(_fold_weight_norm(tensors)).items()
    if name.startswith(_USED) and not name.startswith(UNUSED)
  }
  indices = [int(name[len(_ENCODER) :].split(".")[0]) for name in tensors if _ENCODER in name]
  params: dict = {}
  for name, tensor in tensors.items():
    path = _rename(name, max(indices, default=0))
    keys = path.split(".")
    put(params, keys, _transpose(keys[-1], name, tensor))
  return params


def _fold_weight_norm(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Replaces weight_g and weight_v by `g * v / |v|`, the norm over (in, k) of each output."""
  out = {}
  for name, tensor in tensors.items():
    if name.endswith("weight_g"):
      v = tensors[name[:-1] + "v"]
      norm = np.sqrt(np.sum(v.astype(np.float64) ** 2, axis=(1, 2), keepdims=True))
      out[name[: -len("_g")]] = (tensor * v / norm).astype(np.float32)
    elif not name.endswith("weight_v"):
      out[name] = tensor
  return out


def _fold_lstm(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Sums the two biases of each LSTM layer, which only ever appear as their sum."""
  out = {}
  for name, tensor in tensors.items():
    if ".lstm.bias_ih_l" in name:
      out[name] = tensor + tensors[name.replace("bias_ih", "bias_hh")]
    elif ".lstm.bias_hh_l" not in name:
      out[name] = tensor
  return out


def _rename(name: str, last: int) -> str:
  """Our dotted path of a checkpoint name; `last` is the index of the encoder's last module."""
  if name == _CODEBOOK + "embed":
    return "codebook"
  if name.startswith(_ENCODER):
    return "encoder." + _rename_encoder(name[len(_ENCODER) :], last, name)
  if name.startswith("head.out."):
    return name.replace("head.out.weight", "decoder.head.kernel").replace(
      "head.out.", "decoder.head."
    )
  name = name.removeprefix("backbone.").replace("final_layer_norm", "final_norm")
  name = re.sub(r"^pos_net\.5\.", "position_net.norm.", name)
  name = re.sub(r"^pos_net\.", "position_net.blocks.", name)
  name = re.sub(r"^convnext\.", "blocks.", name)
  name = name.replace(".dwconv.weight", ".depthwise").replace(".dwconv.bias", ".depthwise_bias")
  name = name.replace("pwconv1", "up").replace("pwconv2", "down")
  name = re.sub(r"norm\.(scale|shift)\.weight$", r"norm.\1", name)
  if name.endswith(".weight"):
    is_norm = re.search(r"norm\d?\.weight$", name)
    name = name.removesuffix("weight") + ("scale" if is_norm else "kernel")
  return "decoder." + name


def _rename_encoder(name: str, last: int, full: str) -> str:
  index, rest = name.split(".", 1)
  index = int(index)
  if match := re.fullmatch(r"lstm\.(weight_ih|weight_hh|bias_ih)_l(\d+)", rest):
    part = {
      "weight_ih": "input.kernel",
      "weight_hh": "recurrent.kernel",
      "bias_ih": "input.bias",
    }
    return f"lstm.{match[2]}.{part[match[1]]}"
  match = re.fullmatch(r"(?:(block\.1|block\.3|shortcut)\.)?conv\.conv\.(weight|bias)", rest)
  if not match:
    raise ValueError(f"speech codec tensor {full!r} has no place in the SEANet encoder.")
  leaf = "conv." + ("kernel" if match[2] == "weight" else "bias")
  if index == 0:
    return f"conv_in.{leaf}"
  if index == last:
    return f"conv_out.{leaf}"
  # Modules 1, 4, 7, ... are residual units; 3, 6, 9, ... the strided convolutions after them.
  if match[1]:
    unit = {"block.1": "conv3", "block.3": "conv1", "shortcut": "shortcut"}[match[1]]
    return f"units.{(index - 1) // 3}.{unit}.{leaf}"
  return f"downs.{index // 3 - 1}.{leaf}"


def _transpose(leaf: str, name: str, tensor: np.ndarray) -> np.ndarray:
  if leaf == "depthwise":  # (D, 1, k) -> (k, 1, D)
    return tensor.transpose(2, 1, 0)
  if leaf == "kernel" and tensor.ndim == 3:
    attention = re.search(r"pos_net\.\d+\.(q|k|v|proj_out)\.", name)
    return tensor[..., 0].T if attention else tensor.transpose(2, 1, 0)
  return tensor.T if leaf == "kernel" else tensor
