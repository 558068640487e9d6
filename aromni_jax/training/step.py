"""One training step as a pure function of state and batch; `setup.build` compiles it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from aromni_jax.data.batch import Batch
from aromni_jax.models import sharding
from aromni_jax.tasks import TASKS
from aromni_jax.training import losses
from aromni_jax.training.terms import Forward, LossConfig, active
from aromni_jax.vocabulary import MODALITIES, Vocabulary

Array = jax.Array
Metrics = dict[str, Array]
Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a step changes.

  Attributes:
    step: int32[], steps done.
    params: groups of parameters: "decoder", an nnx.State, and those of the loss's terms, e.g.
      "projection", {"kernel": [D, E], "bias": [E]}.
    opt_state: of the optimizer, for the groups that are trained.
  """

  step: Array
  params: Params
  opt_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """What a step needs to know besides its inputs.

  Attributes:
    graphdef: structure of the decoder.
    vocabulary: id space.
    loss: losses and their variants.
    optimizer: transformation without the rate.
    trained: groups of parameters that are trained. The others have no gradient, no part in its norm
      and no state of the optimizer.
    accumulate: micro-batches of a step; the result equals the whole batch's.
  """

  graphdef: nnx.GraphDef
  vocabulary: Vocabulary
  loss: LossConfig
  optimizer: optax.GradientTransformation
  trained: tuple[str, ...]
  accumulate: int = 1


def train_step(
  state: TrainState, batch: Batch, table: Array | None, rate: Array, *, config: StepConfig
) -> tuple[TrainState, Metrics]:
  """Returns the next state and the metrics, float32 scalars.

  Args:
    state: before the step.
    batch: [B, T]; B is a multiple of `config.accumulate`.
    table: float32[codes, E], image embeddings of the perceptual loss; None without it.
    rate: float32[], learning rate.
    config: the rest.
  """
  trained = {name: state.params[name] for name in config.trained}
  frozen = {name: group for name, group in state.params.items() if name not in trained}
  grads, metrics = gradients(trained, frozen, batch, table, config)
  metrics["grad_norm"] = optax.global_norm(grads)
  updates, opt_state = config.optimizer.update(grads, state.opt_state, trained)
  trained = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), trained, updates)
  state = TrainState(state.step + 1, trained | frozen, opt_state)
  return state, metrics | {"learning_rate": rate}


def gradients(
  trained: Params, frozen: Params, batch: Batch, table: Array | None, config: StepConfig
) -> tuple[Params, Metrics]:
  """Returns the gradient of the total loss in the trained parameters, and the metrics.

  Denominators are those of the whole batch, so micro-batches with unequal numbers of targets sum
  to the gradient of one big batch.
  """
  counts = denominators(batch, config)

  def loss_fn(trained, part):
    sums = loss_sums(trained | frozen, part, table, config)
    return total_loss(sums, counts, config.loss), sums

  grad_fn = jax.grad(loss_fn, has_aux=True)
  if config.accumulate == 1:
    grads, sums = grad_fn(trained, batch)
  else:
    parts = jax.tree.map(lambda x: _micro_batches(x, config.accumulate), batch)

    def body(carry, part):
      return jax.tree.map(jnp.add, carry, grad_fn(trained, part)), None

    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      jax.eval_shape(grad_fn, trained, jax.tree.map(lambda x: x[0], parts)),
    )
    (grads, sums), _ = jax.lax.scan(body, zeros, parts)
  return grads, summarise(sums, counts, config.loss)


def _micro_batches(x: Array, count: int) -> Array:
  """[B, T] -> [count, B / count, T]; rows stay on their devices."""
  x = x.reshape(len(x) // count, count, *x.shape[1:]).swapaxes(0, 1)
  return sharding.shard(x, None, "act_batch", "act_length")


def evaluate(
  params: Params, batch: Batch, table: Array | None, config: StepConfig
) -> tuple[Metrics, Metrics]:
  """Returns the sums behind the metrics of a batch and their denominators, for `summarise`."""
  return loss_sums(params, batch, table, config), denominators(batch, config)


def denominators(batch: Batch, config: StepConfig) -> Metrics:
  """Returns what the sums of a whole batch are divided by, per term."""
  loss, vocabulary = config.loss, config.vocabulary
  return {term.name: term.count(batch, vocabulary, loss) for term in active(loss)}


def loss_sums(params: Params, batch: Batch, table: Array | None, config: StepConfig) -> Metrics:
  """Returns the sums of all losses over a (micro-)batch, in total, per modality and per task."""
  decoder = nnx.merge(config.graphdef, params["decoder"])
  hidden = decoder(batch.tokens, batch.positions, batch.segment_ids)  # [B, T, D]
  nll, log_z = losses.token_losses(  # [B, T]
    hidden, decoder.head[...], batch.targets, config.loss.vocab_block
  )
  forward = Forward(params, batch, hidden, nll, log_z, table, config.vocabulary, config.loss)
  sums = {term.name: term.total(forward) for term in active(config.loss)}
  nll = jax.lax.stop_gradient(nll) * batch.loss_weights
  modality = config.vocabulary.modality_of(batch.targets)
  for name, groups, ids in (("modality", MODALITIES, modality), ("task", TASKS, batch.task_ids)):
    member = jax.nn.one_hot(ids, len(groups))  # [B, T, groups]
    sums[f"{name}_sum"] = jnp.einsum("bt,btg->g", nll, member)
    sums[f"{name}_count"] = jnp.einsum("bt,btg->g", batch.loss_weights, member)
  sums["tokens"] = jnp.sum(batch.segment_ids > 0, dtype=jnp.float32)
  return sums


def total_loss(sums: Metrics, counts: Metrics, config: LossConfig) -> Array:
  """Returns the sum over the terms of weight * sum / count."""
  return sum(
    term.weight(config) * losses.ratio(sums[term.name], counts[term.name])
    for term in active(config)
  )


def summarise(sums: Metrics, counts: Metrics, config: LossConfig) -> Metrics:
  """Returns means: loss, loss/<term>, nll per modality and per task (nats per token, means weighted
  by `loss_weights`; 0 where the batch has none), tokens."""
  out = {"loss": total_loss(sums, counts, config), "tokens": sums["tokens"]}
  for term in active(config):
    out[f"loss/{term.name}"] = losses.ratio(sums[term.name], counts[term.name])
  for name, groups in (("modality", MODALITIES), ("task", TASKS)):
    means = losses.ratio(sums[f"{name}_sum"], sums[f"{name}_count"])
    out |= {f"{name}/{group}": means[i] for i, group in enumerate(groups)}
  return out
