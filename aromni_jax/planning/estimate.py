"""What a training step needs, reckoned from its configuration alone: memory, time, collectives.

Everything that has a shape is counted exactly. What the compiler decides (which temporaries live at
once, what it fuses) is set by the constants below, which were fitted to compilations of the 7B
configurations (docs/scale.md has both side by side).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from aromni_jax.cluster.hardware import GIB, Topology
from aromni_jax.models import sharding
from aromni_jax.models.attention import CONTEXT, choose
from aromni_jax.models.config import DecoderConfig
from aromni_jax.models.remat import REMAT
from aromni_jax.planning import sampling
from aromni_jax.planning.network import DCN, collective_seconds, torus_of
from aromni_jax.training import setup
from aromni_jax.training.config import TrainConfig

TABLE_SHAPE = (8192, 256)  # the released image codec's codes and their embeddings' dimensions

# Platform -> share of a chip's memory that a program gets: the runtime keeps the rest.
USABLE = {"tpu": 0.984, "gpu": 0.92}
# How many copies are alive at once. In a layer's backward pass: of its gathered kernels and their
# gradients, of its activations (more where chips share a row and sum its parts), and of those that
# it computes again; at the head: of a block of logits. Gradients are there twice while layers are
# looped over.
_KERNEL_COPIES, _KEPT_COPIES, _SHARED_COPIES, _AGAIN_COPIES = 2.0, 2.0, 4.0, 3.0
_LOGIT_COPIES, _GRADIENT_COPIES = 3.0, 2.0
_CODECS = "codecs, for samples while training"
_EMBEDDING_LANES = 128  # a TPU pads the last axis to this


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One array of parameters and how it is split.

  Attributes:
    name: dotted path in the state.
    shape: of the whole array.
    dtype: name of it, e.g. "float32".
    spec: mesh axes that each of its axes is split over, as `PartitionSpec` has them.
    local_bytes: bytes of the part that one chip holds.
  """

  name: str
  shape: tuple[int, ...]
  dtype: str
  spec: tuple[Any, ...]
  local_bytes: float


@dataclasses.dataclass(frozen=True)
class Traffic:
  """All collectives of one kind in a step.

  Attributes:
    what: name of the arrays that are moved.
    opcode: kind of collective, as HLO names it.
    count: number of these collectives in a step.
    nbytes: bytes of one of them, as `collective_seconds` counts.
    network: the network that limits them, `ICI` or `DCN`.
    seconds: time on the wire of all of them, one after another.
  """

  what: str
  opcode: str
  count: int
  nbytes: float
  network: str
  seconds: float


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What a training step needs on each chip.

  Attributes:
    topology: the chips.
    mesh: sizes of the mesh axes data, fsdp and tensor.
    parameters: every array of parameters.
    memory: name of a part -> bytes on a chip in a step.
    sampling: the same while samples are made; empty without `sample_every`.
    usable: bytes of a chip's memory that a program gets.
    largest_batch: rows of the largest step that fits, 0 if none does.
    traffic: the collectives of a step, by kind.
    compute: seconds per step of products.
    passes: seconds per step of everything that memory's bandwidth limits.
    waits: seconds per step of collectives that nothing hides.
    model_flops: FLOPs per step that the model needs, over all chips; what is computed again counts
      once.
    tokens: tokens per step, over all chips, padding included.
  """

  topology: Topology
  mesh: tuple[int, int, int]
  parameters: tuple[Parameter, ...]
  memory: dict[str, float]
  sampling: dict[str, float]
  usable: float
  largest_batch: int
  traffic: tuple[Traffic, ...]
  compute: float
  passes: float
  waits: float
  model_flops: float
  tokens: int

  @property
  def total_memory(self) -> float:
    """Bytes on a chip."""
    return sum(self.memory.values())

  @property
  def seconds(self) -> float:
    """Seconds per step: the roofline, a lower bound."""
    return self.compute + self.passes + self.waits

  @property
  def mfu(self) -> float:
    """Model FLOPs utilisation, a share of the chips' peak: an upper bound."""
    return self.mfu_of(self.seconds)

  def mfu_of(self, seconds: float) -> float:
    """Returns the model FLOPs utilisation of a step that takes so many seconds."""
    peak = self.topology.chip.peak_flops * self.topology.num_chips
    return self.model_flops / peak / seconds


