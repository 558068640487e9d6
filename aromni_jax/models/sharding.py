"""Mesh, logical axis rules, and the one function that places activations.

Weights and activations name their axes; `RULES` says over which mesh axis each name is split. The
same names serve one device (nothing is split) and a pod.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

# Logical name -> mesh axes. Weights split `embed` over fsdp; activations must not, so theirs have
# names of their own.
RULES: Mapping[str, str | tuple[str, ...] | None] = {
  "layers": None,
  "vocab": "tensor",
  "embed": "fsdp",
  "mlp": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "norm": None,
  "projection": None,
  "codes": "fsdp",
  "act_batch": ("data", "fsdp"),
  "act_length": None,
  "act_embed": None,
  "act_heads": "tensor",
  "act_kv_heads": "tensor",
  "act_mlp": "tensor",
}


def mesh_sizes(devices: int, data: int = 1, fsdp: int = -1, tensor: int = 1) -> tuple[int, ...]:
  """Returns the sizes of the mesh axes over a number of devices; one may be -1, "the rest".

  Raises:
    ValueError: if they do not multiply to the number of devices.
  """
  sizes = [data, fsdp, tensor]
  known = math.prod(s for s in sizes if s != -1)
  if sizes.count(-1) == 1 and known > 0 and devices % known == 0:
    sizes[sizes.index(-1)] = devices // known
  if min(sizes) < 1 or math.prod(sizes) != devices:
    raise ValueError(
      f"mesh data={data} fsdp={fsdp} tensor={tensor} does not cover {devices} devices; "
      "the sizes must multiply to the number of devices, and one of them may be -1"
    )
  return tuple(sizes)


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> Mesh:
  """Returns a mesh over all devices (or the given ones) with axes data, fsdp and tensor.

  Several TPU slices lie along data, so that only it crosses the network between them.

  Args:
    data, fsdp, tensor: sizes; one of them may be -1, "the rest".
    devices: devices to use; all by default.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices, or data is not a multiple of
      the number of slices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = mesh_sizes(len(devices), data, fsdp, tensor)
  types = (AxisType.Auto,) * 3
  slices = len({getattr(d, "slice_index", 0) for d in devices})
  split = {"devices": devices, "allow_split_physical_axes": True}  # any sizes on any torus
  if slices == 1:
    return Mesh(mesh_utils.create_device_mesh(sizes, **split), MESH_AXES, axis_types=types)
  if sizes[0] % slices:
    raise ValueError(f"mesh.data {sizes[0]} is not a multiple of the {slices} slices")
  within = (sizes[0] // slices, *sizes[1:])
  array = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), **split)
  return Mesh(array, MESH_AXES, axis_types=types)


def platform_of_mesh() -> str:
  """Returns "cpu", "gpu" or "tpu": of the devices of the current mesh, which need not be here, or
  without a mesh of JAX's default ones."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device is not None else jax.default_backend()


def spec(*names: str | None) -> PartitionSpec:
  """Returns the PartitionSpec of logical axis names. Raises KeyError for an unknown name."""
  return PartitionSpec(*(None if name is None else RULES[name] for name in names))


def shard(x: jax.Array, *names: str | None) -> jax.Array:
  """Constrains an activation to the current mesh; without a mesh returns it unchanged.

  Args:
    x: array with one logical name (or None) per axis.
    names: keys of `RULES`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, spec(*names))


def _axes(name: str | None) -> tuple[str, ...]:
  """Mesh axes of a logical name."""
  axes = (RULES[name] if name is not None else None) or ()
  return (axes,) if isinstance(axes, str) else tuple(axes)


def gather(x: jax.Array, *names: str | None) -> jax.Array:
  """Inside `jax.shard_map`: gathers a weight over fsdp; over tensor it stays split."""
  for axis, name in enumerate(names):
    if "fsdp" in _axes(name):
      x = jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True)
  return x


