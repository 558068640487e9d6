"""Names and layouts of the Chameleon VQGAN checkpoint, as our image codec has them."""

import numpy as np


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
    node = params
    for key in path:
      node = node.setdefault(key, {})
    node[leaf] = tensor
  return params
