"""`aromni plan` as it is called."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from aromni_jax.cluster.hardware import parse_topology

ROOT = pathlib.Path(__file__).parents[1]
PARTS = ("parameters", "optimiser", "gradients", "activations kept", "working set")


def plan(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "aromni_jax.plan", *arguments],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )


def test_a_plan(tmp_path):
  file = tmp_path / "plan.json"
  done = plan("--config=configs/pretrain_7b.py", "--topology=v5e:16x16", f"--json={file}")
  assert done.returncode == 0, done.stderr
  for part in (*PARTS, "largest step that fits", "all-gather", "MFU <=", "chip-hours", "keys and"):
    assert part in done.stdout, part
  figures = json.loads(file.read_text())
  assert figures["mesh"] == {"data": 1, "fsdp": 256, "tensor": 1}
  estimate = figures["estimate"]
  assert estimate["total"] == pytest.approx(sum(estimate["memory"].values()))
  assert estimate["total"] < estimate["usable"]


def test_a_run_over_memory_is_refused_with_its_parts(tmp_path):
  file = tmp_path / "plan.json"
  done = plan(
    "--config=configs/pretrain_7b.py",
    "--config.model.remat_policy=none",
    "--topology=v5e:16x16",
    f"--json={file}",
  )
  assert done.returncode == 1 and not file.exists()
  for part in PARTS:
    assert part in done.stdout, part
  error = done.stderr.strip().splitlines()[-1]
  assert error.startswith("error: the run needs ")
  assert "This fits: --config.model.remat_policy=" in error


def test_what_cannot_be_compiled_is_refused_at_once():
  done = plan("--config=configs/pretrain_7b.py:h100:8", "--topology=h100:8", "--compile")
  assert done.returncode == 1 and not done.stdout
  assert done.stderr.strip().splitlines()[-1].startswith("error: --compile is for TPUs; h100:8")


@pytest.mark.parametrize(
  "name, message",
  [
    ("v5e:3x5", "topology 'v5e:3x5' does not exist; v5e slices are 1x1, .*, 16x16"),
    ("v5e:32x32", "for more chips take several slices"),
    ("v5p:4x4x6", "v5p slices are 2x2x1"),
    ("v5p:8x4x4", "A <= B <= C"),
    ("v9:4x4", "one of the chips v4, v5e"),
    ("pod", "expected e.g. v5e:16x16"),
    ("0xv5e:2x2", "has no slices"),
    ("h100:12", "a node has 8 h100"),
    ("h100:2x4", "GPUs are counted, e.g. h100:8"),
  ],
)
def test_topologies_that_do_not_exist(name, message):
  with pytest.raises(ValueError, match=message):
    parse_topology(name)


@pytest.mark.parametrize(
  "name, chips, hosts, again",
  [
    ("v5e:16x16", 256, 64, "v5e:16x16"),
    ("2xv5e:16x16", 512, 128, "2xv5e:16x16"),
    ("v5p:4x4x8", 128, 32, "v5p:4x4x8"),
    ("v5e:1x1", 1, 1, "v5e:1x1"),
    ("h100:8", 8, 1, "h100:8"),
    ("h100:32", 32, 4, "4xh100:8"),
  ],
)
def test_topologies(name, chips, hosts, again):
  topology = parse_topology(name)
  assert (topology.num_chips, topology.num_hosts, topology.name) == (chips, hosts, again)
