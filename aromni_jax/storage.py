"""Orbax checkpoints of bare parameters: written whole or piece by piece, read whole or in parts."""

import asyncio
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from aromni_jax import compat

# Of the arrays of `save_streamed`: what a reader of a part reads at least, and how many are written
# at once; each is in memory twice then.
_CHUNK_BYTES = 64 << 20
_CHUNKS_AT_ONCE = 2


def save_params(directory: str | pathlib.Path, params: dict, dtype: str | None = None) -> None:
  """Writes nested dicts of arrays; the directory appears only once it is whole.

  Args:
    directory: is replaced if it exists.
    params: nested dicts of arrays.
    dtype: floating-point arrays are stored in it if given, e.g. "bfloat16".
  """
  if dtype is not None:
    params = jax.tree.map(
      lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params
    )
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(pathlib.Path(directory).absolute(), params, force=True)


@dataclasses.dataclass(frozen=True)
class Streamed:
  """An array that is made piece by piece while it is written.

  Attributes:
    shape, dtype: of the whole.
    pieces: makers of its parts along axis 0, [1, ...] each, or of the whole if there is one.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  pieces: tuple[Callable[[], np.ndarray], ...]

  @property
  def size(self) -> int:
    return int(np.prod(self.shape))

  @property
  def nbytes(self) -> int:
    return self.size * np.dtype(self.dtype).itemsize


class _StreamedWriter:
  """Writes one piece of one array at a time, where Orbax writes NumPy arrays."""

  def __init__(self, on_piece: Callable[[int], None]):
    self._on_piece = on_piece
    self._turn = asyncio.Semaphore(1)

  async def write(self, value: Streamed, tspec: dict, ts_context: ts.Context) -> None:
    array = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
    if value.nbytes <= _CHUNK_BYTES:  # one chunk, written once
      await array.write(np.concatenate([piece() for piece in value.pieces]))
      self._on_piece(value.nbytes)
      return
    chunk = array.chunk_layout.write_chunk.shape
    async with self._turn:
      start = 0
      for make in value.pieces:
        piece = make()
        writes: list[ts.WriteFutures] = []
        for part in _blocks(piece.shape, chunk):
          if len(writes) == _CHUNKS_AT_ONCE:
            await writes.pop(0)
          whole = (slice(part[0].start + start, part[0].stop + start), *part[1:])
          writes.append(array[whole].write(piece[part]))
          self._on_piece(piece[part].nbytes)
        for write in writes:
          await write
        start += len(piece)


def _blocks(shape: tuple[int, ...], block: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
  """Yields the indices of the blocks that cover an array."""
  for corner in np.ndindex(*(-(-size // b) for size, b in zip(shape, block, strict=True))):
    yield tuple(
      slice(i * b, min((i + 1) * b, size)) for i, b, size in zip(corner, block, shape, strict=True)
    )


def save_streamed(
  directory: str | pathlib.Path, params: dict, on_piece: Callable[[int], None] = lambda _: None
) -> None:
  """Writes nested dicts of `Streamed`; a checkpoint like those of `save_params`, in its dtypes.

  Memory holds one piece at a time and its compressed copy, whatever the size of the whole.

  Args:
    directory: is replaced if it exists; it appears only once it is whole.
    params: nested dicts of `Streamed`.
    on_piece: is called with the bytes of every piece that was written.
  """
  streamed = compat.array_handler(_StreamedWriter(on_piece).write)
  handler = ocp.PyTreeCheckpointHandler(
    type_handler_registry=ocp.type_handlers.create_type_handler_registry(
      (Streamed, streamed), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
  )
  args = jax.tree.map(
    lambda leaf: ocp.SaveArgs(
      chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if len(leaf.pieces) > 1 else ()
    ),
    params,
  )
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(pathlib.Path(directory).absolute(), params, save_args=args, force=True)


class StoredArrays:
  """The arrays of a checkpoint of parameters, read part by part.

  Args:
    directory: what `save_params` or `save_streamed` wrote.

  Attributes:
    shapes, dtypes: dotted name -> what is stored.

  Raises:
    FileNotFoundError, ValueError: as `load_params`.
  """

  def __init__(self, directory: str | pathlib.Path):
    self.directory = pathlib.Path(directory).absolute()
    leaves = jax.tree_util.tree_leaves_with_path(_metadata(self.directory))
    described = {".".join(key.key for key in path): m for path, m in leaves}
    self.dtypes = {name: np.dtype(m.dtype) for name, m in described.items()}
    self.shapes = {name: tuple(m.shape) for name, m in described.items()}
    self._open: dict[str, ts.TensorStore] = {}

  def read(self, name: str, index: Any = slice(None)) -> np.ndarray:
    """Returns the array of a dotted name, or the part of it at an index, as it is stored."""
    if name not in self._open:
      kvstore = {"driver": "ocdbt", "base": f"file://{self.directory}", "path": name + "/"}
      self._open[name] = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()
    return self._open[name][index].read().result()


def load_params(directory: str | pathlib.Path, abstract: Any = None) -> dict:
  """Returns the nested dicts of arrays.

  Args:
    directory: what `save_params` or `save_streamed` wrote.
    abstract: nested dicts of `jax.ShapeDtypeStruct` that say dtype and sharding of every array;
      each device then reads its own part. By default arrays are NumPy, float32 where they were
      stored in bfloat16.

  Raises:
    FileNotFoundError: if there is no such checkpoint.
    ValueError: if it cannot be read.
  """
  directory = pathlib.Path(directory).absolute()
  metadata = _metadata(directory)
  if abstract is None:
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
  else:
    args = jax.tree.map(
      lambda x: ocp.ArrayRestoreArgs(
        restore_type=jax.Array, dtype=x.dtype, sharding=x.sharding, global_shape=x.shape
      ),
      abstract,
    )
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      params = checkpointer.restore(directory, restore_args=args)
  except Exception as e:
    raise ValueError(f"{directory} is not a whole Orbax checkpoint: {e}") from e
  if abstract is not None:
    return params
  return jax.tree.map(
    lambda x: x.astype(np.float32) if x.dtype == jnp.bfloat16 else np.asarray(x), params
  )


def _metadata(directory: pathlib.Path) -> dict:
  """Shapes and dtypes of a checkpoint of parameters."""
  if not directory.is_dir():
    raise FileNotFoundError(f"{directory} does not exist; expected an Orbax checkpoint")
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      return checkpointer.metadata(directory).item_metadata.tree
  except Exception as e:
    raise ValueError(f"{directory} is not a whole Orbax checkpoint: {e}") from e
