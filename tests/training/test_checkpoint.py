"""Checkpoints of a run when a save is cut off, files go missing, or the disk is full."""

import contextlib
import logging
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from aromni_jax.training.checkpoint import Checkpoints
from tests.cluster.test_processes import free_port

# What Orbax leaves behind of a read or a write that failed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = {"model": {"num_layers": 1}, "optimizer": {"name": "adam"}}


def make_state(step, size=64, shape=(8,), names=("fsdp",), spec=("fsdp",)):
  mesh = jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))
  split = NamedSharding(mesh, PartitionSpec(*spec))
  return {
    "w": jax.jit(jax.random.normal, static_argnums=1, out_shardings=split)(
      jax.random.key(step), (size, 256)
    ),
    "step": jax.device_put(np.int32(step), NamedSharding(mesh, PartitionSpec())),
  }


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save(checkpoints, step, **options):
  checkpoints.save(step, make_state(step, **options), {"next_index": step}, CONFIG)


def check_restored(workdir, step, **options):
  """The newest good checkpoint is that of a step, bit for bit; returns the `Checkpoints`."""
  checkpoints, want = Checkpoints(str(workdir)), make_state(step, **options)
  state, data = checkpoints.restore(abstract(want), CONFIG)
  jax.tree.map(np.testing.assert_array_equal, state, want)
  assert data == {"next_index": step} and checkpoints.latest_step == step
  assert state["w"].sharding == want["w"].sharding
  return checkpoints


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  """A folder with the checkpoints of steps 1 and 2."""
  workdir = tmp_path_factory.mktemp("two")
  checkpoints = Checkpoints(str(workdir))
  save(checkpoints, 1)
  save(checkpoints, 2)
  checkpoints.close()
  return workdir


def test_another_mesh_reads_it(two):
  mesh = {"shape": (2, 4), "names": ("data", "tensor"), "spec": (None, "tensor")}
  check_restored(two, 2, **mesh).close()
  check_restored(two, 2, shape=(1,), names=("fsdp",)).close()


def test_a_step_that_donates_the_state_does_not_change_what_is_saved(tmp_path):
  checkpoints = Checkpoints(str(tmp_path))
  state = make_state(1, size=20_000)
  step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
  step.lower(state).compile()
  checkpoints.save(1, state, {"next_index": 1}, CONFIG)
  jax.block_until_ready(step(state))
  checkpoints.close()
  check_restored(tmp_path, 1, size=20_000).close()


@pytest.mark.parametrize("damage", ["remove", "empty", "half"])
def test_damaged_files_lead_to_the_checkpoint_before(two, tmp_path, caplog, damage):
  """Whichever file of the newest is hit: it is read right, or the one before is."""
  files = [p for p in sorted((two / "checkpoints/2").rglob("*")) if p.is_file()]
  fell_back = set()
  for number, file in enumerate(files):
    workdir = tmp_path / str(number)
    shutil.copytree(two, workdir)
    hit = workdir / file.relative_to(two)
    data = hit.read_bytes()
    hit.unlink() if damage == "remove" else hit.write_bytes(
      data[: len(data) // 2 * (damage == "half")]
    )
    caplog.clear()
    with caplog.at_level(logging.ERROR):
      checkpoints = Checkpoints(str(workdir))
      state, position = checkpoints.restore(abstract(make_state(0)), CONFIG)
    step = position["next_index"]
    jax.tree.map(np.testing.assert_array_equal, state, make_state(step))
    assert step == checkpoints.latest_step
    if step == 1:
      fell_back.add(file.relative_to(two / "checkpoints/2").parts[0])
      assert "CHECKPOINT DAMAGED" in caplog.text and "going on from step 1" in caplog.text
      assert (workdir / "checkpoints/2.damaged").is_dir()
    checkpoints.close()
  assert fell_back >= {"state", "data", "config"}


def test_a_run_goes_on_after_falling_back(two, tmp_path):
  shutil.copytree(two, tmp_path / "run")
  (tmp_path / "run/checkpoints/2/state/manifest.ocdbt").unlink()
  checkpoints = check_restored(tmp_path / "run", 1)
  save(checkpoints, 2)  # the step that was damaged is saved again
  checkpoints.close()
  check_restored(tmp_path / "run", 2).close()


def test_no_good_checkpoint_is_an_error_that_touches_nothing(two, tmp_path):
  shutil.copytree(two, tmp_path / "run")
  (tmp_path / "run/checkpoints/2/state/manifest.ocdbt").unlink()
  (tmp_path / "run/checkpoints/1/data/metadata").unlink()
  with pytest.raises(
    ValueError, match=r"no checkpoint in .* can be read:\n  step 2: .*\n  step 1:"
  ):
    check_restored(tmp_path / "run", 1)
  assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} == {"1", "2"}


