"""Trains a codec on PictoTalk and writes it to a model directory.

  aromni train_codec --codec=image --workdir=runs/image_codec --out=runs/model
  aromni train_codec --codec=speech --workdir=runs/speech_codec --out=runs/model --data_dir=data

The image codec draws its pictures itself; the speech codec needs the raw sets base and new_objects
under --data_dir. The same command goes on from the newest checkpoint of --workdir. A --out that
does not exist starts as a copy of the shipped text model and vocabulary.
"""

import dataclasses
import os
import pathlib
import shutil

import numpy as np
from absl import app, flags, logging

from aromni_jax import logs, model_dir
from aromni_jax.codecs import image_vq, speech_codec, train_speech
from aromni_jax.codecs.training import CodecTask, CodecTrainingConfig, fit
from aromni_jax.pictotalk import train_image, twin_scenes, world
from aromni_jax.vocabulary import get_vocabulary

_SETS = ("base", "new_objects")  # codecs are general: only the decoder never sees new objects
_VOICES = ("f2", "f5", "m2")

# How the shipped codecs are trained.
_CONFIGS = {
  "image": CodecTrainingConfig(num_steps=4700, batch_size=16, learning_rate=2e-3, warmup_steps=50),
  "speech": CodecTrainingConfig(
    num_steps=2200, batch_size=16, learning_rate=1.5e-3, warmup_steps=100, quantise_after=100
  ),
}

_CODEC = flags.DEFINE_enum("codec", None, list(_CONFIGS), "Which codec.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the checkpoints.")
_OUT = flags.DEFINE_string("out", None, "Model directory that gets the codec.")
_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Folder of the raw PictoTalk sets.")
_NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Steps, if not the shipped codec's.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Pictures or one-second crops per step.")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", None, "Peak learning rate.")
_START = flags.DEFINE_string("start", None, "Model directory whose codec is trained on.")
_DECODER_ONLY = flags.DEFINE_bool(
  "decoder_only", False, "With --start: trains the decoder alone, so all codes stay the same."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of parameters and data.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  options = {
    "num_steps": _NUM_STEPS.value,
    "batch_size": _BATCH_SIZE.value,
    "learning_rate": _LEARNING_RATE.value,
    "seed": _SEED.value,
  }
  if _START.value:
    options |= {"quantise_after": 0, "decoder_only": _DECODER_ONLY.value}
  elif _DECODER_ONLY.value:
    raise app.UsageError("--decoder_only needs --start, whose encoder and codes stay")
  config = dataclasses.replace(
    _CONFIGS[_CODEC.value], **{k: v for k, v in options.items() if v is not None}
  )
  make_task = {"image": image_task, "speech": speech_task}[_CODEC.value]
  with logs.clear_errors():
    task = make_task(config)
  name = f"{_CODEC.value}_codec"
  start = model_dir.load_codec(_START.value, name) if _START.value else None
  codec = fit(task, config, _WORKDIR.value, start)
  if _CODEC.value == "image":
    codec = train_image.without_reader(codec)
  out = pathlib.Path(_OUT.value)
  if not (out / "model.json").exists():
    model_dir.create(out, get_vocabulary("demo"), "paper")
    shutil.copy(model_dir.SHIPPED / "text.model", out / "text.model")
  model_dir.save_codec(out, name, codec)
  logging.info("Wrote %s/%s.", out, name)


def image_task(config: CodecTrainingConfig) -> CodecTask:
  """Returns the small image codec with scenes of the train captions."""
  captions = [c for name in _SETS for c in world.captions(name, "train")]
  model = image_vq.PRESETS["small"]
  source = twin_scenes.TwinScenes(
    captions, batch_size=config.batch_size, grid=model.grid, seed=config.seed
  )
  unseen = world.captions("base", "validation")[:64]
  held_out = np.stack([world.draw_scene(c, i) for i, c in enumerate(unseen)])
  return train_image.make_task(model, source, held_out)


def speech_task(config: CodecTrainingConfig) -> CodecTask:
  """Returns the small speech codec with the phrases of the train captions."""
  clips, held_out = [], []
  for name in _SETS:
    clips += _clips(name, "train", _VOICES)
  held_out = _clips("base", "validation", _VOICES)
  return train_speech.make_task(speech_codec.PRESETS["small"], config, clips, held_out)


def _clips(name: str, split: str, voices: tuple[str, ...]) -> list[np.ndarray]:
  """Raises FileNotFoundError if the set is not there."""
  import tensorflow_datasets as tfds

  folder = os.path.join(_DATA_DIR.value, "picto_talk", name, "1.0.0")
  if not os.path.isdir(folder):
    raise FileNotFoundError(
      f"{folder} does not exist; make it with python -m data_pipelines.build_pictotalk "
      f"--data_dir={_DATA_DIR.value} --config={name}"
    )
  source = tfds.builder_from_directory(folder).as_data_source(split)
  return [record[f"speech_{v}"] for record in source for v in voices]


def run() -> None:
  logs.setup()
  flags.mark_flags_as_required(["codec", "workdir", "out"])
  app.run(main)


if __name__ == "__main__":
  run()
