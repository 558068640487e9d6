"""Runs of several real processes: that they join, agree, train alike, and end together.

What needs no model runs in workers of a second or two; training has one chain of runs.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from aromni_jax import storage
from aromni_jax.cluster import agreement
from aromni_jax.training import checkpoint
from aromni_jax.training.config import TrainConfig, to_dataclass
from tests.tiny import train_config
from tests.training.test_loop import ROOT, command, losses, start, train, wait_for

pytestmark = pytest.mark.processes

# Joins, and does what its argument says; `beat` is a step of a run.
_WORKER = """
import os, sys, time
from absl import app, flags
from aromni_jax.cluster import agreement, watch
index, count, address, what, *rest = sys.argv[1:]
index = int(index)
def beat(watchdog, step):
  watchdog.note(step, "step")
  watchdog.first_step_is_done()
  agreement.gather("step", str(step))
  print("step", step, flush=True)
  time.sleep(0.1)
with watch.ending_together():
  agreement.join(address, int(count), index, join_timeout=int(os.environ["JOIN"]), host_timeout=6)
  if what == "agree":
    agreement.agree({"config.batch_size": rest[index], "jax version": "1"})
  if what == "workdir":
    agreement.check_workdir(rest[index])
  if what == "steps":
    watchdog = watch.Watchdog(float(os.environ.get("STEP", 0)), 0.0)
    for step in range(1, 1000):
      beat(watchdog, step)
      if step == 3 and index == int(rest[0]):
        exec(rest[1])
