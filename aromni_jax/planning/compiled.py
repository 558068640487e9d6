"""The training step compiled for chips that are not here.

libtpu from the package index compiles for a named TPU topology on any machine. What comes back is
the compiler's own memory and its optimised program (`planning/hlo.py` reads it).
"""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from aromni_jax.cluster.hardware import Topology
from aromni_jax.cluster.xla_flags import flags
from aromni_jax.models import sharding
from aromni_jax.planning import hlo
from aromni_jax.planning.estimate import TABLE_SHAPE
from aromni_jax.planning.network import collective_seconds
from aromni_jax.training import setup
from aromni_jax.training.config import TrainConfig
from aromni_jax.vocabulary import PRESETS, Vocabulary, get_vocabulary


def topology_devices(topology: Topology) -> list[Any]:
  """Returns the devices of a TPU topology, to be compiled for.

  Raises:
    ImportError: if libtpu is not installed.
    ValueError: if the compiler does not know the topology.
  """
  # Ask no metadata server what this machine is; it is none of those.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is used, so none is locked
  from jax.experimental import topologies

  options: dict[str, Any] = {}
  if topology.slices > 1:
    options["num_slices"] = topology.slices
  if topology.chips_per_slice == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)
  try:
    description = topologies.get_topology_desc(topology.slice_name, platform="tpu", **options)
  except Exception as e:
    raise ValueError(f"libtpu does not compile for {topology.name}: {e}") from e
  return description.devices


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of a training step.

  Attributes:
    memory: name of a part (what stays: state and batch; temporaries) -> bytes on a chip.
    cost: the roofline of its program on one chip.
    text: the optimised program, as HLO.
    seconds: time that compiling took.
  """

  memory: dict[str, int]
  cost: hlo.Cost
  text: str
  seconds: float


def compile_step(config: TrainConfig, topology: Topology) -> Compiled:
  """Returns the training step of a configuration, compiled for a TPU topology.

  Args:
    config: the run.
    topology: the chips that are compiled for.

  Raises:
    ImportError, ValueError: see `topology_devices`; or if the compiler finds no room, with its
      words.
  """
  began = time.monotonic()
  mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh), devices=topology_devices(topology))
  lowered = setup.build(config, vocabulary_of(config), TABLE_SHAPE, mesh).lower()
  options = {flag.name: flag.value for flag in flags("tpu", topology.chip.name)}
  try:
    compiled = lowered.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as e:
    raise ValueError(f"the TPU compiler refuses the step for {topology.name}: {e}") from e
  analysis = compiled.memory_analysis()
  text = compiled.as_text()
  cost = hlo.cost(
    hlo.Module(text), topology.chip.peak_flops, topology.chip.hbm_bandwidth, wire(topology, mesh)
  )
  memory = {
    "state and batch": analysis.argument_size_in_bytes,
    "results that take no argument's place": analysis.output_size_in_bytes
    - analysis.alias_size_in_bytes,
    "temporaries": analysis.temp_size_in_bytes,
    "program": analysis.generated_code_size_in_bytes,
  }
  return Compiled(memory, cost, text, time.monotonic() - began)


def wire(topology: Topology, mesh: jax.sharding.Mesh) -> Callable[[hlo.Collective], tuple]:
  """Returns the function that `hlo.cost` asks for the network and the seconds of a collective.

  Args:
    topology: the chips.
    mesh: mesh over them; numbers in the program count its devices in order.
  """
  devices = mesh.devices.reshape(-1)

  def seconds(collective: hlo.Collective) -> tuple[str, float]:
    if collective.group == hlo.ACROSS:
      return collective_seconds(topology, collective.opcode, collective.nbytes, (), topology.slices)
    group = [devices[i] for i in collective.group] or list(devices)
    slices = len({getattr(d, "slice_index", 0) for d in group})
    coords = np.array([d.coords for d in group])  # [devices, axes of the torus]
    dims = tuple(n for n in (len(set(axis)) for axis in coords.T) if n > 1)
    return collective_seconds(topology, collective.opcode, collective.nbytes, dims, slices)

  return seconds


def vocabulary_of(config: TrainConfig) -> Vocabulary:
  """Returns the vocabulary preset of a model's size.

  Raises:
    ValueError: if there is none.
  """
  for name in PRESETS:
    if get_vocabulary(name).size == config.model.vocab_size:
      return get_vocabulary(name)
  raise ValueError(f"config.model.vocab_size {config.model.vocab_size} is of no known vocabulary")
