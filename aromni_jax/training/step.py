"""One training step as a pure function of state and batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aromni_jax.data.batch import Batch
from aromni_jax.models import decoder as decoder_lib
from aromni_jax.models import sharding
from aromni_jax.models.config import DecoderConfig
from aromni_jax.tasks import TASKS, get_task
from aromni_jax.training import losses
from aromni_jax.training.losses import LossConfig
from aromni_jax.vocabulary import MODALITIES, Vocabulary

Array = jax.Array
Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a step changes.

  Attributes:
    step: int32[], steps done.
    params: {"decoder": nnx.State, "projection": {"kernel": [D, E], "bias": [E]}}.
    opt_state: of the optimizer.
  """

  step: Array
  params: dict[str, Any]
  opt_state: optax.OptState


def embed_codebooks(
  state: TrainState, codebooks: dict[range, Array], std: float, head_std: float, key: Array
) -> TrainState:
  """Returns the state with embeddings and head columns of codes that start as their vectors.

  A codec's vectors are standardised and projected at random, so that ids of similar codes start
  alike and what is learned of one holds for its neighbours.

  Args:
    state: at step 0.
    codebooks: id range -> float32[len(range), E], the codes' vectors.
    std: standard deviation of the embeddings.
    head_std: standard deviation of the head's columns.
    key: randomness of the projections.
  """
  decoder = state.params["decoder"]
  embedding, head = decoder["embedding"], decoder["head"]
  for ids, table in codebooks.items():
    table = (table - jnp.mean(table, axis=0)) / jnp.std(table) / table.shape[1] ** 0.5
    for variable, scale in ((embedding, std), (head, head_std)):
      key, projection_key = jax.random.split(key)
      width = embedding.get_value().shape[1]
      rows = scale * table @ jax.random.normal(projection_key, (table.shape[1], width))
      value = variable.get_value()
      if variable is embedding:
        value = value.at[ids.start : ids.stop].add(rows.astype(value.dtype))
      else:
        value = value.at[:, ids.start : ids.stop].add(rows.T.astype(value.dtype))
      variable.set_value(value)
  return state


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """What a step needs to know besides its inputs.

  Attributes:
    graphdef: structure of the decoder.
    vocabulary: id space.
    loss: losses and their variants.
    optimizer: transformation without the rate.
    accumulate: micro-batches of a step; the result equals the whole batch's.
  """

  graphdef: nnx.GraphDef
  vocabulary: Vocabulary
  loss: LossConfig
  optimizer: optax.GradientTransformation
  accumulate: int = 1


def init_state(
  model: DecoderConfig, optimizer: optax.GradientTransformation, table_dim: int, key: Array
) -> TrainState:
  """Returns the state at step 0; call it under jit to have it born sharded."""
  decoder_key, projection_key = jax.random.split(key)
  _, decoder = decoder_lib.init_params(model, decoder_key)
  bound = model.embed_dim**-0.5  # PyTorch's default of a linear layer, as the released code has it

  def uniform(key, shape, *names):
    init = sharding.weight(
      lambda *args: jax.random.uniform(*args, minval=-bound, maxval=bound), *names
    )
    return nnx.Param(init(key, shape))

  kernel_key, bias_key = jax.random.split(projection_key)
  projection = {
    "kernel": uniform(kernel_key, (model.embed_dim, table_dim), "embed", "projection"),
    "bias": uniform(bias_key, (table_dim,), "projection"),
  }
  params = {"decoder": decoder, "projection": projection}
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def train_step(
  state: TrainState, batch: Batch, table: Array, rate: Array, *, config: StepConfig
) -> tuple[TrainState, Metrics]:
  """Returns the next state and the metrics, float32 scalars.

  Args:
    state: before the step.
    batch: [B, T]; B is a multiple of `config.accumulate`.
    table: float32[codes, E], image embeddings of the perceptual loss.
    rate: float32[], learning rate.
    config: the rest.
  """
  grads, metrics = gradients(state.params, batch, table, config)
  metrics["grad_norm"] = optax.global_norm(grads)
  updates, opt_state = config.optimizer.update(grads, state.opt_state, state.params)
  if not config.loss.train_projection:
    updates["projection"] = jax.tree.map(jnp.zeros_like, updates["projection"])
  params = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), state.params, updates)
  return TrainState(state.step + 1, params, opt_state), metrics | {"learning_rate": rate}


def gradients(
  params: dict[str, Any], batch: Batch, table: Array, config: StepConfig
) -> tuple[dict[str, Any], Metrics]:
  """Returns the gradient of the total loss and the metrics.

  Denominators are those of the whole batch, so micro-batches with unequal numbers of targets sum
  to the gradient of one big batch.
  """
  counts = denominators(batch, config)

  def loss_fn(params, part):
    sums = loss_sums(params, part, table, config)
    return total_loss(sums, counts, config.loss), sums

  grad_fn = jax.grad(loss_fn, has_aux=True)
  if config.accumulate == 1:
    grads, sums = grad_fn(params, batch)
  else:
    parts = jax.tree.map(lambda x: _micro_batches(x, config.accumulate), batch)

    def body(carry, part):
      return jax.tree.map(jnp.add, carry, grad_fn(params, part)), None

    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], parts)),
    )
    (grads, sums), _ = jax.lax.scan(body, zeros, parts)
  return grads, summarise(sums, counts, config.loss)


