"""Processes of this machine, with its accelerators or with simulated CPU devices."""

import argparse
import sys
from typing import TYPE_CHECKING

from aromni_jax.launch import preflight
from aromni_jax.launch.job import Job, Option, Rendered, Target, whole

if TYPE_CHECKING:
  from aromni_jax.training.config import TrainConfig

_OPTIONS = (
  Option("processes", "How many processes.", 1, kind=whole(1)),
  Option("devices", "Simulated CPU devices per process; by default the real ones.", kind=whole(1)),
  Option("python", "Interpreter that the package is installed in.", sys.executable),
  Option("restarts", "How often all are started again after a kill or 42.", 3, kind=whole(0)),
)


def render(job: Job) -> Rendered:
  """Returns the command that runs the processes, see launch/processes.py."""
  options = job.options
  simulated = ()
  if options.devices is not None:
    simulated = ("env", "JAX_PLATFORMS=cpu", f"JAX_NUM_CPU_DEVICES={options.devices}")
  command = (
    *simulated,
    *(options.python, "-m", "aromni_jax.launch.processes", f"--processes={options.processes}"),
    *(f"--restarts={options.restarts}", f"--logs={job.folder}", "--", *job.arguments),
  )
  return Rendered(commands=(command,))


def _check(config: "TrainConfig", options: argparse.Namespace) -> None:
  if options.devices is not None:
    preflight.check_here(config, options.processes * options.devices, options.processes)


TARGET = Target(
  about="processes of this machine",
  options=_OPTIONS,
  render=render,
  topology=False,
  check=_check,
)
