"""Builds PictoTalk: `aromni build_pictotalk --data_dir=DIR --config=base`.

About a minute for the base set on two cores; returns at once if the set is there.
"""

from absl import flags, logging

from aromni_jax import logs
from aromni_jax.data_pipelines import picto_talk
from aromni_jax.pictotalk import world

_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Folder of the TFDS data sets.")
_CONFIG = flags.DEFINE_enum("config", "base", world.PRESETS, "Which set to build.")


def main(argv: list[str]) -> None:
  del argv
  builder = picto_talk.build(_DATA_DIR.value, _CONFIG.value)
  for name, split in builder.info.splits.items():
    logging.info("%s: %d captions", name, split.num_examples)


if __name__ == "__main__":
  logs.run(main)
