import jax
import numpy as np

from aromni_jax import model_dir, pictotalk
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
  num_steps=20, batch_size=2, warmup_steps=1, quantise_after=2, learning_rate=5e-3
)


def source(**options):
  captions = pictotalk.captions("tiny", "train")
  return image_scenes.TwinScenes(captions, **({"batch_size": 2, "grid": 8, "seed": 0} | options))


def test_loss_falls():
  task = train_image.make_task(MODEL, source(), held_out=source()(9)["pictures"])
  graphdef, state = training.init_state(task, CONFIG)
  step = jax.jit(training.train_step, static_argnames=("graphdef", "task", "config"))
  losses = []
  for _ in range(20):
    state, metrics = step(state, source()(0), graphdef=graphdef, task=task, config=CONFIG)
    losses.append(float(metrics["l1"]))
  assert losses[-1] < 0.8 * losses[0]


def test_merged_codes_are_few_and_still_draw():
  codec = model_dir.load_codec(model_dir.SHIPPED, "image_codec")
  pictures = source(batch_size=32)(0)["pictures"]
  codes, before = train_image.reconstruct(codec, pictures)
  train_image.merge_codes(codec, pictures, 64)
  merged, after = train_image.reconstruct(codec, pictures)
  assert len(np.unique(merged)) <= 64 < len(np.unique(codes)) and merged.max() < 64
  assert train_image.psnr(after, pictures) > train_image.psnr(before, pictures) - 2


def test_psnr_by_hand():
  black = np.zeros((1, 2, 2, 3), np.uint8)
  assert train_image.psnr(black + 255, black) == 0
  assert np.isclose(train_image.psnr(black + 51, black), 20 * np.log10(5))
