"""PictoTalk as a TFDS data set, stored as ArrayRecord; TensorFlow is not needed.

One record per caption: scenes and the phrase in four voices.
"""

import zlib

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from aromni_jax.data_pipelines import espeak
from aromni_jax.pictotalk import world

SCENES = 4  # pictures per caption


class PictoTalk(tfds.core.GeneratorBasedBuilder):
  """Captions such as "three lemons on gray", each with pictures and speech."""

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name="base", description="64 objects, 8 colours, 1 to 4 of each"),
    tfds.core.BuilderConfig(name="new_objects", description="8 objects kept for fine-tuning"),
    tfds.core.BuilderConfig(name="tiny", description="4 objects, 4 colours, for tests"),
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    side = world.RESOLUTION
    packed = tfds.features.Encoding.BYTES
    features = {
      "key": tfds.features.Text(),
      "caption": tfds.features.Text(),
      "count": np.int32,
      "object": tfds.features.Text(),
      "colour": tfds.features.Text(),
      "image": tfds.features.Tensor(shape=(SCENES, side, side, 3), dtype=np.uint8, encoding=packed),
    }
    for voice in espeak.VOICES:
      features[f"speech_{voice}"] = tfds.features.Tensor(
        shape=(None,), dtype=np.int16, encoding=packed
      )
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      license="pictures: OpenMoji, CC BY-SA 4.0; speech: synthesised by espeak-ng",
      homepage="https://openmoji.org",
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    items = world.captions(self.builder_config.name)
    # All voices are spoken before the splits are cut, so a split never changes a sample.
    texts = [item.text for item in items]
    speech = {}
    for voice in espeak.VOICES:
      logging.info("Speaking %d phrases with voice %s.", len(texts), voice)
      speech[voice] = espeak.synthesise(voice, texts)
    return {
      split: self._generate_examples(
        [(i, item) for i, item in enumerate(items) if item.split == split], speech
      )
      for split in world.SPLITS
      if any(item.split == split for item in items)
    }

  def _generate_examples(self, items, speech):
    for i, item in items:
      key = f"{self.builder_config.name}/{item.text.replace(' ', '_')}"
      seed = zlib.crc32(item.text.encode())
      record = {
        "key": key,
        "caption": item.text,
        "count": item.count,
        "object": item.object,
        "colour": item.colour,
        "image": np.stack([world.draw_scene(item, seed + n) for n in range(SCENES)]),
      }
      yield key, record | {f"speech_{voice}": clips[i] for voice, clips in speech.items()}


def build(data_dir: str, config: str) -> tfds.core.DatasetBuilder:
  """Builds a configuration, if it is not there yet, and returns its builder.

  Raises:
    ValueError: for a configuration that does not exist.
    ImportError: if the `demo` extra is not installed.
  """
  if config not in world.PRESETS:
    raise ValueError(f"PictoTalk has no configuration {config!r}; expected {world.PRESETS}")
  builder = PictoTalk(config=config, data_dir=data_dir, file_format="array_record")
  builder.download_and_prepare()
  return builder