def mesh_sizes(
  config: TrainConfig, devices: int, where: str, slices: int = 1
) -> tuple[int, int, int]:
  """Returns the sizes of the mesh axes over a number of devices.

  Args:
    config: the run.
    devices: number of devices.
    where: name of the place where they are, for the message.
    slices: number of slices or nodes that they are in.

  Raises:
    ValueError: if the mesh, the slices or the batch do not divide.
  """
  sizes = sharding.mesh_sizes(devices, **dataclasses.asdict(config.mesh))
  if sizes[0] % slices:
    raise ValueError(
      f"config.mesh.data is {sizes[0]}, no multiple of the {slices} slices or nodes of {where}; "
      f"only data crosses the network between them: --config.mesh.data={slices}"
    )
  setup.check_rows(config, sizes, where)
  return sizes


def abstract_mesh(config: TrainConfig, topology: Topology) -> AbstractMesh:
  """Returns the mesh over the chips of a topology, without devices.

  Raises:
    ValueError: if the mesh, the slices or the batch do not divide.
  """
  sizes = mesh_sizes(config, topology.num_chips, topology.name, topology.slices)
  return AbstractMesh(sizes, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def parameter_table(config: TrainConfig, mesh: AbstractMesh, table_shape: tuple[int, int]):
  """Returns the arrays of parameters, and the bytes of a chip's part of the optimiser's state."""
  state = setup.abstract_state(config, table_shape, mesh)

  def local(leaf) -> float:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

  rows = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
    name = ".".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)
    name = name.removesuffix(".value")
    spec = tuple(leaf.sharding.spec)
    rows.append(Parameter(name, leaf.shape, leaf.dtype.name, spec, local(leaf)))
  return tuple(rows), sum(map(local, jax.tree.leaves(state.opt_state)))


def _layer_params(model: DecoderConfig) -> float:
  """Returns the number of parameters of a layer; the final norm is shared by all."""
  return (model.num_params() - 2 * model.vocab_size * model.embed_dim) / model.num_layers


def kept_bytes(config: TrainConfig, tensor: int, platform: str) -> float:
  """Returns the bytes per token and layer that stay until the backward pass.

  Args:
    config: the run.
    tensor: chips that share a row.
    platform: of them, "cpu", "gpu" or "tpu".

  Raises:
    ValueError: if `model.attention` cannot run there.
  """
  m = config.model
  width = jnp.dtype(m.dtype).itemsize
  backend = choose(m.attention, config.data.sequence_length, m.head_dim, m.dtype, platform)
  heads, kv = m.num_heads * m.head_dim / tensor, m.num_kv_heads * m.head_dim / tensor
  sizes = {  # numbers of `width` bytes, by the names that `REMAT` has
    "qkv": heads + 2 * kv,
    CONTEXT: heads + backend.kept_floats * 4 / width * m.num_heads / tensor,
    "attention_out": m.embed_dim,
    "mlp_gate": m.mlp_dim / tensor,
    "mlp_up": m.mlp_dim / tensor,
    "mlp_out": m.embed_dim if m.norm_placement == "swin" else 0,
  }
  names = REMAT[m.remat_policy].keeps
  if names is None:
    everything = sum(sizes.values()) + 4 * m.embed_dim + 6 * heads + m.mlp_dim / tensor
    return width * (m.embed_dim + everything)
  return width * (m.embed_dim + sum(sizes[name] for name in names))


