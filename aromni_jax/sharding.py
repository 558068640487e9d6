"""Mesh, logical axis rules, and the one function that places activations.

Weights and activations name their axes; `RULES` says over which mesh axis each name is split. The
same names serve one device (nothing is split) and a pod.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
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
  "act_batch": ("data", "fsdp"),
  "act_length": None,
  "act_embed": None,
  "act_heads": "tensor",
  "act_kv_heads": "tensor",
  "act_mlp": "tensor",
  "act_vocab": "tensor",
}


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> Mesh:
  """Returns a mesh over all devices (or the given ones) with axes data, fsdp and tensor.

  Args:
    data, fsdp, tensor: sizes; one of them may be -1, "the rest".
    devices: devices to use; all by default.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [data, fsdp, tensor]
  known = int(np.prod([s for s in sizes if s != -1]))
  if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if min(sizes) < 1 or int(np.prod(sizes)) != len(devices):
    raise ValueError(
      f"mesh data={data} fsdp={fsdp} tensor={tensor} does not cover {len(devices)} devices; "
      "the sizes must multiply to the number of devices, and one of them may be -1"
    )
  return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


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