def scatter(x: jax.Array, *names: str | None) -> jax.Array:
  """Inside `jax.shard_map`: sums a weight's gradient over the batch, each device its own part."""
  for axis, name in enumerate(names):
    if "fsdp" in _axes(name):
      x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=axis, tiled=True)
  return jax.lax.psum(x, "data")


def on_devices(function: Callable, in_names: Sequence, out_names: Any) -> Callable:
  """Returns a function of each device's own parts, or of whole arrays where there is one device.

  Args:
    function: of local arrays; `gather`, `scatter` and `psum` may move data.
    in_names, out_names: logical names of the axes of each argument and result.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    mesh = make_mesh(1, 1, 1, devices=jax.local_devices()[:1])

  def is_names(x):
    return isinstance(x, tuple) and all(n is None or isinstance(n, str) for n in x)

  in_specs, out_specs = (
    jax.tree.map(lambda names: spec(*names), tree, is_leaf=is_names)
    for tree in (in_names, out_names)
  )
  return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def product(x: jax.Array, kernel: jax.Array, names: tuple[str, str]) -> jax.Array:
  """Returns x @ kernel in x's dtype, with the collectives of a split kernel written out.

  The kernel is cast, then gathered over fsdp, for each of the two passes; its gradient is
  scattered back. Left to the compiler, small slices turn into chains of narrow products.

  Args:
    x: [B, T, in].
    kernel: [in, out].
    names: logical names of the kernel's axes.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x @ kernel.astype(x.dtype)
  return _split_product(x, kernel, names)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _split_product(x: jax.Array, kernel: jax.Array, names: tuple[str, str]) -> jax.Array:
  return _product_forward(x, kernel, names)[0]


_INPUT = {"embed": "act_embed", "heads": "act_heads", "kv_heads": "act_kv_heads", "mlp": "act_mlp"}


def _product_names(names):
  rows = ("act_batch", "act_length")
  return (*rows, _INPUT[names[0]]), (*rows, _INPUT[names[1]])


def _sum_over_tensor(x: jax.Array, name: str) -> jax.Array:
  return jax.lax.psum(x, "tensor") if "tensor" in _axes(name) else x


def _product_forward(x, kernel, names):
  x_names, y_names = _product_names(names)

  def local(x, kernel):
    y = x @ gather(kernel.astype(x.dtype), *names)
    return _sum_over_tensor(y, names[0])

  return on_devices(local, (x_names, names), y_names)(x, kernel), (x, kernel)


def _product_backward(names, saved, dy):
  x_names, y_names = _product_names(names)

  def local(x, kernel, dy):
    dx = jnp.einsum("bto,io->bti", dy, gather(kernel.astype(x.dtype), *names))
    d_kernel = scatter(jnp.einsum("bti,bto->io", x, dy), *names)
    return _sum_over_tensor(dx, names[1]), d_kernel.astype(kernel.dtype)

  return on_devices(local, (x_names, names, y_names), (x_names, names))(*saved, dy)


_split_product.defvjp(_product_forward, _product_backward)


