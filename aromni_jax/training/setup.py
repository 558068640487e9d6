"""The one place where a training step is made: the loop, plans, tests and benchmarks ask here."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from aromni_jax.data.batch import Batch
from aromni_jax.data.pipeline import empty_row
from aromni_jax.models import decoder as decoder_lib
from aromni_jax.models import sharding
from aromni_jax.training import step as step_lib
from aromni_jax.training.config import TrainConfig
from aromni_jax.training.optimizer import make_optimizer
from aromni_jax.training.step import Metrics, Params, StepConfig, TrainState
from aromni_jax.training.terms import active
from aromni_jax.vocabulary import MODALITIES, Vocabulary

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Setup:
  """A training step for one mesh, and what it works on.

  Attributes:
    mesh: of the devices.
    step_config: structure, losses, optimizer and trained groups.
    state: shapes, dtypes and shardings of the state.
    batch, table: the same of a batch [B, T], and of the image embeddings [codes, E] of the
      perceptual loss, None without it.
    init: (key, codebooks) -> the state at step 0, born sharded; see `init_state`.
    step: (state, batch, table, rate) -> (state, metrics), compiled once; the state is donated.
    evaluate: (params, batch, table) -> sums and denominators, for `step.summarise`.
  """

  mesh: Mesh
  step_config: StepConfig
  state: TrainState
  batch: Batch
  table: jax.ShapeDtypeStruct | None
  init: Callable[[Array, Mapping[str, np.ndarray]], TrainState]
  step: Callable[..., tuple[TrainState, Metrics]]
  evaluate: Callable[..., tuple[Metrics, Metrics]]

  def decoder(self, params: Params) -> nnx.Module:
    """Returns the decoder of the state's parameters."""
    return nnx.merge(self.step_config.graphdef, params["decoder"])

  def lower(self) -> jax.stages.Lowered:
    """Returns the step, lowered for the mesh's devices, which need not be there."""
    with jax.set_mesh(self.mesh):
      rate = jax.ShapeDtypeStruct((), jnp.float32)
      return self.step.__wrapped__.lower(self.state, self.batch, self.table, rate)


def build(
  config: TrainConfig, vocabulary: Vocabulary, table_shape: tuple[int, int] | None, mesh: Mesh
) -> Setup:
  """Returns a run's training step. Nothing is computed yet, no devices are needed.

  Args:
    config: the run.
    vocabulary: of the model.
    table_shape: codes and dimensions E of the image embeddings; unused, and may be None, without
      the perceptual loss.
    mesh: over the devices.

  Raises:
    ValueError: if parameters or batch cannot be divided over the mesh.
  """
  table = None
  if any(term.init for term in active(config.loss)):
    table = _shape(table_shape, jnp.float32, sharding.table_sharding(mesh))
  optimizer = make_optimizer(config.optimizer)
  decoder = nnx.eval_shape(lambda: decoder_lib.Decoder(config.model, rngs=nnx.Rngs(0)))
  state = abstract_state(config, table_shape, mesh)
  shardings = jax.tree.map(lambda x: x.sharding, state)
  rows, everywhere = sharding.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
  row = Batch(**empty_row(config.data.sequence_length, padding=0))
  step_config = StepConfig(
    nnx.graphdef(decoder),
    vocabulary,
    config.loss,
    optimizer,
    trained_groups(config),
    config.accumulate,
  )

  def step(state, batch, table, rate):
    return step_lib.train_step(state, batch, table, rate, config=step_config)

  def evaluate(params, batch, table):
    return step_lib.evaluate(params, batch, table, step_config)

  def init(key, codebooks):
    return init_state(config, vocabulary, optimizer, table_shape, key, codebooks)

  return Setup(
    mesh=mesh,
    step_config=step_config,
    state=state,
    batch=jax.tree.map(lambda x: _shape((config.batch_size, *x.shape), x.dtype, rows), row),
    table=table,
    init=_on(mesh, jax.jit(init, out_shardings=shardings)),
    # Pinned shardings: without those of the results it would be compiled twice.
    step=_on(
      mesh,
      jax.jit(
        step,
        in_shardings=(shardings, rows, table and table.sharding, everywhere),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
      ),
    ),
    evaluate=_on(mesh, jax.jit(evaluate)),
  )


