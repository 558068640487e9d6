"""Training in two real processes of four devices each."""

import socket

import jax
import numpy as np

from aromni_jax import checkpoint
from tests.test_train_loop import command, losses, make_config, start, train


def free_port():
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def train_in_two(shards, workdir, *more):
  address = f"--coordinator=localhost:{free_port()}"
  processes = [
    start(
      command(shards, workdir, address, "--num_processes=2", f"--process_id={i}", *more), devices=4
    )
    for i in range(2)
  ]
  try:
    logs = [p.communicate(timeout=300)[1] for p in processes]
  finally:
    for p in processes:
      p.kill()
  for p, log in zip(processes, logs, strict=True):
    assert p.returncode == 0, log[-3000:]


def test_two_processes_equal_one(shards, tmp_path):
  """Four steps in two processes, the other four in one: losses as in an unbroken run of one."""
  one, two = tmp_path / "one", tmp_path / "two"
  changes = {"mesh.data": 2, "mesh.fsdp": 4, "optimizer.schedule": "constant"}
  train(make_config(shards, **changes), one)
  flags = [f"--config.{k}={v}" for k, v in changes.items()]
  train_in_two(shards, two, *flags, "--config.num_steps=4")
  assert (two / "model" / "model.json").is_file() and not (two / "model.partial").exists()
  assert losses(two).keys() == {1, 2, 3, 4}
  train(make_config(shards, **changes), two)
  ours, theirs = losses(two), losses(one)
  assert ours.keys() == theirs.keys()
  for step, values in theirs.items():
    np.testing.assert_allclose(ours[step], values, rtol=2e-5, err_msg=f"step {step}")
  params = (checkpoint.load_params(d / "model" / "decoder") for d in (two, one))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *params)
