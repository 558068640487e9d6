"""Bandwidth of saving and restoring a run's state, and how long a save holds the run up.

  python -m benchmarks.checkpoint --gigabytes=4 --directory=/mnt/disk

A state of random float32 arrays, split over 8 simulated devices, is saved as a run saves it, and
restored onto the same mesh and onto another. `stall_s` is how long `save` takes to return, which is
all that an asynchronous save costs the run; `write_gb_s` counts until the checkpoint is whole and
synced to the disk, `disk_gb_s` is a plain file of the same size in the same round. Files that are
restored come from the page cache where it holds them. Medians of all rounds count.

`estimate_7b` is reckoned, not measured: the 7B state with Adam, the devices' share of it over PCIe
(--pcie_gb_s per chip, as in "How to Scale Your Model") against a step at --mfu with one sequence of
4096 tokens per chip, and what each host must write per second to be done before the next save.
"""

import json
import os
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags
from jax.sharding import NamedSharding, PartitionSpec

from aromni_jax.cluster import hardware
from aromni_jax.models.config import DecoderConfig
from aromni_jax.training.checkpoint import Checkpoints

_GIGABYTES = flags.DEFINE_float("gigabytes", 2.0, "Size of the state.")
_DIRECTORY = flags.DEFINE_string("directory", None, "Where to write; a temporary folder if unset.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Times that everything is measured.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:16x16", "Of the estimate.")
_MFU = flags.DEFINE_float("mfu", 0.65, "Of the estimate: share of the chips' peak.")
_PCIE = flags.DEFINE_float("pcie_gb_s", 16.0, "Of the estimate: GB/s from a chip to its host.")
_EVERY = flags.DEFINE_integer("checkpoint_every", 500, "Of the estimate: steps between saves.")

_DEVICES = 8
_ARRAYS = 8
_LENGTH = 4096
_CONFIG = {"model": {}, "optimizer": {"name": "adam"}}


def make_state(gigabytes: float) -> dict[str, jax.Array]:
  """Returns arrays [rows, 4096] of random numbers, split along their rows."""
  rows = int(gigabytes * 1e9 / 4 / _ARRAYS / 4096) // _DEVICES * _DEVICES
  split = _sharding((_DEVICES,), ("fsdp",), PartitionSpec("fsdp"))
  make = jax.jit(lambda key: jax.random.normal(key, (rows, 4096)), out_shardings=split)
  return {f"w{i}": make(jax.random.key(i)) for i in range(_ARRAYS)}


def _sharding(shape: tuple[int, ...], names: tuple[str, ...], spec: PartitionSpec) -> NamedSharding:
  types = (jax.sharding.AxisType.Auto,) * len(shape)
  return NamedSharding(jax.make_mesh(shape, names, axis_types=types), spec)


def measure(directory: pathlib.Path, state: dict[str, jax.Array]) -> dict[str, float]:
  """Returns the figures of one round, in seconds and GB/s."""
  size = sum(x.nbytes for x in state.values()) / 1e9
  block = np.random.default_rng(0).bytes(1 << 26)
  began = time.perf_counter()
  with (directory / "plain").open("wb") as file:
    for _ in range(int(size * 1e9) >> 26):
      file.write(block)
    file.flush()
    os.fsync(file.fileno())
  out = {"disk_gb_s": (int(size * 1e9) >> 26 << 26) / 1e9 / (time.perf_counter() - began)}
  (directory / "plain").unlink()

  with tempfile.TemporaryDirectory(dir=directory) as workdir:
    checkpoints = Checkpoints(workdir)
    os.sync()
    began = time.perf_counter()
    checkpoints.save(1, state, {}, _CONFIG)
    out["stall_s"] = time.perf_counter() - began
    checkpoints.close()
    os.sync()
    out["write_gb_s"] = size / (time.perf_counter() - began)
    shardings = {
      "restore_gb_s": _sharding((_DEVICES,), ("fsdp",), PartitionSpec("fsdp")),
      "restore_other_mesh_gb_s": _sharding(
        (2, _DEVICES // 2), ("data", "tensor"), PartitionSpec(None, "tensor")
      ),
    }
    for name, sharding in shardings.items():
      abstract = {
        k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for k, x in state.items()
      }
      checkpoints = Checkpoints(workdir)
      began = time.perf_counter()
      jax.block_until_ready(checkpoints.restore(abstract, _CONFIG))
      out[name] = size / (time.perf_counter() - began)
      checkpoints.close()
  return out


def estimate_7b() -> dict[str, Any]:
  """Returns what a save of the 7B run is reckoned to cost."""
  model, topology = DecoderConfig(), hardware.parse_topology(_TOPOLOGY.value)
  state = 3 * 4 * model.num_params()  # parameters and Adam's two moments, float32
  step = _LENGTH * model.flops_per_token(_LENGTH) / (topology.chip.peak_flops * _MFU.value)
  stall = state / topology.num_chips / (_PCIE.value * 1e9)
  return {
    "topology": topology.name,
    "state_gb": round(state / 1e9, 1),
    "gb_per_host": round(state / topology.num_hosts / 1e9, 2),
    "pcie_gb_s": _PCIE.value,
    "step_s": round(step, 2),
    "stall_s": round(stall, 4),
    "stall_of_a_step": round(stall / step, 4),
    "stall_of_all_steps": round(stall / step / _EVERY.value, 6),
    "host_must_write_gb_s": round(state / topology.num_hosts / 1e9 / (step * _EVERY.value), 4),
  }


def main(argv: list[str]) -> None:
  del argv
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", _DEVICES)
  state = jax.block_until_ready(make_state(_GIGABYTES.value))
  rounds = []
  with tempfile.TemporaryDirectory(dir=_DIRECTORY.value) as scratch:
    for i in range(_ROUNDS.value):
      rounds.append(measure(pathlib.Path(scratch), state))
      print(f"round {i}: " + ", ".join(f"{k} {v:.3f}" for k, v in rounds[-1].items()), flush=True)
  print(
    json.dumps(
      {
        "benchmark": "checkpoint",
        "cores": os.cpu_count(),
        "gigabytes": round(sum(x.nbytes for x in state.values()) / 1e9, 2),
        **{k: round(statistics.median(r[k] for r in rounds), 3) for k in rounds[0]},
        "estimate_7b": estimate_7b(),
      }
    )
  )


if __name__ == "__main__":
  app.run(main)
