"""Training of a codec: one loop for pictures and for speech.

Everything about a step is a function of (seed, step): data, revival of codes, learning rate. A run
that is stopped goes on from its last checkpoint as if it had never stopped.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx

from aromni_jax.codecs import vq
from aromni_jax.models import params as codec_params

Array = jax.Array
Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class CodecTrainingConfig:
  """How a codec is trained.

  Attributes:
    num_steps: optimiser steps.
    batch_size: pictures or clips per step.
    learning_rate: peak rate of AdamW; linear warm-up, then cosine to zero.
    warmup_steps: steps of the warm-up; half of all at most.
    quantise_after: steps before the decoder sees codes instead of the encoder's own vectors.
    commitment: weight that pulls the encoder's vectors to their codes.
    codebook_decay: share of the codebook averages kept at each step.
    dead_below: average uses per step under which a code is revived.
    decoder_only: whether encoder and codebook stay as they are, so that codes keep their meaning.
    seed: seed of the parameters and the data.
    log_every: steps between progress lines.
    eval_every: steps between measurements on held-out data.
    checkpoint_every: steps between checkpoints.
  """

  num_steps: int = 4000
  batch_size: int = 8
  learning_rate: float = 2e-3
  warmup_steps: int = 50
  quantise_after: int = 150
  commitment: float = 0.25
  codebook_decay: float = 0.98
  dead_below: float = 0.01
  decoder_only: bool = False
  seed: int = 0
  log_every: int = 25
  eval_every: int = 250
  checkpoint_every: int = 250


@dataclasses.dataclass(frozen=True)
class CodecTask:
  """What one kind of codec brings to the loop.

  Attributes:
    make: builds the codec, which has `latents(input)` and `render(vectors)`, from `rngs`.
    codebook: the codebook variable of a codec.
    prepare: stored batch (a pytree with uint8 pictures or int16 sound) -> input of the codec.
    losses: (output, input) -> metrics with the reconstruction's "loss".
    regularise: (codec, latents, stored batch) -> metrics; "regular" is added to the loss.
    exchange: (quantised vectors, stored batch) -> the vectors that the decoder sees.
    batch_at: the stored batch of a step; a function of the step alone.
    measure: codec -> figures on held-out data for the progress lines.
  """

  make: Callable[[nnx.Rngs], nnx.Module]
  codebook: Callable[[nnx.Module], nnx.Param]
  prepare: Callable[[Array], Array]
  losses: Callable[[Array, Array], Metrics]
  batch_at: Callable[[int], Any]
  measure: Callable[[nnx.Module], dict[str, float]]
  regularise: Callable[[nnx.Module, Array, Any], Metrics] = lambda codec, z, batch: {}
  exchange: Callable[[Array, Any], Array] = lambda z, batch: z


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodecState:
  """Everything that a step changes. The codec's own codebook is unused: `codebook` replaces it."""

  step: Array
  params: nnx.State
  opt_state: optax.OptState
  codebook: vq.EmaCodebook


def make_optimizer(config: CodecTrainingConfig) -> optax.GradientTransformation:
  """Returns AdamW with warm-up and cosine decay, gradients clipped to norm 1.

  What has no gradient does not move: nothing decays if the decoder alone is trained.
  """
  warmup = min(config.warmup_steps, config.num_steps // 2)
  schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, config.num_steps)
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=0.0 if config.decoder_only else 1e-4),
  )


def init_state(
  task: CodecTask, config: CodecTrainingConfig, start: nnx.Module | None = None
) -> tuple[nnx.GraphDef, CodecState]:
  """Returns the structure of the codec and the state at step 0, random or that of `start`."""
  graphdef, params = codec_params.init(task.make, config.seed)
  shape = task.codebook(nnx.eval_shape(lambda: task.make(nnx.Rngs(0)))).shape
  codebook = vq.init_codebook(jax.random.key(config.seed), *shape)
  if start is not None:
    trained = nnx.merge(graphdef, params)
    nnx.update(trained, nnx.state(start))  # what helps in training alone stays random
    # Copies, since the training gives its buffers away.
    params, embedding = jax.tree.map(jnp.copy, nnx.state(trained)), task.codebook(start)[...]
    codebook = vq.EmaCodebook(jnp.copy(embedding), jnp.ones(len(embedding)), jnp.copy(embedding))
  opt_state = jax.jit(make_optimizer(config).init)(params)
  return graphdef, CodecState(jnp.zeros((), jnp.int32), params, opt_state, codebook)


