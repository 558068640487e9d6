"""The loop that trains both codecs, on a codec of two matrices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aromni_jax.codecs import training
from aromni_jax.models import params as codec_params

CONFIG = training.CodecTrainingConfig(
  num_steps=6,
  batch_size=16,
  warmup_steps=1,
  quantise_after=2,
  log_every=1,
  eval_every=6,
  checkpoint_every=3,
)


class Codec(nnx.Module):
  """Vectors [B, 8] -> [B, 2] -> [B, 8]."""

  def __init__(self, rngs):
    self.encoder, self.decoder = nnx.Linear(8, 2, rngs=rngs), nnx.Linear(2, 8, rngs=rngs)
    self.codebook = nnx.Param(jax.random.normal(rngs.params(), (16, 2)))

  def latents(self, x):
    return self.encoder(x)

  def render(self, z):
    return self.decoder(z)


def batch_at(step):
  """Four kinds of vectors, with a little noise."""
  rng = np.random.default_rng(step)
  centres = np.random.default_rng(99).normal(size=(4, 8))
  return (centres[rng.integers(4, size=16)] + 0.01 * rng.normal(size=(16, 8))).astype(np.float32)


def make_task(**changes):
  def losses(output, target):
    return {"loss": jnp.mean((output - target) ** 2)}

  task = training.CodecTask(
    make=Codec,
    codebook=lambda codec: codec.codebook,
    prepare=lambda batch: batch,
    losses=losses,
    batch_at=batch_at,
    measure=lambda codec: {"error": 0.0},
  )
  return dataclasses.replace(task, **changes)


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, *map(codec_params.to_params, (a, b)))


@pytest.mark.slow
def test_stopped_training_goes_on_as_if_never_stopped(tmp_path):
  def power_cut(step):
    if step == 5:
      raise KeyboardInterrupt
    return batch_at(step)

  whole = training.fit(make_task(), CONFIG, tmp_path / "whole")
  with pytest.raises(KeyboardInterrupt):
    training.fit(make_task(batch_at=power_cut), CONFIG, tmp_path / "cut")
  seen = []
  task = make_task(batch_at=lambda step: seen.append(step) or batch_at(step))
  resumed = training.fit(task, CONFIG, tmp_path / "cut")
  assert seen == [3, 4, 5]  # from the checkpoint at step 3
  assert_same(whole, resumed)


@pytest.mark.slow
def test_error_and_codes_of_a_simple_world(tmp_path):
  config = dataclasses.replace(CONFIG, num_steps=600, learning_rate=2e-2, eval_every=600)
  codec = training.fit(make_task(), dataclasses.replace(config, checkpoint_every=600), tmp_path)
  x = jnp.asarray(batch_at(10_000))
  z = codec.latents(x)
  from aromni_jax.codecs import vq

  codes = vq.nearest_codes(z, codec.codebook[...])
  error = jnp.mean((codec.render(codec.codebook[...][codes]) - x) ** 2)
  assert float(error) < 0.3 * float(jnp.var(x, axis=0).mean())
  assert len(np.unique(codes)) >= 4


@pytest.mark.slow
def test_training_starts_from_a_codec(tmp_path):
  start = training.fit(make_task(), CONFIG, tmp_path / "a")
  _, state = training.init_state(make_task(), CONFIG, start)
  assert_same(start, training.to_codec(nnx.graphdef(start), make_task(), state))
  nothing = dataclasses.replace(CONFIG, num_steps=2, learning_rate=0.0, codebook_decay=1.0)
  again = training.fit(make_task(), nothing, tmp_path / "b", start)
  np.testing.assert_array_equal(start.encoder.kernel[...], again.encoder.kernel[...])


@pytest.mark.slow
def test_the_decoder_alone_can_be_trained(tmp_path):
  start = training.fit(make_task(), CONFIG, tmp_path / "a")
  config = dataclasses.replace(CONFIG, decoder_only=True)
  task = make_task(regularise=lambda codec, z, batch: {"regular": jnp.mean((z - 1) ** 2)})
  again = training.fit(task, config, tmp_path / "b", start)
  assert_same(start.encoder, again.encoder)
  np.testing.assert_array_equal(start.codebook[...], again.codebook[...])
  assert float(jnp.abs(start.decoder.kernel[...] - again.decoder.kernel[...]).max()) > 1e-4
  other = training.fit(make_task(), dataclasses.replace(CONFIG, seed=1), tmp_path / "c")
  with pytest.raises(ValueError, match="its codes are not those of the start"):
    training.fit(task, config, tmp_path / "b", other)


@pytest.mark.slow
def test_a_regulariser_is_a_part_of_the_loss():
  graphdef, state = training.init_state(make_task(), CONFIG)
  losses = []
  for weight in (0.0, 2.0):
    task = make_task(regularise=lambda codec, z, batch, w=weight: {"regular": w * jnp.mean(z**2)})
    _, metrics = training.train_step(
      state, jnp.asarray(batch_at(0)), graphdef=graphdef, task=task, config=CONFIG
    )
    losses.append(float(metrics["loss"]) - float(metrics["regular"]))
    assert (float(metrics["regular"]) > 0) == (weight > 0)
  assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
def test_the_decoder_sees_exchanged_vectors():
  graphdef, state = training.init_state(make_task(), CONFIG)
  batch = jnp.asarray(batch_at(0))
  task = make_task(exchange=lambda z, batch: z[::-1])
  _, swapped = training.train_step(state, batch, graphdef=graphdef, task=task, config=CONFIG)
  codec = nnx.merge(graphdef, state.params)
  want = jnp.mean((codec.render(codec.latents(batch)[::-1]) - batch) ** 2)
  assert float(swapped["loss"] - 0.25 * swapped["commitment"]) == pytest.approx(float(want), 1e-5)


def test_non_finite_loss_stops_and_keeps_the_checkpoint(tmp_path):
  config = dataclasses.replace(CONFIG, learning_rate=float("nan"), checkpoint_every=1)
  with pytest.raises(FloatingPointError, match="loss is nan at step 2"):
    training.fit(make_task(), config, tmp_path)
