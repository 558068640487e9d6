"""The training step compiled for chips that are not here.

libtpu from the package index compiles for a named TPU topology on any machine, and XLA for a GPU
target likewise from its description (`jax.experimental.topologies`). What comes back is the
compiler's own memory and its optimised program (`planning/hlo.py` reads it).
"""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from aromni_jax import sharding, train_step
from aromni_jax.config import TrainConfig
from aromni_jax.data.batch import Batch
from aromni_jax.hardware import Topology
from aromni_jax.models import decoder as decoder_lib
from aromni_jax.optimizer import make_optimizer
from aromni_jax.vocabulary import Vocabulary


def topology_devices(topology: Topology) -> list[Any]:
  """Returns the devices of a TPU topology, to be compiled for.

  Raises:
    ImportError: if libtpu is not installed.
    ValueError: if the compiler does not know the topology.
  """
  # Ask no metadata server what this machine is; it is none of those.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
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


def lower_step(
  config: TrainConfig, vocabulary: Vocabulary, table_shape: tuple[int, int], mesh: jax.sharding.Mesh
) -> jax.stages.Lowered:
  """Returns the training step, lowered for the devices of a mesh.

  Args:
    config: the run.
    vocabulary: of the model.
    table_shape: codes and dimensions of the image embeddings.
    mesh: over the devices that are compiled for.
  """
  optimizer = make_optimizer(config.optimizer)
  with jax.set_mesh(mesh):
    decoder = nnx.eval_shape(lambda: decoder_lib.Decoder(config.model, rngs=nnx.Rngs(0)))
    step_config = train_step.StepConfig(
      nnx.graphdef(decoder), vocabulary, config.loss, optimizer, config.accumulate
    )
    state = jax.eval_shape(
      lambda: train_step.init_state(config.model, optimizer, table_shape[1], jax.random.key(0))
    )
    shardings = sharding.state_shardings(state, mesh)
    step = train_step.make_train_step(step_config, mesh, shardings)
    shape = (config.batch_size, config.data.sequence_length)
    batch = Batch(
      **{
        f.name: jax.ShapeDtypeStruct(shape, jnp.float32 if f.name == "loss_weights" else jnp.int32)
        for f in dataclasses.fields(Batch)
      }
    )
    table = jax.ShapeDtypeStruct(table_shape, jnp.float32)
    return step.lower(state, batch, table, jax.ShapeDtypeStruct((), jnp.float32))
