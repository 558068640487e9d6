import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from aromni_jax import checkpoint, model_dir, train_loop
from aromni_jax.config import TrainConfig, to_dataclass
from configs import demo

ROOT = pathlib.Path(__file__).parents[1]


def make_config(shards, **changes):
  c = demo.get_config("tiny")
  c.data.shards = str(shards)
  c.num_steps, c.batch_size, c.eval_batches = 8, 8, 1
  c.log_every, c.checkpoint_every = 1, 3
  c.data.sequence_length = 256
  c.update_from_flattened_dict(changes)
  return c


def train(config, workdir):
  return train_loop.train(to_dataclass(TrainConfig, config.to_dict()), str(workdir))


def losses(workdir):
  lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {x["step"]: (x["loss"], x["tokens"], x["grad_norm"]) for x in lines if "loss" in x}


def command(shards, workdir, *more):
  return [
    *(sys.executable, "-m", "aromni_jax.train", "--config=configs/demo.py:tiny"),
    *(f"--workdir={workdir}", f"--config.data.shards={shards}", "--config.num_steps=8"),
    *("--config.log_every=1", "--config.checkpoint_every=3", "--config.eval_batches=1"),
    *("--config.data.sequence_length=256", *more),
  ]


def start(args, devices=8):
  env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
  return subprocess.Popen(args, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def wait_for(path, step, process):
  deadline = time.time() + 240
  while time.time() < deadline and process.poll() is None:
    if path.exists() and f'"step": {step},' in path.read_text():
      return
    time.sleep(0.01)
  raise AssertionError(f"step {step} was not reached: {process.stderr.read()[-2000:]}")


@pytest.fixture(scope="module")
def unbroken(shards, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("unbroken")
  train(make_config(shards), workdir)
  return workdir


def test_kill_and_resume_equals_an_unbroken_run(shards, unbroken, tmp_path):
  slow = "--config.num_steps=8"
  process = start(command(shards, tmp_path, slow))
  wait_for(tmp_path / "metrics.jsonl", 5, process)
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stderr.close()
  train(make_config(shards), tmp_path)
  assert losses(tmp_path) == losses(unbroken)  # losses, batches and gradients, bit for bit
  ours, theirs = (checkpoint.load_params(p / "model" / "decoder") for p in (tmp_path, unbroken))
  import jax

  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_sigterm_saves_and_leaves(shards, unbroken, tmp_path):
  process = start(command(shards, tmp_path, "--config.num_steps=100000"))
  wait_for(tmp_path / "metrics.jsonl", 2, process)
  process.send_signal(signal.SIGTERM)
  _, log = process.communicate(timeout=120)
  assert process.returncode == 0, log[-2000:]
  step = max(losses(tmp_path))
  assert f"SIGTERM: saved step {step} and left" in log
  assert checkpoint.Checkpoints(str(tmp_path)).latest_step == step


def test_trained_model_directory_is_whole(shards, unbroken):
  model = model_dir.load_model(unbroken / "model")
  assert model.decoder.config.num_layers == 2
  assert model.fingerprints == model_dir.load_model().fingerprints
  lines = [json.loads(x) for x in (unbroken / "metrics.jsonl").read_text().splitlines()]
  assert lines[-1]["validation/loss"] > 0 and lines[-1]["step"] == 8
  assert {"tokens_per_second", "modality/speech", "loss/perceptual"} <= lines[0].keys()
  assert list((unbroken / "tensorboard").iterdir())


def test_non_finite_loss_stops_and_saves_nothing_after(shards, tmp_path):
  config = make_config(shards, **{"optimizer.learning_rate": float("nan"), "checkpoint_every": 1})
  with pytest.raises(FloatingPointError, match="loss is nan at step 2.*nothing was saved"):
    train(config, tmp_path)
  assert checkpoint.Checkpoints(str(tmp_path)).latest_step == 1
  assert not (tmp_path / "model").exists()


def test_another_model_in_the_workdir_is_named(shards, unbroken, tmp_path):
  with pytest.raises(ValueError, match="another model: model.mlp_dim is 96, was 64"):
    train(make_config(shards, **{"model.mlp_dim": 96}), unbroken)
  with pytest.raises(ValueError, match="the state of optimizer.name muon, not adam"):
    train(make_config(shards, **{"optimizer.name": "adam"}), unbroken)


def test_validation_is_clean(shards, tmp_path):
  found = []
  for noise in (0.0, 0.5):
    changes = {"data.code_noise": noise, "data.drop_prompt": noise, "num_steps": 1}
    train(make_config(shards, **changes, **{"optimizer.learning_rate": 0.0}), tmp_path / str(noise))
    lines = (tmp_path / str(noise) / "metrics.jsonl").read_text().splitlines()
    found.append(json.loads(lines[-1])["validation/loss"])
  assert found[0] == found[1]


def test_wrong_starts_are_named(shards, tmp_path):
  with pytest.raises(ValueError, match="config.model.vocab_size is 100, but the vocabulary"):
    train(make_config(shards, **{"model.vocab_size": 100}), tmp_path)
  with pytest.raises(ValueError, match="config.init_from_base: .* has no decoder"):
    train(make_config(shards, init_from_base=True, base=str(no_decoder(tmp_path))), tmp_path / "x")
  file = tmp_path / "file"
  file.write_text("")
  with pytest.raises(ValueError, match="--workdir .* cannot be written"):
    train(make_config(shards), file / "run")


def test_fine_tuning_needs_the_base_models_shape(shards, unbroken, tmp_path):
  base = str(unbroken / "model")
  changes = {"init_from_base": True, "base": base, "num_steps": 1}
  with pytest.raises(ValueError, match="decoder in .* do not fit config.model: .*wrong shapes"):
    train(make_config(shards, **changes, **{"model.mlp_dim": 96}), tmp_path / "a")
  train(make_config(shards, **changes), tmp_path / "b")
  assert losses(tmp_path / "b")[1][0] < losses(unbroken)[1][0]  # it starts where the base ended


def no_decoder(tmp_path):
  out = tmp_path / "base"
  model_dir.shutil.copytree(
    model_dir.SHIPPED, out, ignore=model_dir.shutil.ignore_patterns("decoder")
  )
  info = json.loads((out / "model.json").read_text())
  info.pop("decoder", None)
  (out / "model.json").write_text(json.dumps(info))
  return out
