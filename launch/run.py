"""Starts a training in any place, with the line that starts it here.

  aromni launch --target=TARGET [--topology=T] [options] -- --config=NAME --workdir=DIR ...

Everything after -- goes to `aromni train` unchanged. The configuration, the topology, the paths
and the programs are checked before anything is booked. --dry-run prints a shell script of all that
would be done, files and commands, and does nothing. docs/launch.md takes each place from zero to a
running training.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

from absl import flags

from aromni_jax import train
from aromni_jax.cluster.hardware import parse_topology
from aromni_jax.launch import colab, local, preflight, shell, slurm, tpu_vm, xpk
from aromni_jax.launch.job import Job, Option, Rendered, check_name

if TYPE_CHECKING:
  from aromni_jax.training.config import TrainConfig

TARGETS = {
  "tpu_vm": tpu_vm.TARGET,
  "xpk": xpk.TARGET,
  "slurm": slurm.TARGET,
  "local": local.TARGET,
  "colab": colab.TARGET,
}
_OURS = ("coordinator", "num_processes", "process_id")


class Line(NamedTuple):
  """What the training line says."""

  config: "TrainConfig"
  config_file: str
  workdir: str


def read_line(arguments: list[str]) -> Line:
  """Parses a training line the way `aromni train` does.

  Raises:
    ValueError: for anything that it would refuse.
  """
  for argument in arguments:
    if "\n" in argument:
      raise ValueError(f"the training line has a line break in {argument!r}; write it without")
  values = flags.FlagValues()
  train.define_flags(values, ["train", *arguments])
  try:
    rest = values(["train", *arguments])[1:]
  except flags.Error as e:
    raise ValueError(f"the training line: {' '.join(str(e).split())}") from e
  if rest:
    raise ValueError(f"the training line has unexpected arguments {rest}")
  for name in ("config", "workdir"):
    if values[name].value is None:
      raise ValueError(f"the training line has no --{name}; give it after --")
  for name in _OURS:
    if values[name].present:
      raise ValueError(f"the training line has --{name}, which the launcher adds; leave it out")
  from aromni_jax.training.config import TrainConfig, to_dataclass  # slow: after what may be wrong

  config = to_dataclass(TrainConfig, values["config"].value.to_dict())
  return Line(config, values["config"].config_filename, values["workdir"].value)


def plan(argv: list[str]) -> tuple[argparse.Namespace, Rendered]:
  """Returns the options of a command line, and what it stands for.

  Raises:
    ValueError: for anything that is known to be wrong before it is booked.
    SystemExit: for --help and options that do not exist.
  """
  at = argv.index("--") if "--" in argv else len(argv)
  options = _parse(argv[:at])
  arguments = argv[at + 1 :]
  if not arguments:
    raise ValueError("there is no training line; give it after --, e.g. -- --config=demo:tiny ...")
  line = read_line(arguments)
  name = options.name or _name(line.workdir)
  check_name(name)
  target = TARGETS[options.target]
  if target.topology and not options.topology:
    raise ValueError(f"--target={options.target} needs --topology, e.g. --topology=v5e:16x16")
  if options.topology and not target.topology:
    raise ValueError(
      f"--topology={options.topology} is not for --target={options.target}, which runs on this "
      "machine; leave it out"
    )
  topology = parse_topology(options.topology) if target.topology else None
  target.check(line.config, options)
  folder = f"{options.out.rstrip('/')}/{name}"
  job = Job(name, topology, tuple(arguments), line.workdir, folder, options)
  rendered = target.render(job)  # first: it knows best which topology it cannot take
  if topology:
    preflight.check_fit(line.config, topology)
  if target.packed:
    preflight.check_packed(line.config_file)
  if target.shared_by and not getattr(options, target.shared_by):
    paths = {"workdir": line.workdir, "config.data.shards": line.config.data.shards}
    preflight.check_shared(paths | {"config.base": line.config.base}, target.shared_by)
  if not target.mounts(options):
    preflight.check_mounted(shell.mounted(job.arguments)[1], target.mount_hint)
  return options, rendered


def _name(workdir: str) -> str:
  return re.sub(r"[^a-z0-9]+", "-", workdir.rstrip("/").rpartition("/")[2].lower()).strip("-")


def _parse(argv: list[str]) -> argparse.Namespace:
  """Parses the launcher's own options: those of the target, once it is known."""
  first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  first.add_argument("--target")
  target = first.parse_known_args(argv)[0].target
  if target not in TARGETS:
    make_parser().parse_args(argv)  # --help, or an error
  parser = make_parser(target)
  options, unknown = parser.parse_known_args(argv)
  if unknown:
    has = ", ".join(f"--{option.name}" for option in TARGETS[target].options)
    parser.error(f"{' '.join(unknown)}: no option of --target={target}, which has {has}")
  return options


def make_parser(target: str | None = None) -> argparse.ArgumentParser:
  """Returns the parser of the launcher with the options of a target; without one, it tells all."""
  parser = argparse.ArgumentParser(
    prog="aromni launch",
    usage="aromni launch --target=TARGET [options] -- --config=NAME --workdir=DIR ...",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--target", required=True, choices=TARGETS, help="Where to run.")
  parser.add_argument(
    "--topology", help="Chips, e.g. v5e:16x16, 2xv5e:16x16 (two slices), v5p:4x4x8 or h100:16."
  )
  parser.add_argument("--name", help="Name of the job; by default the last part of --workdir.")
  parser.add_argument(
    "--out", default="runs/launch", help="Folder for a folder with the job's files and logs."
  )
  parser.add_argument("--dry-run", action="store_true", help="Prints what would be done.")
  for name, entry in TARGETS.items():
    title = f"--target={name}: {entry.about}"
    if target is None:
      lines = [f"  --{option.name:19s} {_help(option)}" for option in entry.options]
      parser.add_argument_group(title, "\n".join(lines))
    elif target == name:
      group = parser.add_argument_group(title)
      for option in entry.options:
        if option.default is False:
          group.add_argument(f"--{option.name}", action="store_true", help=_help(option))
        else:
          kwargs = {"type": option.kind, "default": option.default, "required": option.required}
          group.add_argument(f"--{option.name}", help=_help(option), **kwargs)
  return parser


def _help(option: Option) -> str:
  if option.required:
    return f"{option.help} Required."
  return option.help if option.default in (None, False, "") else f"{option.help} [{option.default}]"


def execute(rendered: Rendered) -> int:
  """Writes the files and runs the commands here, the last one in place of this process.

  Returns:
    the first exit code that is not 0, or 0 if there is no command.
  """
  for file in rendered.files:
    path = pathlib.Path(file.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(file.text)
    print(f"wrote {path}", flush=True)
  for command in rendered.commands[:-1]:
    code = subprocess.run(command).returncode
    if code:
      return code
  if rendered.commands:
    sys.stdout.flush()
    last = rendered.commands[-1]
    os.execvp(last[0], last)  # in place of this process, so that signals reach it
  return 0


def main(argv: list[str]) -> int:
  try:
    options, rendered = plan(argv)
    if options.dry_run:
      print(rendered.script(), end="")
      return 0
    preflight.check_tools(rendered.tools)
    if TARGETS[options.target].packed:
      preflight.check_checkout()
    return execute(rendered)
  except (ValueError, OSError) as e:
    print(f"error: {e}", file=sys.stderr)
    return 1


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
