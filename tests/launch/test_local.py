"""Processes of this machine: real ones."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from launch import processes

ROOT = pathlib.Path(__file__).parents[2]


def script(text):
  """Returns a command per process that runs Python text with its number in `n`."""
  return lambda address, n: [sys.executable, "-c", f"n = {n}\n{text}"]


def test_logs_are_prefixed_and_collected(tmp_path, capsys):
  assert processes.run(script("print('hello from', n)"), 2, tmp_path / "logs", 0) == 0
  assert sorted(capsys.readouterr().out.splitlines()) == ["[0] hello from 0", "[1] hello from 1"]
  assert (tmp_path / "logs/process-1.log").read_text() == "hello from 1\n"


def test_one_that_dies_ends_all(tmp_path, monkeypatch):
  """The other one ignores SIGTERM, as one that waits for its peer does."""
  monkeypatch.setattr(processes, "_GRACE", 0.5)
  text = (
    "import os, signal, sys, time\n"
    "if n == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "time.sleep(60)"
  )
  began = time.monotonic()
  assert processes.run(script(text), 2, tmp_path, 0) == 128 + signal.SIGKILL
  assert time.monotonic() - began < 30


def test_restarts_after_an_abnormal_end(tmp_path, capsys):
  text = (
    "import pathlib, sys\n"
    f"starts = pathlib.Path({str(tmp_path)!r}) / f'starts-{{n}}'\n"
    "count = len(starts.read_text()) if starts.exists() else 0\n"
    "starts.write_text('x' * (count + 1))\n"
    "sys.exit(5 if count < 2 else 0)"
  )
  assert processes.run(script(text), 2, tmp_path, 1) == 5
  assert (tmp_path / "starts-0").read_text() == "xx"
  assert processes.run(script(text), 2, tmp_path, 1) == 0
  assert "== ended with exit code 5; 1 restarts left" in capsys.readouterr().out


def test_sigterm_is_passed_on_and_not_restarted(tmp_path):
  text = (
    "import signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(0)))\n"
    "print('ready', flush=True)\n"
    "time.sleep(60)"
  )

  def stop():
    logs = [tmp_path / f"process-{n}.log" for n in range(2)]
    while not all(log.exists() and "ready" in log.read_text() for log in logs):
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)

  thread = threading.Thread(target=stop, daemon=True)
  thread.start()
  assert processes.run(script(text), 2, tmp_path, 3) == 143
  for n in range(2):
    assert (tmp_path / f"process-{n}.log").read_text() == "ready\nsaved\n"


def test_a_training_survives_the_death_of_a_process(shards, tmp_path):
  """`launch.run --target=local` in two processes; one is killed with SIGKILL after step 4."""
  workdir = tmp_path / "run"
  line = (
    *("--config=configs/demo.py:tiny", f"--workdir={workdir}", f"--config.data.shards={shards}"),
    *("--config.num_steps=8", "--config.log_every=1", "--config.checkpoint_every=2"),
    *("--config.data.sequence_length=256", "--config.eval_batches=0"),
  )
  own = ("--target=local", "--processes=2", "--devices=1", "--restarts=1", f"--out={tmp_path}")
  command = [sys.executable, "-m", "launch.run", *own, "--name=logs", "--", *line]
  launcher = subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )
  lines, killed = [], False
  metrics = workdir / "metrics.jsonl"
  try:
    for text in launcher.stdout:
      lines.append(text)
      if not killed and metrics.exists() and '"step": 4,' in metrics.read_text():
        killed = True
        _kill_process_one(str(workdir))
  finally:
    if sys.exc_info()[0]:
      launcher.terminate()
  output = "".join(lines)
  assert launcher.wait(timeout=300) == 0, output[-3000:]
  assert killed and "== ended with exit code 137; 1 restarts left" in output, output[-3000:]
  steps = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert {x["step"] for x in steps if "loss" in x} == set(range(1, 9))
  assert (workdir / "model/model.json").is_file()
  assert (tmp_path / "logs/process-1.log").stat().st_size


def _kill_process_one(workdir):
  """Kills the training process 1 of this run, which its arguments name."""
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      words = path.read_bytes().decode(errors="replace").split("\0")
    except OSError:
      continue
    if {"aromni_jax.train", "--process_id=1", f"--workdir={workdir}"} <= set(words):
      os.kill(int(path.parent.name), signal.SIGKILL)
      return
  pytest.fail("process 1 is not there")
