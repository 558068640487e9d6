"""What a launch is made of: a job goes into a target's `render`, files and commands come out.

A target is a module here that ends with its `TARGET`, and a line in `run.TARGETS`.
"""

import argparse
import dataclasses
import re
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING

from aromni_jax.cluster.hardware import Topology

if TYPE_CHECKING:
  from aromni_jax.training.config import TrainConfig

_END = "END_OF_FILE"


def whole(least: int) -> Callable[[str], int]:
  """Returns the `kind` of an option that is a whole number of at least `least`."""

  def convert(text: str) -> int:
    if not text.isdecimal() or int(text) < least:
      raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
    return int(text)

  return convert


@dataclasses.dataclass(frozen=True)
class Option:
  """An option of a target, --name=VALUE.

  Attributes:
    name: without the dashes.
    help: one line.
    default: value if it is not given; False makes it a switch.
    required: whether there is no default.
    kind: converts and checks the value.
  """

  name: str
  help: str
  default: str | int | bool | None = None
  required: bool = False
  kind: Callable = str


@dataclasses.dataclass(frozen=True)
class Job:
  """One training to launch.

  Attributes:
    name: of the resource, workload or job.
    topology: what it runs on; None for processes of this machine.
    arguments: the training line, as the user gave it.
    workdir: --workdir of the line.
    folder: where files and logs of the launch go, relative to the checkout.
    options: the target's own.
  """

  name: str
  topology: Topology | None
  arguments: tuple[str, ...]
  workdir: str
  folder: str
  options: argparse.Namespace


@dataclasses.dataclass(frozen=True)
class File:
  """A file that a launch needs, by its path relative to the checkout."""

  path: str
  text: str


@dataclasses.dataclass(frozen=True)
class Rendered:
  """Files to write, then commands to run, both from the checkout; and the programs they need."""

  files: tuple[File, ...] = ()
  commands: tuple[tuple[str, ...], ...] = ()
  tools: tuple[str, ...] = ()

  def script(self) -> str:
    """Returns a shell script that does it all, to read or to paste."""
    folders = sorted({file.path.rpartition("/")[0] for file in self.files})
    lines = [shlex.join(["mkdir", "-p", folder]) for folder in folders]
    for file in self.files:
      lines += [f"cat > {shlex.quote(file.path)} <<'{_END}'", file.text.rstrip("\n"), _END]
    return "\n".join([*lines, *map(shlex.join, self.commands)]) + "\n"


@dataclasses.dataclass(frozen=True)
class Target:
  """A place where trainings run.

  Attributes:
    about: what it is, half a line.
    options: its own.
    render: what a job stands for there. Raises ValueError for a topology that it cannot take.
    topology: whether --topology says what it runs on; otherwise it is this machine.
    packed: whether workers get the packed checkout, and so no configuration from elsewhere.
    shared_by: the option that says that paths without gs:// are shared by all workers; None where
      nobody doubts it.
    mounts: options -> whether the buckets of the training line are mounted there.
    mount_hint: how to mount one where they are not; {bucket} is its name.
    check: raises ValueError for a configuration and options that do not go together.
  """

  about: str
  options: tuple[Option, ...]
  render: Callable[[Job], Rendered]
  topology: bool = True
  packed: bool = False
  shared_by: str | None = None
  mounts: Callable[[argparse.Namespace], bool] = lambda options: False
  mount_hint: str = "mount it on every machine, and give the path there"
  check: Callable[["TrainConfig", argparse.Namespace], None] = lambda config, options: None


def check_name(name: str) -> None:
  """Raises ValueError for a name that Google Cloud, Kubernetes or SLURM would refuse."""
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
    raise ValueError(
      f"--name={name} is no name for a job; expected up to 40 small letters, digits and dashes, a "
      "letter first, e.g. --name=pretrain-1 (the default is the last part of --workdir)"
    )
