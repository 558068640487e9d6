"""What can be known to be wrong before anything is booked."""

import os
import pathlib
import shutil
from typing import TYPE_CHECKING

from aromni_jax import config_files
from aromni_jax.launch.shell import SOURCES

if TYPE_CHECKING:
  from aromni_jax.cluster.hardware import Topology
  from aromni_jax.training.config import TrainConfig

_TOOLS = {
  "gcloud": "install the Google Cloud CLI (cloud.google.com/sdk) and run gcloud auth login",
  "xpk": "pip install xpk, in an environment of its own",
  "sbatch": "run this on a login node of the SLURM cluster",
}


def check_fit(config: "TrainConfig", topology: "Topology") -> None:
  """Checks that a configuration can run on a topology.

  Raises:
    ValueError: if mesh, slices, batch or memory do not, saying what would.
  """
  import jax

  from aromni_jax.planning import estimate

  jax.config.update("jax_platforms", "cpu")  # shapes only: the chips of this machine are left alone
  estimate.check(config, topology)
  gpus = topology.chip.platform == "gpu"  # one process each, see launch/slurm.py
  _check_processes(config, topology.num_chips if gpus else topology.num_hosts)


def check_here(config: "TrainConfig", devices: int, processes: int) -> None:
  """Checks mesh and batch against simulated devices of this machine, whose memory nobody knows.

  Raises:
    ValueError: if they do not divide, saying what would.
  """
  from aromni_jax.planning import estimate

  estimate.mesh_sizes(config, devices, f"{processes} x {devices // processes} devices")
  _check_processes(config, processes)


def _check_processes(config: "TrainConfig", processes: int) -> None:
  if config.batch_size % processes:
    below = config.batch_size // processes * processes
    raise ValueError(
      f"config.batch_size is {config.batch_size}, which {processes} processes cannot share; take "
      f"{f'{below} or ' if below else ''}{below + processes}"
    )


def check_shared(paths: dict[str, str], option: str) -> None:
  """Checks that what every worker reads and writes is in a bucket.

  Args:
    paths: flag -> its value; an empty one is not used.
    option: the one that would say that paths are shared.

  Raises:
    ValueError: naming the first that is not.
  """
  for flag, path in paths.items():
    if path and not path.startswith("gs://"):
      raise ValueError(
        f"--{flag}={path} is on this machine, and the workers could not share it; expected "
        f"gs://BUCKET/..., or a path that is mounted on every worker, with --{option}"
      )


def check_mounted(buckets: tuple[str, ...], hint: str) -> None:
  """Checks that a line has no buckets, where nobody mounts them.

  Args:
    buckets: names.
    hint: how to mount {bucket}.

  Raises:
    ValueError: naming the first.
  """
  if buckets:
    raise ValueError(
      f"gs://{buckets[0]} must be mounted, since training reads and writes files: "
      f"{hint.format(bucket=buckets[0])}"
    )


def check_packed(config_file: str) -> None:
  """Checks that a configuration is in what workers get: one of the package, or packed with it.

  Raises:
    ValueError: if it is not.
  """
  path = config_file.partition(":")[0]
  if (
    path not in config_files.names()
    and pathlib.PurePath(os.path.normpath(path)).parts[0] not in SOURCES
  ):
    raise ValueError(
      f"--config={config_file} would not reach the workers, which get {', '.join(SOURCES)} of the "
      "checkout; put it into configs/ and name it by its path from there"
    )


def check_checkout() -> None:
  """Checks that what workers install is here to be packed.

  Raises:
    FileNotFoundError: if it is not.
  """
  if missing := [name for name in SOURCES if not pathlib.Path(name).exists()]:
    raise FileNotFoundError(
      f"{', '.join(missing)} not here: workers install the package from its checkout; start this "
      "in one"
    )


def check_tools(tools: tuple[str, ...]) -> None:
  """Raises FileNotFoundError for a program that is not on PATH, saying how to get it."""
  for tool in tools:
    if shutil.which(tool) is None:
      raise FileNotFoundError(f"{tool} is not on PATH; {_TOOLS[tool]}")
