"""Trains a codec on PictoTalk and writes it to a model directory.

  aromni train_codec --codec=image --workdir=runs/image_codec --out=runs/model
  aromni train_codec --codec=speech --workdir=runs/speech_codec --out=runs/model --data_dir=data

The image codec draws its pictures itself; the speech codec needs the raw --sets under --data_dir.
The same command goes on from the newest checkpoint of --workdir. A --out that does not exist starts
as a copy of the shipped text model and vocabulary.
"""

import dataclasses
import pathlib
import shutil

from absl import flags, logging

from aromni_jax import compilation_cache, logs
from aromni_jax.codecs.registry import CODED
from aromni_jax.pictotalk import world

_CODEC = flags.DEFINE_enum("codec", None, CODED, "Which codec.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the checkpoints.")
_OUT = flags.DEFINE_string("out", None, "Model directory that gets the codec.")
_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Folder of the raw PictoTalk sets.")
_SETS = flags.DEFINE_multi_enum(
  "sets", ["base", "new_objects"], world.PRESETS, "PictoTalk sets that it is trained on."
)
_NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Steps, if not the shipped codec's.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Pictures or one-second crops per step.")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", None, "Peak learning rate.")
_START = flags.DEFINE_string("start", None, "Model directory whose codec is trained on.")
_DECODER_ONLY = flags.DEFINE_bool(
  "decoder_only", False, "With --start: trains the decoder alone, so all codes stay the same."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of parameters and data.")


def main(argv: list[str]) -> None:
  del argv
  from aromni_jax import model_dir
  from aromni_jax.codecs.training import fit
  from aromni_jax.pictotalk import train_image
  from aromni_jax.pictotalk.codec_training import TRAININGS
  from aromni_jax.recipes import PAPER
  from aromni_jax.vocabulary import get_vocabulary

  options = {
    "num_steps": _NUM_STEPS.value,
    "batch_size": _BATCH_SIZE.value,
    "learning_rate": _LEARNING_RATE.value,
    "seed": _SEED.value,
  }
  if _START.value:
    options |= {"quantise_after": 0, "decoder_only": _DECODER_ONLY.value}
  elif _DECODER_ONLY.value:
    raise ValueError("--decoder_only needs --start, whose encoder and codes stay")
  shipped, make_task = TRAININGS[_CODEC.value]
  config = dataclasses.replace(shipped, **{k: v for k, v in options.items() if v is not None})
  compilation_cache.enable()
  task = make_task(config, _DATA_DIR.value, _SETS.value)
  name = f"{_CODEC.value}_codec"
  start = model_dir.load_codec(_START.value, name) if _START.value else None
  codec = fit(task, config, _WORKDIR.value, start)
  if _CODEC.value == "image":
    codec = train_image.without_reader(codec)
  out = pathlib.Path(_OUT.value)
  if not (out / "model.json").exists():
    model_dir.create(out, get_vocabulary("demo"), PAPER)
    shutil.copy(model_dir.SHIPPED / "text.model", out / "text.model")
  model_dir.save_codec(out, name, codec)
  logging.info("Wrote %s/%s.", out, name)


def run() -> None:
  logs.run(main, required=["codec", "workdir", "out"])


if __name__ == "__main__":
  run()
