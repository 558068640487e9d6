"""How the shipped codecs are trained, and on what."""

from collections.abc import Sequence

import numpy as np

from aromni_jax.codecs import image_vq, speech_codec, train_speech
from aromni_jax.codecs.training import CodecTask, CodecTrainingConfig
from aromni_jax.pictotalk import records, train_image, twin_scenes, world

_VOICES = ("f2", "f5", "m2")


def image_task(config: CodecTrainingConfig, data_dir: str, sets: Sequence[str]) -> CodecTask:
  """Returns the small image codec with scenes of the train captions, drawn here."""
  captions = [c for name in sets for c in world.captions(name, "train")]
  model = image_vq.PRESETS["small"]
  source = twin_scenes.TwinScenes(
    captions, batch_size=config.batch_size, grid=model.grid, seed=config.seed
  )
  unseen = world.captions("base", "validation")[:64]
  held_out = np.stack([world.draw_scene(c, i) for i, c in enumerate(unseen)])
  return train_image.make_task(model, source, held_out)


def speech_task(config: CodecTrainingConfig, data_dir: str, sets: Sequence[str]) -> CodecTask:
  """Returns the small speech codec with the phrases of the train captions."""
  built = [records.open_set(data_dir, name) for name in sets]
  clips = [clip for builder in built for clip in _clips(builder, "train")]
  unseen = "validation" if "validation" in built[0].info.splits else "test"  # tiny has none
  held_out = _clips(built[0], unseen)
  return train_speech.make_task(speech_codec.PRESETS["small"], config, clips, held_out)


def _clips(builder, split: str) -> list[np.ndarray]:
  return [record[f"speech_{v}"] for record in builder.as_data_source(split) for v in _VOICES]


# Codec -> how the shipped one is trained, and (config, data_dir, sets) -> what the loop needs.
TRAININGS = {
  "image": (
    CodecTrainingConfig(num_steps=4700, batch_size=16, learning_rate=2e-3, warmup_steps=50),
    image_task,
  ),
  "speech": (
    CodecTrainingConfig(
      num_steps=2200, batch_size=16, learning_rate=1.5e-3, warmup_steps=100, quantise_after=100
    ),
    speech_task,
  ),
}