def train_step(
  state: CodecState,
  batch: Any,
  *,
  graphdef: nnx.GraphDef,
  task: CodecTask,
  config: CodecTrainingConfig,
) -> tuple[CodecState, Metrics]:
  """Returns the state and the metrics after one step on a stored batch."""
  inputs = task.prepare(batch)
  embedding = state.codebook.embedding

  def loss_fn(params):
    codec = nnx.merge(graphdef, params)
    z = codec.latents(inputs)
    if config.decoder_only:
      z = jax.lax.stop_gradient(z)
    codes = vq.nearest_codes(z, embedding)
    quantised = embedding[codes]
    quantise = state.step >= config.quantise_after
    seen = jnp.where(quantise, vq.straight_through(z, quantised), z)
    metrics = task.losses(codec.render(task.exchange(seen, batch)), inputs)
    metrics |= {"commitment": vq.commitment_loss(z, quantised)}
    if not config.decoder_only:
      metrics |= task.regularise(codec, z, batch)
      metrics["loss"] += config.commitment * metrics["commitment"] + metrics.get("regular", 0.0)
    return metrics["loss"], (z, codes, metrics)

  (_, (z, codes, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  updates, opt_state = make_optimizer(config).update(grads, state.opt_state, state.params)
  codebook = state.codebook
  if not config.decoder_only:
    codebook = vq.update_codebook(
      codebook,
      z,
      codes,
      jax.random.fold_in(jax.random.key(config.seed), state.step),
      decay=config.codebook_decay,
      dead_below=config.dead_below,
      revived_size=4 * config.dead_below,
    )
  metrics |= {"used": vq.code_statistics(codes, len(embedding))["used"]}
  metrics["grad_norm"] = optax.global_norm(grads)
  params = optax.apply_updates(state.params, updates)
  return CodecState(state.step + 1, params, opt_state, codebook), metrics


def to_codec(graphdef: nnx.GraphDef, task: CodecTask, state: CodecState) -> nnx.Module:
  """Returns the codec of a training state, with its codebook in place."""
  codec = nnx.merge(graphdef, state.params)
  task.codebook(codec)[...] = state.codebook.embedding
  return codec


def fit(
  task: CodecTask, config: CodecTrainingConfig, workdir: str, start: nnx.Module | None = None
) -> nnx.Module:
  """Trains (or goes on training) a codec and returns it.

  Args:
    task: the codec and its data.
    config: training options.
    workdir: folder of the checkpoints.
    start: codec to go on from, instead of random parameters.

  Raises:
    FloatingPointError: if the loss stops being finite; the last checkpoint stays as it was.
    ValueError: if the decoder alone is trained and the checkpoints are of other codes.
  """
  graphdef, state = init_state(task, config, start)
  step_fn = jax.jit(
    functools.partial(train_step, graphdef=graphdef, task=task, config=config), donate_argnums=0
  )
  directory = os.path.join(os.path.abspath(workdir), "checkpoints")
  options = ocp.CheckpointManagerOptions(max_to_keep=2)
  with ocp.CheckpointManager(directory, options=options) as manager:
    if manager.latest_step() is not None:
      abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
      state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(abstract))
      if config.decoder_only and (state.codebook.embedding != task.codebook(start)[...]).any():
        raise ValueError(f"{directory} is of another run: its codes are not those of the start")
      logging.info("Going on from step %d of %s.", int(state.step), directory)
    start, began = int(state.step), time.time()
    for done in range(start + 1, config.num_steps + 1):
      state, metrics = step_fn(state, task.batch_at(done - 1))
      last = done == config.num_steps
      checkpoint = last or done % config.checkpoint_every == 0
      if done % config.log_every == 0 or checkpoint:
        _log_progress(done, config.num_steps, metrics, (time.time() - began) / (done - start))
      if last or done % config.eval_every == 0:
        figures = task.measure(to_codec(graphdef, task, state))
        logging.info(
          "step %d, held out: %s", done, ", ".join(f"{k} {v:.4g}" for k, v in figures.items())
        )
      if checkpoint:
        manager.save(done, args=ocp.args.StandardSave(state))
    manager.wait_until_finished()
  return to_codec(graphdef, task, state)


def _log_progress(step: int, num_steps: int, metrics: Metrics, seconds: float) -> None:
  values = {name: float(value) for name, value in jax.device_get(metrics).items()}
  if not np.isfinite(values["loss"]):
    raise FloatingPointError(
      f"The codec's loss is {values['loss']} at step {step}; lower --learning_rate and start "
      "again in an empty --workdir."
    )
  figures = " ".join(f"{name} {value:.4g}" for name, value in values.items())
  logging.info("step %d/%d %s, %.2f s a step", step, num_steps, figures, seconds)
