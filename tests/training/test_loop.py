import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from aromni_jax import model_dir, storage
from aromni_jax.cluster import watch
from aromni_jax.evaluation.hooks import make_hooks
from aromni_jax.evaluation.samples import Samples
from aromni_jax.model import load_model
from aromni_jax.training import checkpoint, loop
from aromni_jax.training.config import TrainConfig, to_dataclass
from tests.tiny import train_config, without_part

ROOT = pathlib.Path(__file__).parents[2]


def train(config, workdir, hooks=()):
  config = to_dataclass(TrainConfig, config.to_dict())
  return loop.train(config, str(workdir), model_dir.open_base(config.base), hooks=hooks)


def losses(workdir):
  lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {x["step"]: (x["loss"], x["tokens"], x["grad_norm"]) for x in lines if "loss" in x}


def command(shards, workdir, *more):
  return [
    *(sys.executable, "-m", "aromni_jax.train", "--config=configs/demo.py:tiny"),
    *(f"--workdir={workdir}", f"--config.data.shards={shards}", "--config.num_steps=8"),
    *("--config.log_every=1", "--config.checkpoint_every=3", "--config.eval_batches=1"),
    *("--config.data.sequence_length=256", "--config.optimizer.schedule=constant", *more),
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
  train(train_config(shards), workdir)
  return workdir


@pytest.mark.slow
def test_kill_and_resume_equals_an_unbroken_run(shards, unbroken, tmp_path):
  process = start(command(shards, tmp_path))
  wait_for(tmp_path / "metrics.jsonl", 5, process)
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stderr.close()
  train(train_config(shards), tmp_path)
  assert losses(tmp_path) == losses(unbroken)  # losses, batches and gradients, bit for bit
  ours, theirs = (storage.load_params(p / "model" / "decoder") for p in (tmp_path, unbroken))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.slow
def test_sigterm_saves_and_leaves(shards, unbroken, tmp_path, monkeypatch, caplog):
  """The signal arrives in step 2; tests/test_processes.py has the same for several processes."""
  report, before = loop._Run._report, signal.getsignal(signal.SIGTERM)

  def told(self, step, *rest):
    report(self, step, *rest)
    if step == 2:
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(loop._Run, "_report", told)
  try:
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as left:
      train(train_config(shards, num_steps=100_000), tmp_path)
  finally:
    signal.signal(signal.SIGTERM, before)
  assert left.value.code == watch.RUN_AGAIN == 42
  step = max(losses(tmp_path))
  assert step in (2, 3)  # metrics are fetched a step late
  assert f"Preempted: saved step {step}; the same command goes on from it" in caplog.text
  assert "Where " in caplog.text and "start-up and the rest" in caplog.text
  assert checkpoint.Checkpoints(str(tmp_path)).latest_step == step


@pytest.mark.slow
def test_trained_model_directory_is_whole(shards, unbroken):
  model = load_model(unbroken / "model")
  assert model.decoder.config.num_layers == 2
  assert model.fingerprints == load_model().fingerprints
  lines = [json.loads(x) for x in (unbroken / "metrics.jsonl").read_text().splitlines()]
  assert lines[-1]["validation/loss"] > 0 and lines[-1]["step"] == 8
  assert {"tokens_per_second", "modality/speech", "loss/perceptual"} <= lines[0].keys()
  shares = [v for k, v in lines[-2].items() if k.split("/")[0] == "goodput"]
  assert 0 < lines[-2]["goodput"] < 1 and abs(sum(shares) - 1) < 1e-6
  assert 0 <= lines[-2]["data_wait"] <= 1 and lines[-2]["step_seconds"] > 0
  assert list((unbroken / "tensorboard").iterdir())


@pytest.mark.slow
def test_non_finite_loss_stops_and_saves_nothing_after(shards, tmp_path):
  config = train_config(shards, **{"optimizer.learning_rate": float("nan"), "checkpoint_every": 1})
  with pytest.raises(FloatingPointError, match="loss is nan at step 2.*nothing was saved"):
    train(config, tmp_path)
  assert checkpoint.Checkpoints(str(tmp_path)).latest_step == 1
  assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_another_model_in_the_workdir_is_named(shards, unbroken, tmp_path):
  with pytest.raises(ValueError, match="another model: model.mlp_dim is 96, was 64"):
    train(train_config(shards, **{"model.mlp_dim": 96}), unbroken)
  with pytest.raises(ValueError, match="the state of optimizer.name muon, not adam"):
    train(train_config(shards, **{"optimizer.name": "adam"}), unbroken)


@pytest.mark.slow
def test_validation_is_clean(shards, tmp_path):
  found = []
  for noise in (0.0, 0.5):
    changes = {"data.code_noise": noise, "data.drop_prompt": noise, "num_steps": 1}
    changes["optimizer.learning_rate"] = 0.0
    train(train_config(shards, **changes), tmp_path / str(noise))
    lines = (tmp_path / str(noise) / "metrics.jsonl").read_text().splitlines()
    found.append(json.loads(lines[-1])["validation/loss"])
  assert found[0] == found[1]


def test_wrong_starts_are_named(shards, tmp_path):
  with pytest.raises(ValueError, match="config.model.vocab_size is 100, but the vocabulary"):
    train(train_config(shards, **{"model.vocab_size": 100}), tmp_path)
  with pytest.raises(ValueError, match="config.init_from_base: .* has no decoder"):
    base = str(without_part(tmp_path / "base", "decoder"))
    train(train_config(shards, init_from_base=True, base=base), tmp_path / "x")
  file = tmp_path / "file"
  file.write_text("")
  with pytest.raises(ValueError, match="--workdir .* cannot be written"):
    train(train_config(shards), file / "run")


@pytest.mark.slow
def test_fine_tuning_needs_the_base_models_shape(shards, unbroken, tmp_path):
  base = str(unbroken / "model")
  changes = {"init_from_base": True, "base": base, "num_steps": 1}
  with pytest.raises(ValueError, match="decoder in .* do not fit config.model: .*wrong shapes"):
    train(train_config(shards, **changes, **{"model.mlp_dim": 96}), tmp_path / "a")
  train(train_config(shards, **changes), tmp_path / "b")
  assert losses(tmp_path / "b")[1][0] < losses(unbroken)[1][0]  # it starts where the base ended


class Killed(BaseException):
  pass


@pytest.mark.slow
def test_what_was_due_when_a_run_was_killed_is_done_once(shards, tmp_path, monkeypatch):
  config = train_config(shards, num_steps=4, checkpoint_every=2, eval_every=2)
  samples, evaluate, export = [], loop._Run._evaluate, model_dir.export
  hooks = [loop.Hook("samples", 2, lambda step, decoder, writer: samples.append(step))]

  def killed(self, state):
    raise Killed

  def done():
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    names = "validation/loss", "samples"
    return [[x["step"] for x in lines if name in x] for name in names]

  monkeypatch.setattr(loop._Run, "_evaluate", killed)
  with pytest.raises(Killed):  # after the save of step 2, before its evaluation
    train(config, tmp_path, hooks)
  assert checkpoint.Checkpoints(str(tmp_path)).latest_step == 2 and done() == [[], []]
  monkeypatch.setattr(loop._Run, "_evaluate", evaluate)
  monkeypatch.setattr(model_dir, "export", killed)
  with pytest.raises(TypeError):  # after the last evaluation, before the model directory
    train(config, tmp_path, hooks)
  assert done() == [[2, 4], [2, 4]] and samples == [2, 4] and not (tmp_path / "model").exists()
  monkeypatch.setattr(model_dir, "export", export)
  train(config, tmp_path, hooks)
  assert (
    done() == [[2, 4], [2, 4]]
    and samples == [2, 4]
    and (tmp_path / "model" / "model.json").exists()
  )


@pytest.mark.slow
def test_profile_of_some_steps(shards, tmp_path):
  config = to_dataclass(TrainConfig, train_config(shards, num_steps=3, eval_batches=0).to_dict())
  base = model_dir.open_base()
  for window in ("3", "0:2", "2:2", "2:5"):
    with pytest.raises(ValueError, match=f"--profile_steps is .*{window}.*; expected"):
      loop.train(config, str(tmp_path), base, profile_steps=window)
  loop.train(config, str(tmp_path), base, profile_steps="2:3")
  (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
  assert trace.stat().st_size > 1000


def test_batches_that_cannot_be_divided_are_named(shards, tmp_path):
  for changes in ({"batch_size": 12}, {"accumulate": 2}):
    with pytest.raises(ValueError, match="config.batch_size .* is no multiple of .*mesh.data 8"):
      train(train_config(shards, **changes), tmp_path)
  assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_hooks_get_the_parameters_as_they_are_split(shards, tmp_path):
  looks = []

  def look(step, decoder, writer):
    (spec,) = {x.sharding.spec for x in jax.tree.leaves(nnx.state(decoder.layers.mlp.up))}
    looks.append((step, spec, jax.sharding.get_abstract_mesh().empty))

  changes = {"num_steps": 2, "eval_batches": 0, "mesh.fsdp": 4, "mesh.data": 2}
  train(train_config(shards, **changes), tmp_path, [loop.Hook("samples", 1, look)])
  split = PartitionSpec(None, "fsdp", "tensor")
  assert looks == [(1, split, True), (2, split, True)]


def test_hooks_are_named_in_the_configuration(shards):
  config = to_dataclass(TrainConfig, train_config(shards, sample_every=5).to_dict())
  (hook,) = make_hooks(config)
  assert (hook.name, hook.every) == ("samples", 5) and isinstance(hook.look, Samples)
  assert make_hooks(dataclasses.replace(config, sample_every=0)) == []