print("done", flush=True)
"""


def free_port():
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


class Workers:
  """Workers of one run, started at once.

  Args:
    count: how many the run has.
    what, rest: what they do, see `_WORKER`.
    join: seconds that they wait for each other.
    only: which of them are started; all by default.
    env: environment.
  """

  def __init__(self, count, what, *rest, join=60, only=None, **env):
    address = f"localhost:{free_port()}"
    self._workers = [
      subprocess.Popen(
        [sys.executable, "-c", _WORKER, str(i), str(count), address, what, *rest],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JOIN": str(join)} | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
      )
      for i in (range(count) if only is None else only)
    ]

  def ends(self, but=None):
    """Statuses and outputs, once all but one have ended; that one, and what hangs, is killed."""
    deadline = time.monotonic() + 60
    for i, worker in enumerate(self._workers):
      with contextlib.suppress(subprocess.TimeoutExpired):
        if i != but:
          worker.wait(timeout=max(0.0, deadline - time.monotonic()))
    for worker in self._workers:
      worker.kill()
    out = [(worker.wait(), worker.communicate()[0]) for worker in self._workers]
    return [x for i, x in enumerate(out) if i != but]


@pytest.fixture(scope="module")
def accidents(tmp_path_factory):
  """What becomes of runs in which something is wrong or goes wrong after step 3, side by side."""
  folder = tmp_path_factory.mktemp("folders")
  (folder / "file").write_text("")
  killed, stopped = (f"time.sleep(1); os.kill(os.getpid(), {n})" for n in (9, 19))
  runs = {
    "killed 0": Workers(2, "steps", "0", killed),
    "killed 1": Workers(3, "steps", "1", killed),
    "stopped 0": Workers(2, "steps", "0", stopped),
    "stopped 1": Workers(2, "steps", "1", stopped),
    "hangs": Workers(2, "steps", "1", "time.sleep(100)", STEP="4"),
    "fails": Workers(2, "steps", "1", "raise ValueError('no such file')"),
    "apart": Workers(2, "workdir", f"{folder}/a", f"{folder}/b"),
    "unwritable": Workers(2, "workdir", f"{folder}/a", f"{folder}/file/b"),
    "shared": Workers(2, "workdir", f"{folder}/a", f"{folder}/a"),
    "differ": Workers(3, "agree", "8", "16", "8"),
    "alone 0": Workers(2, "steps", "9", "", join=6, only=[0]),
    "alone 1": Workers(2, "steps", "9", "", join=6, only=[1]),
  }
  but = {"stopped 0": 0, "stopped 1": 1}  # nothing but a kill ends a stopped process
  out = {name: run.ends(but.get(name)) for name, run in runs.items()}
  assert not list((folder / "a").iterdir())  # probes are deleted
  return out


def test_processes_that_differ_are_named(accidents):
  for status, text in accidents["differ"]:
    assert status == 1, text
    assert "config.batch_size is '16' in process 1, '8' in 0" in text and "jax" not in text


def test_a_folder_that_is_not_shared_or_writable_is_named(accidents):
  for status, text in accidents["shared"]:
    assert status == 0 and text.endswith("done\n"), text
  for status, text in accidents["apart"]:
    assert status == 1 and "not one folder that all hosts share: process 1 on" in text, text
  for status, text in accidents["unwritable"]:
    assert status == 1 and "cannot be written: process 1 on" in text, text
  with pytest.raises(ValueError, match="--workdir gs://bucket/run is an address"):
    agreement.check_workdir("gs://bucket/run")


def test_an_error_of_one_process_ends_all(accidents):
  (status0, text0), (status1, text1) = accidents["fails"]
  assert (status0, status1) == (1, 1)
  assert "error: process 1 (" in text0 and "failed: no such file" in text0
  assert "error: no such file" in text1


def test_a_killed_process_ends_the_others(accidents):
  first, (killed, _), last = accidents["killed 1"]
  for status, text in (first, last):
    assert (status, killed) == (42, -signal.SIGKILL), text
    assert "nothing was heard for 6 s of process 1 (last seen on" in text and "at step 3" in text
  (killed, _), (status, text) = accidents["killed 0"]  # JAX itself ends those without coordinator
  assert (status, killed) == (-signal.SIGABRT, -signal.SIGKILL), text
  assert "leader task was preempted/died" in text


def test_a_stopped_process_ends_the_others(accidents):
  ((status, text),) = accidents["stopped 1"]
  assert status == 42 and "of process 1 (last seen on" in text and "at step 3" in text, text
  ((status, text),) = accidents["stopped 0"]
  assert status == 42 and "process 0, which holds the coordinator, has not answered" in text, text
  assert "at step 3" in text


def test_a_step_that_hangs_ends_all_and_shows_where(accidents):
  out = accidents["hangs"]
  assert [status for status, _ in out] == [42, 42], out
  texts = "".join(text for _, text in out)
  assert "nothing has moved for 4 s (config.step_timeout) in activity 'step' after step 3" in texts
  assert "Last seen: process" in texts
  assert "most recent call first" in texts and 'File "<string>"' in texts


def test_others_that_do_not_come_are_named(accidents):
  ((status, text),) = accidents["alone 1"]
  assert status == 42 and "cannot be reached" in text and "--join_timeout" in text, text
  ((status, text),) = accidents["alone 0"]
  assert status == 42 and "not all of --num_processes=2 processes came" in text, text


@pytest.mark.parametrize(
  "flags, message",
  [
    (("nowhere", 2, 0), "--coordinator is 'nowhere'; expected auto or HOST:PORT"),
    (("localhost:1234", None, 0), "also needs --num_processes and --process_id"),
    (("localhost:1234", 2, 2), "--process_id is 2, with --num_processes=2; expected 0 to 1"),
    ((None, 2, 0), "need --coordinator=HOST:PORT"),
  ],
)
def test_wrong_flags_are_named(flags, message):
  with pytest.raises(ValueError, match=message):
    agreement.join(*flags, join_timeout=3, host_timeout=3)


def test_a_port_that_is_taken_is_named():
  with socket.socket() as s:
    s.bind(("", 0))
    s.listen()
    port = s.getsockname()[1]
    with pytest.raises(ValueError, match=f"port {port} of this machine cannot be had"):
      agreement.join(f"localhost:{port}", 2, 0, join_timeout=3, host_timeout=3)


def start_all(shards, workdir, count, devices, *more, own=lambda i: ()):
  address = f"--coordinator=localhost:{free_port()}"
  flags = [address, f"--num_processes={count}", "--host_timeout=10", "--config.eval_batches=0"]
  return [
    start(command(shards, workdir, *flags, f"--process_id={i}", *more, *own(i)), devices=devices)
    for i in range(count)
  ]


def end_all(workers):
  """Statuses and logs."""
  try:
    logs = [w.communicate(timeout=300)[1] for w in workers]
  finally:
    for w in workers:
      w.kill()
  return [w.returncode for w in workers], logs


def test_runs_with_other_configurations_are_named(shards, tmp_path):
  workers = start_all(shards, tmp_path, 2, 1, own=lambda i: [f"--config.optimizer.b1=0.{8 + i}"])
  statuses, logs = end_all(workers)
  assert statuses == [1, 1], logs
  for log in logs:
    assert "config.optimizer.b1 is '0.9' in process 1, '0.8' in 0." in log and "batch" not in log
  assert not list(tmp_path.iterdir())  # before anything is written


def test_facts_are_of_config_code_packages_and_data(shards):
  manifest = shards / "manifest.json"
  a, b = (
    agreement.facts(to_dataclass(TrainConfig, train_config(shards, seed=s).to_dict()), manifest)
    for s in (0, 1)
  )
  assert {name for name in a if a[name] != b[name]} == {"config.seed"}
  assert {"jax version", "python", "aromni_jax", "XLA_FLAGS", str(manifest)} <= a.keys()
  assert "missing" not in a.values() and len(a) > 60


def test_a_run_survives_on_other_processes_and_meshes(shards, tmp_path):
  """Two processes until one is killed, two that share all rows until one is told to leave, then one
  on another mesh: the losses of an unbroken run in one process, with mixing and packing."""
  one, many = tmp_path / "one", tmp_path / "many"
  changes = {
    "optimizer.name": "adam",  # fewer collectives, which are slow between processes
    "model.num_layers": 1,
    "model.num_heads": 4,
    "model.num_kv_heads": 4,
    "checkpoint_every": 2,
    "export_dtype": "float32",
  }
  endless = [f"--config.{k}={v}" for k, v in changes.items()] + ["--config.num_steps=1000"]
  rows_apart = ["--config.mesh.data=2", "--config.mesh.fsdp=2"]
  rows_shared = [f"--config.mesh.{axis}" for axis in ("data=1", "fsdp=1", "tensor=4")]

  workers = start_all(shards, many, 2, 2, *endless, *rows_apart)
  wait_for(many / "metrics.jsonl", 3, workers[0])
  workers[1].send_signal(signal.SIGKILL)
  statuses, logs = end_all(workers)
  assert statuses == [42, -signal.SIGKILL], logs[0][-3000:]
  message = "error: nothing was heard for 10 s of process 1 (last seen on"
  assert message in logs[0], logs[0][-3000:]
  killed_after = max(losses(many))

  workers = start_all(shards, many, 2, 2, *endless, *rows_shared)  # both read every row
  wait_for(many / "metrics.jsonl", killed_after + 1, workers[0])
  workers[1].send_signal(signal.SIGTERM)
  statuses, logs = end_all(workers)
  assert statuses == [42, 42], logs[0][-3000:]
  step = max(losses(many))
  assert all(f"Preempted: saved step {step}; the same command" in log for log in logs)
  assert checkpoint.Checkpoints(str(many)).latest_step == step
  redone = f"Going on from step {(killed_after // 2) * 2} of", f"{(killed_after // 2) * 2 - 2} of"
  assert any(text in logs[0] for text in redone)  # the last save may have been torn

  for folder in (many, one):
    train(train_config(shards, num_steps=step + 2, eval_batches=0, **changes), folder)
  ours, theirs = losses(many), losses(one)
  assert ours.keys() == theirs.keys() == set(range(1, step + 3))
  for number, values in theirs.items():
    np.testing.assert_allclose(ours[number], values, rtol=2e-5, err_msg=f"step {number}")
  params = (storage.load_params(d / "model" / "decoder") for d in (many, one))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *params)
  assert attempts(many) == {1: "", 2: "preempted", 3: "finished"}


def attempts(workdir):
  lines = (workdir / "attempts.jsonl").read_text().splitlines()
  return {json.loads(line)["attempt"]: json.loads(line)["end"] for line in lines}