_KILLED = """
import os, signal
from tests import conftest
from tests.training import test_checkpoint
checkpoints = test_checkpoint.Checkpoints({workdir!r})
test_checkpoint.save(checkpoints, 1)
checkpoints.check()
test_checkpoint.save(checkpoints, 2, size=200_000)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_killed_while_saving(tmp_path):
  code = _KILLED.format(workdir=str(tmp_path))
  killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
  names = [p.name for p in (tmp_path / "checkpoints").iterdir()]
  assert len(names) == 2 and "1" in names and "2" not in names  # 2 was being written
  checkpoints = check_restored(tmp_path, 1)
  save(checkpoints, 2)
  checkpoints.close()
  assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"1", "2"}
  check_restored(tmp_path, 2).close()


_ONE_OF_TWO = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize({address!r}, 2, int(sys.argv[1]))
import numpy as np
from aromni_jax.training.checkpoint import Checkpoints
from tests.training.test_checkpoint import CONFIG, abstract, make_state

checkpoints = Checkpoints({workdir!r})
for step in (1, 2):
  checkpoints.save(step, make_state(step, shape=(4,)), {{"next_index": step}}, CONFIG)
checkpoints.close()

read = Checkpoints._read_state
def damaged(self, path, abstract_state):
  if jax.process_index() == 1 and path.name == "2":
    raise OSError("process 1 cannot read this")
  return read(self, path, abstract_state)
Checkpoints._read_state = damaged
checkpoints = Checkpoints({workdir!r})
want = make_state(1, shape=(4,))
state, data = checkpoints.restore(abstract(want), CONFIG)
assert data == {{"next_index": 1}} and checkpoints.latest_step == 1, data
for ours, theirs in zip(state["w"].addressable_shards, want["w"].addressable_shards, strict=True):
  np.testing.assert_array_equal(ours.data, theirs.data)
checkpoints.save(2, state, data, CONFIG)
checkpoints.close()
"""


@pytest.mark.slow
def test_processes_fall_back_together(tmp_path):
  """One of two processes cannot read its part of the newest: both take the one before."""
  code = _ONE_OF_TWO.format(address=f"localhost:{free_port()}", workdir=str(tmp_path))
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", code, str(i)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    for i in range(2)
  ]
  try:
    logs = [p.communicate(timeout=120)[1] for p in processes]
  finally:
    for p in processes:
      p.kill()
  for p, log in zip(processes, logs, strict=True):
    assert p.returncode == 0, log[-3000:]
  assert "process 1 cannot read this" in logs[1] and "see there" in logs[0]
  names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
  assert names == {"1", "2", "2.damaged"}


@contextlib.contextmanager
def disk_full_after(size):
  """Files cannot grow beyond `size` bytes; EFBIG stands in for ENOSPC."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_at_once_and_the_checkpoint_before_stays(tmp_path):
  checkpoints = Checkpoints(str(tmp_path), keep=1)
  save(checkpoints, 1, size=4000)
  checkpoints.check()
  checkpoints._manager.wait_until_finished()
  with disk_full_after(200_000):
    save(checkpoints, 2, size=4000)
    with pytest.raises(
      OSError, match="step 2 could not be written to .*/checkpoints: it takes up"
    ) as e:
      for _ in range(200):
        checkpoints.check()
        time.sleep(0.05)
  assert "The checkpoint of step 1 is whole" in str(e.value) and "GB are free" in str(e.value)
  assert "File too large" in str(e.value)
  checkpoints.close()
  again = check_restored(tmp_path, 1, size=4000)
  save(again, 3, size=4000)  # there is room again; what the failed save left is gone
  again.close()
  assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"1", "3"}


@pytest.mark.parametrize("then", ["save", "close"])
def test_a_failed_save_ends_the_next_save_and_the_end_of_a_run(tmp_path, then):
  checkpoints = Checkpoints(str(tmp_path))
  with disk_full_after(200_000):
    save(checkpoints, 1, size=4000)
    with pytest.raises(OSError, match="step 1 could not be written .* There is no earlier one"):
      save(checkpoints, 2, size=4000) if then == "save" else checkpoints.close()
  checkpoints.close()
  assert Checkpoints(str(tmp_path)).latest_step is None


def test_too_little_room_is_named_before_the_run(tmp_path, two, monkeypatch):
  state = {"w": jax.ShapeDtypeStruct((10**9,), jnp.float32)}
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=11_000_000_000))
  Checkpoints(str(tmp_path), keep=1).check_space(state)
  with pytest.raises(ValueError, match="11.00 GB free, but 12.00 GB more are needed: .*_kept 2"):
    Checkpoints(str(tmp_path), keep=2).check_space(state)
  Checkpoints(str(two), keep=2).check_space(state)  # two of the three are there already


def test_what_a_model_was_before_a_field_existed_is_its_default(two):
  checkpoints, state = Checkpoints(str(two)), abstract(make_state(2))
  later = CONFIG["model"] | {"per_head_norm": False, "attention": "xla"}
  _, data = checkpoints.restore(state, CONFIG | {"model": later})
  assert data == {"next_index": 2}
  with pytest.raises(ValueError, match="another model: model.per_head_norm is True, was False"):
    checkpoints.restore(state, CONFIG | {"model": later | {"per_head_norm": True}})
  with pytest.raises(ValueError, match="another model: model.num_layers is 2, was 1"):
    checkpoints.restore(state, CONFIG | {"model": later | {"num_layers": 2}})


def test_unwritable_folders_and_addresses_are_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="--workdir .*/file/run cannot be written: .*Not a dir"):
    Checkpoints(str(tmp_path / "file/run"))
  with pytest.raises(ValueError, match="--workdir gs://bucket/run is an address; expected a folde"):
    Checkpoints("gs://bucket/run")
