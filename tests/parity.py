"""Reading of tests/fixtures/parity: inputs, weights and outputs of the references."""

import json
import pathlib
import zlib

import numpy as np
from safetensors import safe_open

FOLDER = pathlib.Path(__file__).parent / "fixtures/parity"


def load(name: str) -> tuple[dict[str, np.ndarray], dict]:
  """Returns the tensors of a fixture and its metadata.

  Weights `w.NAME` that the reference drew from `rng_weight` are not stored: their names and shapes
  stand in the metadata (`random_weights`, the seed beside it) and they are drawn again here.
  """
  with safe_open(FOLDER / f"{name}.safetensors", "np") as f:
    tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    meta = json.loads(f.metadata()["meta"])
  for weight, shape in meta.pop("random_weights", {}).items():
    tensors["w." + weight] = rng_weight(weight, shape, meta["seed"])
  for weight, factor in meta.pop("scale", {}).items():
    tensors["w." + weight] *= np.float32(factor)
  return tensors, meta


def weights(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the weights alone, under the reference's names."""
  return {k.removeprefix("w."): v for k, v in tensors.items() if k.startswith("w.")}


def rng_weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
  """Returns the float32 weight that the reference had under this name; needs NumPy alone."""
  random = np.random.RandomState((zlib.crc32(name.encode()) + 7919 * seed) % (2**32 - 1))
  z = random.standard_normal(int(np.prod(shape))).astype(np.float32).reshape(shape)
  near_one = np.abs(1 + np.float32(0.2) * z)
  if name.endswith(("norm.scale.weight", "weight_g")) or "_norm.weight" in name:
    return near_one
  if name.endswith("norm.shift.weight") or "_norm.bias" in name:
    return np.float32(0.1) * z
  if name.endswith("gamma"):
    return np.float32(0.3) * (1 + np.float32(0.2) * z)
  if name.endswith("embed") or "embed_tokens" in name or "quantize.embedding" in name:
    return z
  if len(shape) >= 2:
    return z / np.float32(np.sqrt(np.prod(shape[1:])))
  return near_one if name.endswith("weight") else np.float32(0.1) * z
