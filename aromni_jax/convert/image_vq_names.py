"""Names and layouts of the Chameleon VQGAN checkpoint, as our image codec has them."""

import jax
import numpy as np

from aromni_jax.models.params import put

_TORCH_LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def from_torch(tensors: dict[str, np.ndarray]) -> dict:
  """Renames and transposes a VQGAN state dict for `image_vq.from_params`.

  Args:
    tensors: `encoder.*, decoder.*, quantize.embedding.weight, quant_conv.*, post_quant_conv.*`
      with convolutions as (out, in, height, width).

  Returns:
    Nested dicts of arrays; convolutions as (height, width, in, out), norm gains named `scale`.

  Raises:
    ValueError: for a weight whose rank no part of the codec has.
  """
  params: dict = {}
  for name, tensor in tensors.items():
    *path, leaf = name.split(".")
    if name == "quantize.embedding.weight":
      path, leaf = ["quantize"], "embedding"
    elif leaf == "weight" and tensor.ndim == 4:
      leaf, tensor = "kernel", tensor.transpose(2, 3, 1, 0)
    elif leaf == "weight" and tensor.ndim == 1:
      leaf = "scale"
    elif leaf == "weight":
      raise ValueError(
        f"image codec tensor {name!r} has shape {tensor.shape}; expected a convolution of rank 4 "
        "or a norm of rank 1. Is this a VQGAN checkpoint?"
      )
    put(params, [*path, leaf], tensor)
  return params


def to_torch(params: dict) -> dict[str, np.ndarray]:
  """Returns the VQGAN state dict of `image_vq.to_params`: the inverse of `from_torch`, to the bit.

  Args:
    params: nested dicts of arrays.

  Returns:
    Names and layouts as `from_torch` takes them.
  """
  tensors = {}
  for keys, array in jax.tree_util.tree_leaves_with_path(params):
    *path, leaf = (key.key for key in keys)
    array = np.asarray(array)
    if leaf == "kernel":
      array = np.ascontiguousarray(array.transpose(3, 2, 0, 1))
    path += ["embedding", "weight"] if leaf == "embedding" else [_TORCH_LEAF[leaf]]
    tensors[".".join(path)] = array
  return tensors