def memory(
  config: TrainConfig,
  topology: Topology,
  sizes: tuple[int, int, int],
  rows: int,
  state: Any,
  table: float,
) -> dict[str, float]:
  """Returns the bytes of each part on a chip.

  Args:
    config: the run.
    topology: the chips.
    sizes: sizes of the mesh axes data, fsdp and tensor.
    rows: rows of a micro-batch on a chip.
    state: what `parameter_table` gives.
    table: bytes of the whole codec's embeddings that the perceptual loss compares with.
  """
  parameters, optimizer = state
  m, (_, fsdp, tensor) = config.model, sizes
  width = jnp.dtype(m.dtype).itemsize
  tokens = rows * config.data.sequence_length
  own = sum(p.local_bytes for p in parameters)
  layer = _layer_params(m) / tensor * width
  platform = topology.chip.platform
  kept = kept_bytes(config, tensor, platform) * tokens
  block = config.loss.vocab_block or m.vocab_size
  lanes = max(m.embed_dim // fsdp, _EMBEDDING_LANES if platform == "tpu" else 1)
  embedding = tokens * fsdp * lanes * (width + 4) if fsdp > 1 else 0
  head = tokens * block / tensor * 4 * _LOGIT_COPIES + 2 * m.embed_dim * block / tensor * width
  head += 2 * tokens * m.embed_dim * 4
  all_named = _changed(config, {"model.remat_policy": "norms"})
  everything = max(kept, kept_bytes(all_named, tensor, platform) * tokens)
  copies = _SHARED_COPIES if tensor > 1 else _KEPT_COPIES
  backward = _KERNEL_COPIES * layer + copies * everything + _AGAIN_COPIES * (everything - kept)
  parts = {
    "parameters": own,
    "optimiser": optimizer,
    "gradients": own * (_GRADIENT_COPIES + (config.accumulate > 1)),
    "activations kept for the backward pass": kept * m.num_layers,
    "image codec's embeddings, split and gathered": table * (1 + 1 / fsdp),
    "working set of a layer, the head or the embedding": max(backward, head, embedding),
  }
  if config.sample_every:
    parts[_CODECS] = sampling.codec_bytes()
  return parts


def estimate(
  config: TrainConfig, topology: Topology, table_shape: tuple[int, int] = TABLE_SHAPE
) -> Estimate:
  """Returns what a training step needs on each chip of a topology.

  Args:
    config: the run.
    topology: the chips.
    table_shape: codes and dimensions of the image embeddings.

  Raises:
    ValueError: if mesh or batch do not divide.
  """
  mesh = abstract_mesh(config, topology)
  sizes = tuple(mesh.shape[axis] for axis in sharding.MESH_AXES)
  data, fsdp, tensor = sizes
  state = parameter_table(config, mesh, table_shape)
  rows = config.batch_size // (data * fsdp * config.accumulate)
  usable = USABLE[topology.chip.platform] * topology.chip.hbm_bytes

  table = 4.0 * math.prod(table_shape) if config.loss.perceptual_weight else 0.0

  def parts(rows: int) -> dict[str, float]:
    return memory(config, topology, sizes, rows, state, table)

  largest = 0
  while sum(parts(largest + 1).values()) <= usable:
    largest += 1
  m, length = config.model, config.data.sequence_length
  tokens = rows * length * config.accumulate  # of a chip's rows
  peak = topology.chip.peak_flops
  head = m.vocab_size * m.embed_dim
  weights = m.num_params() - head  # in products: the embedding is looked up
  attention = 2.0 * m.num_heads * m.head_dim * length  # FLOPs per token, forward, causal
  flops = 6.0 * weights + 3 * m.num_layers * attention
  again = _computed_again(m, attention)
  if 0 < config.loss.vocab_block < m.vocab_size:
    again += 2.0 * head
  array = rows * length * m.embed_dim * jnp.dtype(m.dtype).itemsize
  passes = REMAT[m.remat_policy].passes * m.num_layers * array * config.accumulate
  passes += 6 * sum(p.local_bytes for p in state[0])  # the optimiser reads and writes
  traffic = _traffic(config, topology, sizes, rows)
  # The first gather of a layer and the exchange of the embedding have nothing beside them.
  width = jnp.dtype(m.dtype).itemsize
  first = m.embed_dim * (m.num_heads * m.head_dim + m.mlp_dim) / tensor * width
  span = torus_of(topology, fsdp)
  _, waits = collective_seconds(topology, "all-gather", first, span)
  waits *= m.num_layers * config.accumulate
  waits += sum(t.seconds for t in traffic if t.what == "embedding rows" or t.network == DCN)
  return Estimate(
    topology,
    sizes,
    state[0],
    parts(rows),
    _while_sampling(config, parts(rows), sizes),
    usable,
    largest * data * fsdp * config.accumulate,
    traffic,
    tokens * (flops + again) / tensor / peak,
    passes / topology.chip.hbm_bandwidth,
    waits,
    config.batch_size * length * flops,
    config.batch_size * length,
  )


def _computed_again(m: DecoderConfig, attention: float) -> float:
  """Returns the FLOPs per token that the backward pass repeats of the layers: of the products
  whose results are not kept.

  Args:
    m: the model.
    attention: FLOPs per token of a layer's attention, forward.
  """
  queries, keys = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
  products = {
    "qkv": 2.0 * m.embed_dim * (queries + 2 * keys),
    CONTEXT: attention,
    "attention_out": 2.0 * queries * m.embed_dim,
    "mlp_gate": 2.0 * m.embed_dim * m.mlp_dim,
    "mlp_up": 2.0 * m.embed_dim * m.mlp_dim,
    "mlp_out": 2.0 * m.mlp_dim * m.embed_dim,
  }
  names = REMAT[m.remat_policy].keeps
  kept = products if names is None else names
  return m.num_layers * sum(flops for name, flops in products.items() if name not in kept)


def _traffic(
  config: TrainConfig, topology: Topology, sizes: tuple[int, int, int], rows: int
) -> tuple[Traffic, ...]:
  m, (data, fsdp, tensor) = config.model, sizes
  width = jnp.dtype(m.dtype).itemsize
  layer = _layer_params(m) / tensor * width
  head = m.vocab_size * m.embed_dim / tensor * width
  array = rows * config.data.sequence_length * m.embed_dim * width
  span = torus_of(topology, fsdp)
  within = data // topology.slices
  out = []

  def add(what, opcode, count, nbytes, dims, slices=1):
    if count and (math.prod(dims) > 1 or slices > 1):
      network, seconds = collective_seconds(topology, opcode, nbytes, dims, slices)
      times = count * config.accumulate
      out.append(Traffic(what, opcode, times, nbytes, network, times * seconds))

  # More than one torus axis: TPUs reduce all of the gradient and take their part of it.
  reduce = "all-reduce" if len(span) > 1 else "reduce-scatter"
  if fsdp > 1:
    add("kernels of a layer", "all-gather", 2 * m.num_layers, layer, span)
    add("head", "all-gather", 2, head, span)
    add("gradients of a layer", reduce, m.num_layers, layer, span)
    add("gradient of the head", reduce, 1, head, span)
    add("embedding rows", "all-to-all", 1, 3 * array, span)
  other = tuple(d for d in topology.shape if d not in span)[:1] if within > 1 else ()
  if data > 1:
    everything = (m.num_layers * layer + 2 * head) / fsdp
    add("gradients of copies", "all-reduce", 1, everything, other, topology.slices)
  if tensor > 1:
    inner = torus_of(topology, tensor)
    add("activations", "all-reduce", 4 * m.num_layers, array, inner)
  return tuple(out)


def _while_sampling(
  config: TrainConfig, step: dict[str, float], sizes: tuple[int, int, int]
) -> dict[str, float]:
  """Bytes of each part while samples are made: what a step leaves, and the engine's."""
  if not config.sample_every:
    return {}
  stays = {name: step[name] for name in ("parameters", "optimiser", _CODECS)}
  return stays | sampling.engine_memory(config.model, sizes)


def fits(estimated: Estimate) -> bool:
  """Whether the estimated memory is there, for steps and for samples."""
  return max(estimated.total_memory, sum(estimated.sampling.values())) <= estimated.usable


def check(config: TrainConfig, topology: Topology) -> Estimate:
  """Returns the estimate of a run that fits.

  Raises:
    ValueError: if mesh or batch do not divide, or the memory is not there, saying what would fit.
  """
  found = estimate(config, topology)
  require_fit(config, found)
  return found


def require_fit(config: TrainConfig, found: Estimate) -> None:
  """Raises ValueError if the memory of an estimate is not there, saying what would fit."""
  if fits(found):
    return
  topology = found.topology
  step_fits = found.total_memory <= found.usable
  needed, what = (found.sampling, "sampling") if step_fits else (found.memory, "the run")
  parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in needed.items())
  advice = (
    "Leave samples out: --config.sample_every=0" if step_fits else _advice(config, topology, found)
  )
  raise ValueError(
    f"{what} needs {sum(needed.values()) / GIB:.1f} GiB on each chip of {topology.name}, which has "
    f"{found.usable / GIB:.1f} ({parts}). {advice}"
  )


