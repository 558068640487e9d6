"""Small models, runs and samples that tests share: quick to compile, of the demo's vocabulary."""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from aromni_jax import model_dir
from aromni_jax.codecs import image_vq, speech_codec
from aromni_jax.codecs.text import SentencePieceText
from aromni_jax.configs import demo
from aromni_jax.models.config import DecoderConfig
from aromni_jax.prompts import make_sample
from aromni_jax.recipes import PAPER
from aromni_jax.sample import Parts, Sample
from aromni_jax.tasks import TASKS
from aromni_jax.vocabulary import get_vocabulary

VOCABULARY = get_vocabulary("demo")
DECODER = DecoderConfig(
  vocab_size=VOCABULARY.size,
  embed_dim=32,
  mlp_dim=64,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  dtype="float32",
  remat_policy="none",
)
# Its random weights say something definite, so that greedy choices are no ties.
SPEAKER = dataclasses.replace(
  DECODER, embed_dim=16, mlp_dim=32, num_heads=2, num_kv_heads=1, init_std=0.5
)
IMAGE_CODEC = image_vq.ImageVQConfig(
  resolution=64,
  ch=4,
  ch_mult=(1, 1, 2, 2),
  num_res_blocks=1,
  z_channels=8,
  embed_dim=4,
  n_embed=16,
  num_groups=4,
)
SPEECH_CODEC = dataclasses.replace(
  speech_codec.PRESETS["small"], encoder_dim=16, encoder_layers=1, dim=16, mlp_dim=32, num_layers=2
)


def text_model() -> SentencePieceText:
  """Returns the shipped text model."""
  return SentencePieceText(model_dir.SHIPPED / "text.model", VOCABULARY)


def train_config(shards: str | os.PathLike, **changes: Any) -> ConfigDict:
  """Returns a small run, all in its warm-up: steps of any number are one compiled program.

  Args:
    shards: token shards of the demo's vocabulary.
    changes: fields by their names, e.g. `**{"model.num_layers": 1}`.
  """
  c = demo.get_config("tiny")
  c.data.shards = str(shards)
  c.num_steps, c.batch_size, c.eval_batches = 8, 8, 1
  c.log_every, c.checkpoint_every = 1, 3
  c.data.sequence_length = 256
  c.optimizer.schedule = "constant"
  c.update_from_flattened_dict(changes)
  return c


def random_samples(count: int, seed: int = 0, tasks=tuple(TASKS)) -> Iterator[Sample]:
  """Yields samples of tasks, in turn, with random codes and words.

  Args:
    count: how many.
    seed: of codes and words.
    tasks: their names.
  """
  text = text_model()
  rng = np.random.default_rng(seed)

  def part(name):
    if name == "image":
      return rng.integers(0, len(VOCABULARY.image), VOCABULARY.image_length)
    if name == "speech":
      return rng.integers(0, len(VOCABULARY.speech), rng.integers(3, 60))
    return " ".join(rng.choice(["two", "dogs", "on", "blue"], rng.integers(1, 5)))

  for i in range(count):
    task = tasks[i % len(tasks)]
    yield make_sample(
      task,
      VOCABULARY,
      text,
      recipe=PAPER,
      inputs=Parts(**{n: part(n) for n in TASKS[task].inputs}),
      response=Parts(**{n: part(n) for n in TASKS[task].parts}),
      key=f"item{i}",
    )


def without_part(folder: pathlib.Path, part: str) -> pathlib.Path:
  """Writes the shipped model directory without a part of it into a folder; returns the folder."""
  shutil.copytree(model_dir.SHIPPED, folder, ignore=shutil.ignore_patterns(part))
  info = json.loads((folder / "model.json").read_text())
  info.pop(part, None)
  (folder / "model.json").write_text(json.dumps(info))
  return folder
