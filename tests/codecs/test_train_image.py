import dataclasses

import jax
import numpy as np
import pytest

from aromni_jax import pictotalk
from aromni_jax.codecs import image_scenes, image_vq, train_image, training

MODEL = image_vq.ImageVQConfig(
  resolution=64,
  ch=4,
  ch_mult=(1, 1, 2, 2),
  num_res_blocks=1,
  z_channels=8,
  embed_dim=4,
  n_embed=16,
  num_groups=4,
)
CONFIG = training.CodecTrainingConfig(
  num_steps=6,
  batch_size=2,
  warmup_steps=1,
  quantise_after=2,
  log_every=1,
  eval_every=6,
  checkpoint_every=3,
)


def source(seed=0):
  captions = pictotalk.captions("tiny", "train")
  return image_scenes.TwinScenes(captions, batch_size=2, grid=MODEL.grid, seed=seed)


def fit(batch_at, workdir, config=CONFIG):
  task = train_image.make_task(MODEL, batch_at, held_out=source(9)(0)["pictures"])
  return training.fit(task, config, workdir)


def test_stopped_training_goes_on_as_if_never_stopped(tmp_path):
  batches = source()

  def power_cut(step):
    if step == 5:
      raise KeyboardInterrupt
    return batches(step)

  whole = image_vq.to_params(fit(batches, tmp_path / "whole"))
  with pytest.raises(KeyboardInterrupt):
    fit(power_cut, tmp_path / "cut")
  seen = []
  resumed = fit(lambda step: seen.append(step) or batches(step), tmp_path / "cut")
  assert seen == [3, 4, 5]  # from the checkpoint at step 3
  jax.tree.map(np.testing.assert_array_equal, whole, image_vq.to_params(resumed))


def test_loss_falls(tmp_path):
  config = dataclasses.replace(CONFIG, num_steps=20, learning_rate=5e-3)
  task = train_image.make_task(MODEL, source(), held_out=source(9)(0)["pictures"])
  graphdef, state = training.init_state(task, config)
  step = jax.jit(training.train_step, static_argnames=("graphdef", "task", "config"))
  losses = []
  for _ in range(20):
    state, metrics = step(state, source()(0), graphdef=graphdef, task=task, config=config)
    losses.append(float(metrics["l1"]))
  assert losses[-1] < 0.8 * losses[0]


def test_non_finite_loss_stops_and_keeps_the_checkpoint(tmp_path):
  config = dataclasses.replace(CONFIG, learning_rate=float("nan"), checkpoint_every=1)
  with pytest.raises(FloatingPointError, match="loss is nan at step 2"):
    fit(source(), tmp_path, config)