def _advice(config: TrainConfig, topology: Topology, found: Estimate) -> str:
  """What would make a configuration fit, the change that costs least first."""
  data, fsdp, _ = found.mesh
  options = []
  policies = list(REMAT)
  for policy in reversed(policies[: policies.index(config.model.remat_policy)]):
    options.append({"model.remat_policy": policy})
  if found.largest_batch:
    options.append({"batch_size": found.largest_batch})
  if config.batch_size // (data * fsdp * config.accumulate) > 1:
    rows = config.batch_size // (data * fsdp)
    options += [
      {"model.remat_policy": "full", "accumulate": n}
      for n in range(config.accumulate + 1, rows + 1)
      if rows % n == 0
    ]
  if data > topology.slices:
    options.append({"mesh.data": topology.slices, "mesh.fsdp": data * fsdp // topology.slices})
  for option in options:
    if fits(estimate(_changed(config, option), topology)):
      flags = " ".join(f"--config.{name}={value}" for name, value in option.items())
      return f"This fits: {flags}"
  return "No batch fits; take more chips or chips with more memory"


def _changed(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
  for name, value in changes.items():
    section, _, field = name.rpartition(".")
    if section:
      inner = dataclasses.replace(getattr(config, section), **{field: value})
      config = dataclasses.replace(config, **{section: inner})
    else:
      config = dataclasses.replace(config, **{field: value})
  return config
