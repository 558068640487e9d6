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

from aromni_jax.launch import processes

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


def test_restarts_after_a_kill_or_42(tmp_path, capsys):
  """Process 0 is killed, then leaves with 42 twice; 1 is started anew with it, and waits for it."""
  text = (
    "import os, pathlib, sys, time\n"
    f"starts = pathlib.Path({str(tmp_path / 'starts')!r})\n"
    "count = lambda: len(starts.read_text()) if starts.exists() else 0\n"
    "while n == 1 and count() < 4: time.sleep(0.01)\n"
    "if n == 1: sys.exit()\n"
    "starts.write_text('x' * (count() + 1))\n"
    "if count() == 1: os.kill(os.getpid(), 9)\n"
    "sys.exit(42 if count() < 4 else 0)"
  )
  logs = tmp_path / "logs"
  assert processes.run(script(text), 2, logs, 1) == 42
  assert (tmp_path / "starts").read_text() == "xx"
  out = capsys.readouterr().out
  assert "== ended with exit code 137; 1 restarts left" in out
  assert "== ended with exit code 42; 0 restarts left" in out
  assert processes.run(script(text), 2, logs, 1) == 0
  assert (tmp_path / "starts").read_text() == "xxxx"


def test_an_error_is_not_restarted(tmp_path, capsys):
  assert processes.run(script("import sys; print('no'); sys.exit(1)"), 1, tmp_path, 3) == 1
  assert capsys.readouterr().out == "[0] no\n"


def test_sigterm_is_passed_on_and_not_restarted(tmp_path):
  text = (
    "import signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(42)))\n"
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
  assert processes.run(script(text), 2, tmp_path, 3) == 42
  for n in range(2):
    assert (tmp_path / f"process-{n}.log").read_text() == "ready\nsaved\n"


@pytest.mark.slow
def test_a_training_runs(shards, tmp_path):
  """`launch.run --target=local`, for real; tests/test_processes.py kills trainings and goes on."""
  workdir = tmp_path / "run"
  line = (
    *("--config=configs/demo.py:tiny", f"--workdir={workdir}", f"--config.data.shards={shards}"),
    *("--config.num_steps=2", "--config.log_every=1", "--config.eval_batches=0"),
    *("--config.data.sequence_length=256", "--config.model.num_layers=1"),
    *("--config.optimizer.name=adam", "--config.optimizer.warmup_steps=1"),
  )
  own = ("--target=local", "--devices=1", f"--out={tmp_path}", "--name=logs")
  command = [sys.executable, "-m", "launch.run", *own, "--", *line]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout[-3000:]
  steps = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert [x["step"] for x in steps if "loss" in x] == [1, 2]
  assert (workdir / "model/model.json").is_file()
  log = (tmp_path / "logs/process-0.log").read_text()
  assert "step 2 " in log and all(f"[0] {x}" in done.stdout for x in log.splitlines())
