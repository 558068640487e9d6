"""Training of the image codec on PictoTalk scenes drawn on the fly.

Everything about a step is a function of (seed, step): pictures, revival of codes, learning rate. A
run that is stopped goes on from its last checkpoint as if it had never stopped.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx

from aromni_jax.codecs import image_vq, vq

Array = jax.Array
Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class ImageTrainingConfig:
  """How the codec is trained.

  Attributes:
    num_steps: optimiser steps.
    batch_size: pictures per step.
    learning_rate: peak rate of AdamW; linear warm-up, then cosine to zero.
    warmup_steps: steps of the warm-up.
    quantise_after: steps before the decoder sees codes instead of the encoder's own vectors.
    commitment: weight that pulls the encoder's vectors to their codes.
    edge_weight: weight of the L1 error of horizontal and vertical differences.
    codebook_decay: share of the codebook averages kept at each step.
    dead_below: average uses per step under which a code is revived.
    augment_share: share of pictures with other glyphs, places, sizes and colours than PictoTalk's.
    seed: seed of the parameters and the pictures.
    log_every: steps between progress lines.
    eval_every: steps between measurements on held-out scenes.
    eval_pictures: held-out scenes measured.
    checkpoint_every: steps between checkpoints.
  """

  num_steps: int = 3000
  batch_size: int = 8
  learning_rate: float = 2e-3
  warmup_steps: int = 50
  quantise_after: int = 150
  commitment: float = 0.25
  edge_weight: float = 0.5
  codebook_decay: float = 0.98
  dead_below: float = 0.01
  augment_share: float = 0.3
  seed: int = 0
  log_every: int = 25
  eval_every: int = 250
  eval_pictures: int = 64
  checkpoint_every: int = 250


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodecState:
  """Everything that a step changes. `params["quantize"]` is unused: `codebook` replaces it."""

  step: Array
  params: nnx.State
  opt_state: optax.OptState
  codebook: vq.EmaCodebook


def make_optimizer(config: ImageTrainingConfig) -> optax.GradientTransformation:
  """Returns AdamW with warm-up and cosine decay, gradients clipped to norm 1."""
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, config.learning_rate, config.warmup_steps, config.num_steps
  )
  return optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=1e-4)
  )


def init_state(
  model: image_vq.ImageVQConfig, config: ImageTrainingConfig
) -> tuple[nnx.GraphDef, CodecState]:
  """Returns the structure of the codec and the state at step 0."""
  graphdef, params = nnx.split(image_vq.ImageVQ(model, rngs=nnx.Rngs(config.seed)))
  codebook = vq.init_codebook(jax.random.key(config.seed), model.n_embed, model.embed_dim)
  opt_state = make_optimizer(config).init(params)
  return graphdef, CodecState(jnp.zeros((), jnp.int32), params, opt_state, codebook)


def reconstruction_losses(output: Array, target: Array) -> Metrics:
  """Returns the mean errors of pictures float32[B, H, W, 3]: l1, l2 and edges."""
  difference = output - target
  edges = [jnp.mean(jnp.abs(jnp.diff(difference, axis=axis))) for axis in (1, 2)]
  return {
    "l1": jnp.mean(jnp.abs(difference)),
    "l2": jnp.mean(difference**2),
    "edges": edges[0] + edges[1],
  }


def codec_loss(
  params: nnx.State,
  graphdef: nnx.GraphDef,
  embedding: Array,
  pixels: Array,
  quantised_share: Array,
  config: ImageTrainingConfig,
) -> tuple[Array, tuple[Array, Array, Metrics]]:
  """Returns the loss and (vectors, codes, metrics) for pixels float32[B, H, W, 3]."""
  codec = nnx.merge(graphdef, params)
  z = codec.latents(pixels)
  codes = vq.nearest_codes(z, embedding)
  quantised = embedding[codes]
  seen = jnp.where(quantised_share > 0, vq.straight_through(z, quantised), z)
  metrics = reconstruction_losses(codec.render(seen), pixels)
  metrics["commitment"] = vq.commitment_loss(z, quantised)
  loss = metrics["l1"] + metrics["l2"] + config.edge_weight * metrics["edges"]
  loss += config.commitment * metrics["commitment"]
  return loss, (z, codes, metrics | {"loss": loss})


def train_step(
  state: CodecState,
  pixels: Array,
  *,
  graphdef: nnx.GraphDef,
  config: ImageTrainingConfig,
) -> tuple[CodecState, Metrics]:
  """Returns the state and the metrics after one step on pixels uint8[B, H, W, 3]."""
  pixels = pixels.astype(jnp.float32) / 127.5 - 1.0
  share = state.step >= config.quantise_after
  gradient = jax.value_and_grad(codec_loss, has_aux=True)
  (_, (z, codes, metrics)), grads = gradient(
    state.params, graphdef, state.codebook.embedding, pixels, share, config
  )
  updates, opt_state = make_optimizer(config).update(grads, state.opt_state, state.params)
  key = jax.random.fold_in(jax.random.key(config.seed), state.step)
  codebook = vq.update_codebook(
    state.codebook,
    z,
    codes,
    key,
    decay=config.codebook_decay,
    dead_below=config.dead_below,
    revived_size=4 * config.dead_below,
  )
  metrics |= vq.code_statistics(codes, len(codebook.embedding))
  metrics["grad_norm"] = optax.global_norm(grads)
  params = optax.apply_updates(state.params, updates)
  return CodecState(state.step + 1, params, opt_state, codebook), metrics


def to_codec(graphdef: nnx.GraphDef, state: CodecState) -> image_vq.ImageVQ:
  """Returns the codec of a training state, with its codebook in place."""
  codec = nnx.merge(graphdef, state.params)
  codec.quantize.embedding[...] = state.codebook.embedding
  return codec


@nnx.jit
def reconstruct(codec: image_vq.ImageVQ, pixels: Array) -> tuple[Array, Array]:
  """Returns codes int32[B, h*w] and the pictures decoded from them, float32[B, H, W, 3]."""
  codes = codec.encode(pixels)
  return codes, codec.decode(codes)


def measure(codec: image_vq.ImageVQ, pictures: np.ndarray, batch_size: int = 32) -> dict:
  """Returns PSNR in dB (of uint8 pictures), codes used and their perplexity.

  Args:
    codec: the codec.
    pictures: uint8[n, H, W, 3].
    batch_size: pictures at a time; the last batch is padded with the first picture.
  """
  outputs, codes = [], []
  for start in range(0, len(pictures), batch_size):
    batch = pictures[start : start + batch_size]
    filler = np.repeat(pictures[:1], batch_size - len(batch), axis=0)
    pixels = np.concatenate([batch, filler]).astype(np.float32) / 127.5 - 1.0
    code, output = reconstruct(codec, pixels)
    codes.append(np.asarray(code)[: len(batch)])
    outputs.append(image_vq.to_uint8(output)[: len(batch)])
  outputs, codes = np.concatenate(outputs), np.concatenate(codes)
  error = np.mean((outputs.astype(np.float64) - pictures) ** 2, axis=(1, 2, 3))
  stats = vq.code_statistics(jnp.asarray(codes), codec.config.n_embed)
  return {
    "psnr": float(np.mean(10 * np.log10(255.0**2 / np.maximum(error, 1e-3)))),
    "used": int(stats["used"]),
    "perplexity": float(stats["perplexity"]),
    "pictures": outputs,
    "codes": codes,
  }


def fit(
  model: image_vq.ImageVQConfig,
  config: ImageTrainingConfig,
  workdir: str,
  *,
  batch_at: Callable[[int], np.ndarray],
  held_out: np.ndarray,
) -> image_vq.ImageVQ:
  """Trains (or goes on training) the codec and returns it.

  Args:
    model: shape of the codec.
    config: training options.
    workdir: folder of the checkpoints.
    batch_at: the pictures of a step, uint8[batch_size, H, W, 3]; a function of the step alone.
    held_out: pictures for the progress lines, uint8[n, H, W, 3].

  Raises:
    FloatingPointError: if the loss stops being finite; the last checkpoint stays as it was.
  """
  graphdef, state = init_state(model, config)
  step_fn = jax.jit(
    functools.partial(train_step, graphdef=graphdef, config=config), donate_argnums=0
  )
  directory = os.path.join(os.path.abspath(workdir), "checkpoints")
  options = ocp.CheckpointManagerOptions(max_to_keep=2)
  with ocp.CheckpointManager(directory, options=options) as manager:
    if manager.latest_step() is not None:
      abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
      state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(abstract))
      logging.info("Going on from step %d of %s.", int(state.step), directory)
    start, began = int(state.step), time.time()
    for step in range(start, config.num_steps):
      state, metrics = step_fn(state, batch_at(step))
      done = step + 1
      if done % config.log_every == 0 or done == config.num_steps:
        _log_progress(done, config.num_steps, metrics, (time.time() - began) / (done - start))
      if done % config.eval_every == 0 or done == config.num_steps:
        result = measure(to_codec(graphdef, state), held_out)
        logging.info(
          "step %d: held-out PSNR %.2f dB, %d codes used, perplexity %.0f",
          *(done, result["psnr"], result["used"], result["perplexity"]),
        )
      if done % config.checkpoint_every == 0 or done == config.num_steps:
        manager.save(done, args=ocp.args.StandardSave(state))
    manager.wait_until_finished()
  return to_codec(graphdef, state)


def _log_progress(step: int, num_steps: int, metrics: Metrics, seconds: float) -> None:
  values = {name: float(value) for name, value in jax.device_get(metrics).items()}
  if not np.isfinite(values["loss"]):
    raise FloatingPointError(
      f"The image codec's loss is {values['loss']} at step {step}; lower "
      "--config.training.learning_rate and start again in an empty --workdir."
    )
  logging.info(
    "step %d/%d loss %.4f l1 %.4f edges %.4f commitment %.4f used %d norm %.2f, %.2f s a step",
    *(step, num_steps, values["loss"], values["l1"], values["edges"], values["commitment"]),
    *(values["used"], values["grad_norm"], seconds),
  )