def _micro_batches(x: Array, count: int) -> Array:
  """[B, T] -> [count, B / count, T]; rows stay on their devices."""
  x = x.reshape(len(x) // count, count, *x.shape[1:]).swapaxes(0, 1)
  return sharding.shard(x, None, "act_batch", "act_length")


def evaluate(params: dict[str, Any], batch: Batch, table: Array, config: StepConfig) -> Metrics:
  """Returns the sums behind the metrics of a batch, for `summarise`; no gradients."""
  return loss_sums(params, batch, table, config), denominators(batch, config)


def perceptual_mask(batch: Batch, config: StepConfig) -> tuple[Array, Array]:
  """Returns the image codes int32[B, T] paired with each state, and bool[B, T] where they are.

  Only codes that the next-token loss counts as targets are: with a prompt weight of 0, pictures of
  prompts are left out, as in the released fine-tuning.
  """
  loss, vocabulary = config.loss, config.vocabulary
  counted = batch.loss_weights > 0  # the targets; the weight of a token stands one position before
  if loss.perceptual_pairing == "predicting":
    ids = batch.targets
  else:
    ids, counted = batch.tokens, jnp.pad(counted[:, :-1], ((0, 0), (1, 0)))
  mask = counted & (ids >= vocabulary.image.start) & (ids < vocabulary.image.stop)
  if loss.perceptual_tasks:
    allowed = jnp.array([get_task(task).id for task in loss.perceptual_tasks])
    mask &= jnp.isin(batch.task_ids, allowed)
  return ids - vocabulary.image.start, mask


def denominators(batch: Batch, config: StepConfig) -> Metrics:
  """Returns what the sums of a whole batch are divided by."""
  weighted = batch.loss_weights if config.loss.normaliser == "weights" else batch.loss_weights > 0
  _, mask = perceptual_mask(batch, config)
  return {
    "next_token": jnp.sum(weighted, dtype=jnp.float32),
    "perceptual": jnp.sum(mask, dtype=jnp.float32),
  }


def loss_sums(params, batch: Batch, table: Array, config: StepConfig) -> Metrics:
  """Returns the sums of all losses over a (micro-)batch, in total, per modality and per task."""
  decoder = nnx.merge(config.graphdef, params["decoder"])
  hidden = decoder(batch.tokens, batch.positions, batch.segment_ids)
  nll, log_z = losses.token_losses(
    hidden, decoder.head[...], batch.targets, config.loss.vocab_block
  )
  sums = {"next_token": jnp.sum(batch.loss_weights * nll)}
  sums["z_loss"], _ = losses.z_loss(log_z, batch.loss_weights)
  if config.loss.perceptual_weight:
    codes, mask = perceptual_mask(batch, config)
    sums["perceptual"], _ = losses.perceptual(
      hidden, params["projection"], table, codes, mask, config.loss.perceptual_distance
    )
  nll = jax.lax.stop_gradient(nll) * batch.loss_weights
  modality = config.vocabulary.modality_of(batch.targets)
  for name, groups, ids in (("modality", MODALITIES, modality), ("task", TASKS, batch.task_ids)):
    member = jax.nn.one_hot(ids, len(groups))
    sums[f"{name}_sum"] = jnp.einsum("bt,btg->g", nll, member)
    sums[f"{name}_count"] = jnp.einsum("bt,btg->g", batch.loss_weights, member)
  sums["tokens"] = jnp.sum(batch.segment_ids > 0, dtype=jnp.float32)
  return sums


def total_loss(sums: Metrics, counts: Metrics, config: LossConfig) -> Array:
  """Returns next token + lambda * perceptual + z-loss."""
  total = losses.ratio(sums["next_token"], counts["next_token"])
  if config.z_loss_weight:
    total += config.z_loss_weight * losses.ratio(sums["z_loss"], counts["next_token"])
  if config.perceptual_weight:
    perceptual = losses.ratio(sums["perceptual"], counts["perceptual"])
    total += config.perceptual_weight * perceptual
  return total


def summarise(sums: Metrics, counts: Metrics, config: LossConfig) -> Metrics:
  """Returns means: loss, loss/next_token, loss/perceptual, nll per modality and per task (nats per
  token, means weighted by `loss_weights`; 0 where the batch has none), tokens."""
  out = {
    "loss": total_loss(sums, counts, config),
    "loss/next_token": losses.ratio(sums["next_token"], counts["next_token"]),
    "tokens": sums["tokens"],
  }
  if config.perceptual_weight:
    out["loss/perceptual"] = losses.ratio(sums["perceptual"], counts["perceptual"])
  for name, groups in (("modality", MODALITIES), ("task", TASKS)):
    means = losses.ratio(sums[f"{name}_sum"], sums[f"{name}_count"])
    out |= {f"{name}/{group}": means[i] for i, group in enumerate(groups)}
  return out


def make_train_step(config: StepConfig, mesh: Mesh, shardings: TrainState) -> Callable:
  """Returns the jitted step with pinned shardings and donated state: compiled once."""
  replicated = NamedSharding(mesh, PartitionSpec())
  rows, table = sharding.batch_sharding(mesh), sharding.table_sharding(mesh)

  def step(state, batch, table, rate):
    return train_step(state, batch, table, rate, config=config)

  return jax.jit(
    step,
    in_shardings=(shardings, rows, table, replicated),
    out_shardings=(shardings, replicated),
    donate_argnums=0,
  )
