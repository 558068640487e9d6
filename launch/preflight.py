"""What can be known to be wrong before anything is booked."""

import dataclasses
import os
import pathlib
import shutil

from aromni_jax import sharding
from aromni_jax.config import TrainConfig
from aromni_jax.hardware import Topology
from launch.shell import SOURCES

_TOOLS = {
  "gcloud": "install the Google Cloud CLI (cloud.google.com/sdk) and run gcloud auth login",
  "xpk": "pip install xpk, in an environment of its own",
  "sbatch": "run this on a login node of the SLURM cluster",
}


def preflight(config: TrainConfig, topology: Topology) -> None:
  """Checks that a configuration can run on a topology.

  Raises:
    ValueError: if the mesh or the batch does not divide, saying what would.
  """
  gpus = topology.chip.platform == "gpu"  # one process each, see launch/slurm.py
  processes = topology.num_chips if gpus else topology.num_hosts
  data = check_division(config, topology.num_chips, processes)
  if data % topology.slices:
    raise ValueError(
      f"config.mesh.data is {data}, which is no multiple of the {topology.slices} slices or nodes "
      f"of {topology.name}; only data crosses the network between them: --config.mesh.data="
      f"{topology.slices}"
    )


def check_division(config: TrainConfig, devices: int, processes: int) -> int:
  """Checks the mesh and the rows of a batch against devices and processes.

  Returns:
    the size of the mesh axis data.

  Raises:
    ValueError: if they do not divide.
  """
  data, fsdp, _ = sharding.mesh_sizes(devices, **dataclasses.asdict(config.mesh))
  rows = data * fsdp * config.accumulate
  if config.batch_size % rows:
    raise ValueError(
      f"config.batch_size is {config.batch_size}, which is no multiple of {rows}: {data} (data) x "
      f"{fsdp} (fsdp) x {config.accumulate} (accumulate); take {_near(config.batch_size, rows)}"
    )
  if config.batch_size % processes:
    raise ValueError(
      f"config.batch_size is {config.batch_size}, which {processes} processes cannot share; take "
      f"{_near(config.batch_size, processes)}"
    )
  return data


def check_shared(paths: dict[str, str]) -> None:
  """Checks that what every worker reads and writes is in a bucket.

  Args:
    paths: flag -> its value; an empty one is not used.

  Raises:
    ValueError: naming the first that is not.
  """
  for flag, path in paths.items():
    if path and not path.startswith("gs://"):
      raise ValueError(
        f"--{flag}={path} is on this machine, and the workers could not share it; expected "
        "gs://BUCKET/..., or a path that is mounted on every worker, with --mounted (tpu_vm) or "
        "--storage (xpk)"
      )


def check_packed(config_file: str) -> None:
  """Checks that a configuration file is in what workers get.

  Raises:
    ValueError: if it is not.
  """
  path = config_file.partition(":")[0]
  if pathlib.PurePath(os.path.normpath(path)).parts[0] not in SOURCES:
    raise ValueError(
      f"--config={config_file} would not reach the workers, which get {', '.join(SOURCES)} of the "
      "checkout; put it into configs/ and name it by its path from there"
    )


def check_tools(tools: tuple[str, ...]) -> None:
  """Raises FileNotFoundError for a program that is not on PATH, saying how to get it."""
  for tool in tools:
    if shutil.which(tool) is None:
      raise FileNotFoundError(f"{tool} is not on PATH; {_TOOLS[tool]}")


def _near(value: int, step: int) -> str:
  below, above = value // step * step, -(-value // step) * step
  return f"{below} or {above}" if below else str(above)
