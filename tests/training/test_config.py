import pathlib
import subprocess
import sys

import pytest

from aromni_jax.configs import base, demo, finetune_7b, pods, pretrain_7b
from aromni_jax.recipes import PAPER, RECIPES, RELEASED
from aromni_jax.training.config import TrainConfig, to_dataclass

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("argument", demo.ARGUMENTS)
def test_every_demo_config_is_whole(argument):
  config = to_dataclass(TrainConfig, demo.get_config(argument).to_dict())
  assert config.model.vocab_size == 2944


@pytest.mark.parametrize("module", [pretrain_7b, finetune_7b])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("topology", ["", *pods.PODS])
def test_every_7b_config_is_whole(module, recipe, topology):
  argument = f"{recipe},{topology}" if topology else recipe
  config = to_dataclass(TrainConfig, module.get_config(argument).to_dict())
  assert config.model.num_params() == 7_013_158_912
  blocks, rest = divmod(config.model.vocab_size, config.loss.vocab_block)
  assert blocks > 1 and rest == 0
  assert config.loss.train_projection == (recipe == "paper")
  assert config == to_dataclass(TrainConfig, module.get_config(argument).to_dict())
  with pytest.raises(ValueError, match="7b:big does not exist; expected one of"):
    module.get_config("big")


def test_pretraining_has_the_papers_tokens_on_every_machine():
  for topology in pods.PODS:
    config = to_dataclass(TrainConfig, pretrain_7b.get_config(topology).to_dict())
    tokens = config.num_steps * config.batch_size * config.data.sequence_length
    assert tokens == pytest.approx(140_000 * 480 * 1300, rel=1e-4)
    assert config.optimizer.warmup_steps == pytest.approx(0.05 * config.num_steps, abs=1)


def test_the_base_config_is_the_paper_and_released_switches_all():
  config = to_dataclass(TrainConfig, base.get_config().to_dict())
  assert config.loss.perceptual_weight == 0.1 and config.loss.perceptual_pairing == "predicting"
  for name, value in PAPER.training.items():
    section, field = name.split(".")
    assert getattr(getattr(config, section), field) == value, name
  c = base.get_config()
  base.apply(c, RELEASED.training)
  released = to_dataclass(TrainConfig, c.to_dict())
  assert released.loss.perceptual_distance == "mse" and not released.loss.train_projection


@pytest.mark.parametrize(
  "change, message",
  [
    (
      {"model.num_layer": 2},
      "config.model.num_layer does not exist; did you mean config.model",
    ),
    ({"zzz": 2}, "config.zzz does not exist; it has seed, base"),
    ({"batch_size": "8"}, "config.batch_size is '8'; expected int"),
    ({"batch_size": True}, "config.batch_size is True; expected int"),
    ({"batch_size": 0}, "config.batch_size is 0; it must be at least 1"),
    ({"accumulate": 3}, "config.batch_size 8 is not a multiple of config.accumulate 3"),
    ({"loss.perceptual_pairing": "own_position"}, "config.data.code_noise is 0.2, but config.loss"),
    ({"model.max_segments": 4}, "config.data.max_samples is 0, but must be 1 to 3 for that"),
    ({"loss.normaliser": "mean"}, "loss.normaliser 'mean'; expected one of"),
    ({"data.loss_weights.prompt": -1.0}, "data.loss_weights.prompt is -1.0; it must be >= 0"),
    ({"data.mixture_unit": "bytes"}, "data.mixture_unit 'bytes'"),
  ],
)
def test_wrong_values_are_named(change, message):
  config = demo.get_config()
  with config.unlocked():
    for key, value in change.items():
      section, _, name = key.rpartition(".")
      target = config
      for part in section.split(".") if section else []:
        target = target[part]
      target._fields[name] = value
  with pytest.raises(ValueError, match=message.replace("[", r"\[")):
    to_dataclass(TrainConfig, config.to_dict())


def test_a_missing_field_is_named():
  values = demo.get_config().to_dict()
  del values["num_steps"]
  with pytest.raises(ValueError, match="config.num_steps is missing"):
    to_dataclass(TrainConfig, values)


def test_unknown_arguments_and_misspelt_flags_are_named():
  with pytest.raises(ValueError, match="demo:big does not exist; expected one of"):
    demo.get_config("big")
  done = subprocess.run(
    [sys.executable, "-m", "aromni_jax.cli", "train", "--config=configs/demo.py:tiny"]
    + ["--workdir=never", "--config.model.num_layer=2"],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode != 0 and "num_layer" in done.stderr and not (ROOT / "never").exists()