def abstract_state(
  config: TrainConfig, table_shape: tuple[int, int] | None, mesh: Mesh | AbstractMesh
) -> TrainState:
  """Returns the shapes, dtypes and shardings of a run's state.

  Args:
    config: the run.
    table_shape: as in `build`.
    mesh: over devices, or over none.

  Raises:
    ValueError: if a parameter cannot be divided over the mesh, naming it.
  """
  optimizer = make_optimizer(config.optimizer)
  state = jax.eval_shape(
    lambda: init_state(config, None, optimizer, table_shape, jax.random.key(0), {})
  )
  shardings = sharding.state_shardings(state, mesh)
  return jax.tree.map(lambda x, placement: _shape(x.shape, x.dtype, placement), state, shardings)


def check_rows(config: TrainConfig, sizes: tuple[int, int, int], where: str) -> None:
  """Raises ValueError if the rows of a step cannot be divided over micro-batches and devices.

  Args:
    config: the run.
    sizes: of the mesh axes data, fsdp and tensor.
    where: the mesh is, for the message.
  """
  data, fsdp, _ = sizes
  shards = data * fsdp * config.accumulate
  if config.batch_size % shards:
    below = config.batch_size // shards * shards
    raise ValueError(
      f"config.batch_size {config.batch_size} is no multiple of {shards}: config.mesh.data {data} "
      f"x config.mesh.fsdp {fsdp} x config.accumulate {config.accumulate} on {where}; take "
      f"{f'{below} or ' if below else ''}{below + shards}"
    )


def trained_groups(config: TrainConfig) -> tuple[str, ...]:
  """Returns the groups of parameters that a run trains."""
  terms = active(config.loss)
  return ("decoder", *(t.group for t in terms if t.group and t.trained(config.loss)))


def init_state(
  config: TrainConfig,
  vocabulary: Vocabulary | None,
  optimizer: optax.GradientTransformation,
  table_shape: tuple[int, int] | None,
  key: Array,
  codebooks: Mapping[str, Array],
) -> TrainState:
  """Returns the state at step 0; call it under jit to have it born sharded.

  Args:
    config: the run.
    vocabulary: of the model; for `codebooks` only.
    optimizer: transformation without the rate.
    table_shape: codes and dimensions of the image embeddings, for the perceptual loss only.
    key: randomness.
    codebooks: modality -> float32[codes, E], vectors that ids of its codes begin as, see
      `embed_codebooks`; empty to begin at random.
  """
  decoder_key, term_key = jax.random.split(key)
  _, decoder = decoder_lib.init_params(config.model, decoder_key)
  params = {"decoder": decoder}
  for term in active(config.loss):
    if term.init:
      params[term.group] = term.init(config.model, table_shape[1], term_key)
  if codebooks:
    embed_codebooks(decoder, codebooks, vocabulary, config, jax.random.fold_in(key, 1))
  trained = {name: params[name] for name in trained_groups(config)}
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(trained))


def embed_codebooks(
  decoder: nnx.State,
  codebooks: Mapping[str, Array],
  vocabulary: Vocabulary,
  config: TrainConfig,
  key: Array,
) -> None:
  """Lets embeddings and head columns of codes begin as their vectors.

  A codec's vectors are standardised and projected at random, so that ids of similar codes start
  alike and what is learned of one holds for its neighbours.

  Args:
    decoder: parameters at step 0, which are changed.
    codebooks: modality -> float32[codes, E], the codes' vectors.
    vocabulary: where the ids of a modality are.
    config: standard deviations of the embeddings (`code_embedding_std`) and of the head's columns
      (`model.init_std`).
    key: randomness of the projections.
  """
  embedding, head = decoder["embedding"], decoder["head"]
  width = config.model.embed_dim
  for modality in MODALITIES:
    if modality not in codebooks:
      continue
    ids, table = getattr(vocabulary, modality), codebooks[modality]
    table = (table - jnp.mean(table, axis=0)) / jnp.std(table) / table.shape[1] ** 0.5
    for variable, scale in ((embedding, config.code_embedding_std), (head, config.model.init_std)):
      key, projection_key = jax.random.split(key)
      rows = scale * table @ jax.random.normal(projection_key, (table.shape[1], width))
      value = variable.get_value()
      if variable is embedding:
        value = value.at[ids.start : ids.stop].add(rows.astype(value.dtype))
      else:
        value = value.at[:, ids.start : ids.stop].add(rows.T.astype(value.dtype))
      variable.set_value(value)


def _on(mesh: Mesh, function: Callable) -> Callable:
  """Returns a jitted function that is called with the mesh set."""

  def call(*args):
    with jax.set_mesh(mesh):
      return function(*args)

  call.__wrapped__ = function
  return call


def _shape(shape: tuple[int, ...], dtype: Any, placement: NamedSharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=placement)
