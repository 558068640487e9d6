import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aromni_jax import model_dir
from aromni_jax.codecs import batching, image_vq, training
from aromni_jax.pictotalk import train_image, twin_scenes, world
from tests import tiny

MODEL = tiny.IMAGE_CODEC
CONFIG = training.CodecTrainingConfig(
  num_steps=20, batch_size=2, warmup_steps=1, quantise_after=2, learning_rate=5e-3
)


def source(**options):
  captions = world.captions("tiny", "train")
  return twin_scenes.TwinScenes(captions, **({"batch_size": 2, "grid": 8, "seed": 0} | options))


@pytest.mark.slow
def test_loss_falls():
  task = train_image.make_task(MODEL, source(), held_out=source()(9)["pictures"])
  graphdef, state = training.init_state(task, CONFIG)
  step = jax.jit(training.train_step, static_argnames=("graphdef", "task", "config"))
  losses = []
  for _ in range(20):
    state, metrics = step(state, source()(0), graphdef=graphdef, task=task, config=CONFIG)
    losses.append(float(metrics["l1"]))
  assert losses[-1] < 0.8 * losses[0]


def test_reader_loss_counts_covered_cells_of_both_twins():
  logits = jnp.log(jnp.full((4, 2, 3), 0.25).at[..., 0].set(0.5))  # says object 0 everywhere
  covered = jnp.array([[True, False], [True, True]])
  loss, right = train_image.reader_loss(logits, jnp.array([0, 2]), covered)
  assert float(right) == pytest.approx(1 / 3)
  assert float(loss) == pytest.approx((np.log(2) + 2 * np.log(4)) / 3, rel=1e-5)


def test_twins_exchange_what_covers_them():
  z = jnp.arange(8.0).reshape(2, 2, 2, 1)  # one scene and its twin
  covered = jnp.array([[True, False, False, True]])
  one, other = train_image.exchange(z, {"covered": covered})
  np.testing.assert_array_equal(one.ravel(), [4, 1, 2, 7])
  np.testing.assert_array_equal(other.ravel(), [0, 5, 6, 3])


@pytest.mark.slow
def test_the_reader_learns_and_stays_behind():
  task = train_image.make_task(MODEL, source(batch_size=16), held_out=source()(9)["pictures"])
  config = dataclasses.replace(CONFIG, num_steps=60, learning_rate=1e-2)
  graphdef, state = training.init_state(task, config)
  step = jax.jit(training.train_step, static_argnames=("graphdef", "task", "config"))
  batch = task.batch_at(0)
  read = []
  for _ in range(60):
    state, metrics = step(state, batch, graphdef=graphdef, task=task, config=config)
    read.append(float(metrics["reader"]))
  assert read[0] == pytest.approx(np.log(4), rel=1e-3) and read[-1] < 0.5 * read[0]
  codec = train_image.without_reader(training.to_codec(graphdef, task, state))
  image_vq.from_params(MODEL, image_vq.to_params(codec))  # has what a codec has, no more


def test_psnr_by_hand():
  black = np.zeros((1, 2, 2, 3), np.uint8)
  assert image_vq.psnr(black + 255, black) == 0
  assert np.isclose(image_vq.psnr(black + 51, black), 20 * np.log10(5))


@pytest.mark.slow
def test_shipped_codes_name_the_objects_of_unseen_pairs():
  """Naive Bayes on counts of codes suffices: they do not hang on the colour behind the object."""
  codec = model_dir.load_codec(model_dir.SHIPPED, "image_codec")

  def histograms(captions):
    pictures = np.stack([world.draw_scene(c, i) for i, c in enumerate(captions)])
    codes = batching.encode_images(codec, pictures)
    objects = np.array([world.OBJECTS.index(c.object) for c in captions])
    return np.stack([np.bincount(c, minlength=codec.config.n_embed) for c in codes]), objects

  seen, objects = histograms(world.captions("base", "train"))
  unseen, wanted = histograms(world.captions("base", "test"))
  counts = np.stack([seen[objects == i].sum(0) for i in range(len(world.OBJECTS))]) + 0.1
  scores = unseen @ np.log(counts / counts.sum(1, keepdims=True)).T
  assert (scores.argmax(1) == wanted).mean() > 0.7