def lookup(table: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Returns the rows of a split table, table[ids] in `dtype`, without gathering the table.

  Every device looks up its own columns of all rows that fsdp shares, and they are exchanged; the
  gradient goes back the same way and is summed where its columns are.

  Args:
    table: [V, D], named vocab and embed.
    ids: int32[B, T].
    dtype: of the rows and of what is exchanged.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return table[ids].astype(dtype)
  return _split_lookup(table, ids, jnp.dtype(dtype))


_TABLE, _IDS = ("vocab", "embed"), ("act_batch", "act_length")
_ROWS = ("act_batch", "act_length", "act_embed")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _split_lookup(table: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
  def local(table, ids):
    places, mine = _places(ids, len(table))
    rows = jnp.where(mine[..., None], table[places].astype(dtype), 0)
    rows = jax.lax.all_to_all(rows, "fsdp", split_axis=0, concat_axis=2, tiled=True)
    return jax.lax.psum(rows, "tensor")

  return on_devices(local, (_TABLE, _IDS), _ROWS)(table, ids)


def _places(ids: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
  """Places in this device's part of the ids of all rows that fsdp shares, and which it has."""
  ids = jax.lax.all_gather(ids, "fsdp", axis=0, tiled=True)
  ids -= jax.lax.axis_index("tensor") * size
  mine = (ids >= 0) & (ids < size)
  return jnp.where(mine, ids, 0), mine


def _lookup_forward(table, ids, dtype):
  return _split_lookup(table, ids, dtype), (table, ids)


def _lookup_backward(dtype, saved, d_rows):
  def local(table, ids, d_rows):
    places, mine = _places(ids, len(table))
    d_rows = jax.lax.all_to_all(d_rows, "fsdp", split_axis=2, concat_axis=0, tiled=True)
    d_rows = jnp.where(mine[..., None], d_rows, 0).astype(table.dtype)
    return jax.lax.psum(jnp.zeros_like(table).at[places].add(d_rows), "data")

  return on_devices(local, (_TABLE, _IDS, _ROWS), _TABLE)(*saved, d_rows), None


_split_lookup.defvjp(_lookup_forward, _lookup_backward)


def weight(init: nnx.Initializer, *names: str | None) -> nnx.Initializer:
  """Returns an initialiser whose parameter carries the mesh axes of its logical names."""
  axes = tuple(None if n is None else RULES[n] for n in names)
  # Placed by the `out_shardings` of the jitted initialisation, not one by one.
  return nnx.with_partitioning(init, axes, eager_sharding=False)


def state_shardings(state: Any, mesh: Mesh) -> Any:
  """Returns the NamedSharding of every leaf of an (abstract) state; unannotated ones are
  replicated.

  Raises:
    ValueError: if an axis is not divisible by its mesh axes, naming the parameter.
  """
  specs = nnx.get_partition_spec(state)

  def one(path, leaf, leaf_spec):
    leaf_spec = leaf_spec if isinstance(leaf_spec, PartitionSpec) else PartitionSpec()
    sharding = NamedSharding(mesh, leaf_spec)
    try:
      sharding.shard_shape(leaf.shape)
    except ValueError as e:
      name = jax.tree_util.keystr(path)
      raise ValueError(f"{name} of shape {leaf.shape} cannot be split as {leaf_spec}: {e}") from e
    return sharding

  return jax.tree_util.tree_map_with_path(one, state, specs)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of [B, T] batches: rows over data and fsdp."""
  return NamedSharding(mesh, spec("act_batch", "act_length"))


def reader_of(rows: NamedSharding) -> tuple[int, int]:
  """Returns which part of a batch this process reads, and how many parts there are.

  Parts are counted in the order of their rows. Processes whose devices share rows
  (`config.mesh.tensor` beyond one of them) read the same part.

  Args:
    rows: of a batch, as `batch_sharding` gives it.

  Raises:
    ValueError: if parts overlap, or have unequal numbers of rows.
  """
  size = rows.num_devices  # so many rows can be split over any mesh of these devices
  read: dict[int, set[int]] = {}  # process -> its rows
  for device, (index, _) in rows.devices_indices_map((size, size)).items():
    read.setdefault(device.process_index, set()).update(range(*index.indices(size)))
  parts = sorted({tuple(sorted(part)) for part in read.values()})
  if any(len(part) * len(parts) != size for part in parts):
    raise ValueError(
      f"config.mesh {dict(rows.mesh.shape)} gives processes parts of a batch that overlap: "
      "config.mesh.tensor must divide the devices of a process, or be a multiple of them"
    )
  return parts.index(tuple(sorted(read[jax.process_index()]))), len(parts)


def table_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of the image embeddings [codes, E] of the perceptual loss."""
  return NamedSharding(mesh, spec("codes", None))
