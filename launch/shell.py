"""Pieces of shell scripts that several targets share."""

import shlex

from aromni_jax.cluster import xla_flags

# What a worker needs to install the package and to read configurations.
SOURCES = ("setup.py", "pyproject.toml", "aromni_jax", "configs", "data_pipelines", "launch")

# A signal ends `wait` before the training has saved and left, so it is waited for again.
_SUPERVISE = """\
told=yes
trap 'told=yes; {tell}' {signal}
{command} &
child=$!
while [ -n "$told" ]; do
  told= code=0
  wait "$child" || code=$?
done
"""


def pack(archive: str) -> tuple[str, ...]:
  """Returns the command that packs the working tree, as it is, for workers."""
  return ("tar", "--exclude=__pycache__", "-cf", archive, *SOURCES)


def mounted(arguments: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Returns a training line whose buckets are folders, and their names.

  Training reads and writes files, so workers mount gs://BUCKET at /mnt/BUCKET.
  """
  buckets: dict[str, None] = {}
  out = []
  for argument in arguments:
    flag, _, value = argument.partition("=")
    if value.startswith("gs://"):
      bucket, _, rest = value.removeprefix("gs://").partition("/")
      buckets[bucket] = None
      argument = f"{flag}=/mnt/{bucket}/{rest}"
    out.append(argument)
  return tuple(out), tuple(buckets)


def exports(platform: str, chip: str = "") -> str:
  """Returns lines that export flags and variables of "tpu" or "gpu", each with its reason.

  Args:
    platform: "tpu" or "gpu".
    chip: as `hardware.CHIPS` names it.
  """
  lines = []
  for variable in xla_flags.VARIABLES[platform]:
    lines += [f"# {variable.reason}", f"export {variable.name}={shlex.quote(variable.value)}"]
  flags = xla_flags.flags(platform, chip)
  lines += [f"# {flag}: {flag.reason}" for flag in flags]
  name = xla_flags.FLAGS_VARIABLE[platform]
  lines.append(f"export {name}={shlex.quote(xla_flags.flags_value(platform, chip))}")
  return "\n".join(lines) + "\n"


def training(python: str, arguments: tuple[str, ...], coordinator: str | None = "auto") -> str:
  """Returns the quoted command line of one process of a training."""
  joins = (f"--coordinator={coordinator}",) if coordinator else ()
  return shlex.join([python, "-m", "aromni_jax.train", *arguments, *joins])


def supervise(command: str, signal: str = "TERM", tell: str = 'kill -TERM "$child"') -> str:
  """Returns lines that run a command and leave its exit code in `code`.

  Args:
    command: the quoted command.
    signal: what tells the script to stop.
    tell: what tells the command, then; it saves and leaves.
  """
  return _SUPERVISE.format(command=command, signal=signal, tell=tell)
