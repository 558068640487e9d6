"""What a launch is made of: a job goes into a target's `render`, files and commands come out."""

import argparse
import dataclasses
import re
import shlex
from collections.abc import Callable

from aromni_jax.cluster.hardware import Topology

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


def check_name(name: str) -> None:
  """Raises ValueError for a name that Google Cloud, Kubernetes or SLURM would refuse."""
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
    raise ValueError(
      f"--name={name} is no name for a job; expected up to 40 small letters, digits and dashes, a "
      "letter first, e.g. --name=pretrain-1 (the default is the last part of --workdir)"
    )
