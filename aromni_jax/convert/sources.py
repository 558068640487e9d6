"""Files of released checkpoints as tensors that are read one at a time.

Safetensors are read by their library, pickles by `torch.load(weights_only=True, mmap=True)`, which
runs no code of the file; PyTorch is in the extra `hf` and needed for pickles alone.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging
from safetensors import SafetensorError, safe_open

_DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor in a file.

  Attributes:
    name, shape, dtype: what the file says. file: where it is.
    read: returns it as an array, from the file each time.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  file: pathlib.Path
  read: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape)) * self.dtype.itemsize


Tensors = dict[str, Tensor]


def read_file(path: str | pathlib.Path) -> Tensors:
  """Returns the tensors of a `.safetensors` file or of a pickle (`.pth`, `.bin`, `.ckpt`, `.pt`).

  A pickle may be a state dict, or a dict with one under `state_dict`; entries that are no tensors
  are left out.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is truncated, of another kind, or holds code instead of weights.
    ImportError: for a pickle without PyTorch.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"checkpoint {path} does not exist")
  return (_read_safetensors if path.suffix == ".safetensors" else _read_pickle)(path)


def read_sharded(index: str | pathlib.Path) -> Tensors:
  """Returns the tensors that a Hugging Face index (`*.index.json`) names.

  Raises:
    FileNotFoundError: if a shard is missing.
    ValueError: if the index is damaged, or a shard lacks a tensor or has one more than it says.
  """
  index = pathlib.Path(index)
  place = read_json(index).get("weight_map")
  if not isinstance(place, dict) or not place:
    raise ValueError(f"{index} has no weight_map; expected the index of a Hugging Face checkpoint")
  out: Tensors = {}
  for file in sorted(set(place.values())):
    if not (index.parent / file).is_file():
      raise FileNotFoundError(f"{index.parent / file} is missing; {index.name} names it")
    tensors = read_file(index.parent / file)
    wanted = {name for name, f in place.items() if f == file}
    if wanted != set(tensors):
      raise ValueError(
        f"{index.parent / file} does not hold what {index.name} says: missing "
        f"{sorted(wanted - set(tensors))[:4]}, more {sorted(set(tensors) - wanted)[:4]}"
      )
    out |= tensors
  return out


def read_bare_tensor(path: str | pathlib.Path) -> np.ndarray:
  """Returns the one tensor that a pickle is, or holds: AR-Omni's `perception.ckpt`."""
  path = pathlib.Path(path)
  loaded = _load_pickle(path)
  if isinstance(loaded, Mapping) and len(loaded) == 1:
    (loaded,) = loaded.values()
  if not isinstance(loaded, require_torch().Tensor):
    raise ValueError(f"{path} is not a bare tensor; expected a table [codes, dimensions]")
  return _to_numpy(loaded)


def read_json(path: str | pathlib.Path) -> dict[str, Any]:
  """Returns a JSON object. Raises FileNotFoundError or ValueError, naming the file."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist")
  try:
    data = json.loads(path.read_text(encoding="utf-8"))
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise ValueError(f"{path} is not JSON: {e}") from e
  if not isinstance(data, dict):
    raise ValueError(f"{path} holds a {type(data).__name__}; expected a JSON object")
  return data


def file_hash(path: pathlib.Path) -> str:
  """Returns the SHA-256 of a file in hex."""
  with open(path, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


def _read_safetensors(path: pathlib.Path) -> Tensors:
  try:
    with safe_open(path, "np") as f:
      entries = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 - not a dict
      described = {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in entries.items()}
  except (SafetensorError, OSError) as e:
    raise ValueError(
      f"{path} is not a whole safetensors file ({e}); download or copy it again"
    ) from e

  def reader(name: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
      with safe_open(path, "np") as f:
        return f.get_tensor(name)

    return read

  out = {}
  for name, (shape, dtype) in described.items():
    if dtype not in _DTYPES:
      raise ValueError(f"{path}: tensor {name} is {dtype}; expected one of {', '.join(_DTYPES)}")
    out[name] = Tensor(name, shape, _DTYPES[dtype], path, reader(name))
  return out


def _read_pickle(path: pathlib.Path) -> Tensors:
  loaded = _load_pickle(path)
  if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
    loaded = loaded["state_dict"]
  if not isinstance(loaded, Mapping):
    raise ValueError(f"{path} holds a {type(loaded).__name__}; expected a dict of tensors")
  torch = require_torch()
  out = {}
  for name, value in loaded.items():
    if not isinstance(value, torch.Tensor):
      continue  # rope.freqs may be None; Lightning keeps numbers
    kind = str(value.dtype).removeprefix("torch.")
    try:
      dtype = np.dtype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
    except TypeError as e:
      raise ValueError(f"{path}: tensor {name} is {kind}; expected floating-point numbers") from e
    out[name] = Tensor(name, tuple(value.shape), dtype, path, lambda value=value: _to_numpy(value))
  return out


class _LeftOut:
  """Stands for an object that is no weight; nothing of its class is imported or run."""

  def __init__(self, *args: Any):
    pass

  def __setstate__(self, state: Any) -> None:
    pass


def _load_pickle(path: pathlib.Path) -> Any:
  torch = require_torch()
  load = functools.partial(
    torch.load, path, map_location="cpu", weights_only=True, mmap=_is_zip(path)
  )
  try:
    return load()
  except pickle.UnpicklingError as e:
    if (loaded := _load_around(path, load)) is not None:
      return loaded
    found = re.search(r"Unsupported global: GLOBAL (\S+)", str(e))
    what = f"names {found[1]}, which is no weight" if found else "is damaged"
    raise ValueError(
      f"{path} {what}; nothing in it was run. If the file can be trusted, save its state dict "
      "alone and convert that"
    ) from e
  except (RuntimeError, EOFError, ValueError, KeyError) as e:
    raise ValueError(f"{path} is not a whole PyTorch checkpoint: {e}") from e


def _load_around(path: pathlib.Path, load: Callable[[], Any]) -> Any:
  """A checkpoint with a state dict and other objects beside it, as Lightning writes: without them.
  None if it is not such a file."""
  serialization = require_torch().serialization
  try:
    others = serialization.get_unsafe_globals_in_checkpoint(path)
    with serialization.safe_globals([(_LeftOut, name) for name in others]):
      loaded = load()
  except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, AttributeError):
    return None
  if not isinstance(loaded, Mapping) or not isinstance(loaded.get("state_dict"), Mapping):
    return None
  logging.warning("%s also holds %s; left out, and not run.", path, ", ".join(others))
  return loaded


def _is_zip(path: pathlib.Path) -> bool:
  """Whether it is PyTorch's format since 1.6, the one that can be mapped."""
  with open(path, "rb") as f:
    return f.read(2) == b"PK"


def _to_numpy(value) -> np.ndarray:
  torch = require_torch()
  if value.dtype == torch.bfloat16:
    return value.detach().contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
  return value.detach().numpy()


def require_torch():
  """Returns PyTorch. Raises ImportError that says how it is installed."""
  try:
    import torch
  except ImportError as e:
    raise ImportError(
      "checkpoints that are pickles are read and written with PyTorch: pip install "
      "'aromni_jax[hf]', or use safetensors"
    ) from e
  return torch
