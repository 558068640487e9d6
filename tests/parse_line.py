"""Parses command lines to their end, with the parsers that the jobs have, and starts no job.

  python parse_line.py < LINES   a JSON list of lists of words; prints a JSON list of failures
  python parse_line.py [-P] -m MODULE ...   one line, in place of `python [-P] -m MODULE ...`

Runs in the environment whose console script is tested. A line is run as the console script or
`python -m` would run it, up to the call of the job's `main`. Configurations are loaded, overridden
and checked. A line for the launcher is a dry run.
"""

import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import runpy
import sys
import traceback

from absl import app, flags
from ml_collections import ConfigDict

# What most jobs import; they define no flags.
_SHARED = ("flax.nnx", "orbax.checkpoint", "tensorflow_datasets", "aromni_jax.model")


def _instead_of_main(argv: list[str]) -> None:
  """Stands for a job's `main`: checks what `app.run` has parsed."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
  if isinstance(config, ConfigDict):
    from aromni_jax.training.config import TrainConfig, to_dataclass

    to_dataclass(TrainConfig, config.to_dict())
  raise SystemExit("parsed")


def run(words: list[str]) -> None:
  """Runs a line; ends with SystemExit("parsed") or 0, or however the line ends that is wrong."""
  begin = app.run
  app.run = lambda main, *args, **kwargs: begin(_instead_of_main, *args, **kwargs)
  if words[0] == "aromni":
    if words[1] == "launch":
      words = [*words[:2], "--dry-run", *words[2:]]
    sys.argv = words
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="aromni")
    sys.exit(script.load()())
  python, flag, module, *rest = (word for word in words if word != "-P")
  assert python.startswith("python") and flag == "-m", words
  if module.endswith("launch.run"):
    rest = ["--dry-run", *rest]
  sys.argv = [module, *rest]
  runpy.run_module(module, run_name="__main__", alter_sys=True)


def failure(words: list[str]) -> str | None:
  """Returns what a line ends with if it is wrong, else None; in a process of its own."""
  read, write = os.pipe()
  child = os.fork()
  if child == 0:
    said = io.StringIO()
    try:
      with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        run(words)
      ended = "it ended without a parser"
    except SystemExit as e:
      ended = "" if e.code in ("parsed", 0, None) else f"{said.getvalue()}\n{e.code}".strip()
    except BaseException:
      ended = traceback.format_exc()
    os.write(write, ended[-4000:].encode())
    os._exit(0)
  os.close(write)
  with os.fdopen(read) as file:
    ended = file.read()
  os.waitpid(child, 0)
  return ended or None


if __name__ == "__main__":
  if len(sys.argv) > 1:
    if "-P" not in sys.argv[1:]:
      sys.path[0] = os.getcwd()  # as `python -m` has it
    try:
      run(["python", *sys.argv[1:]])
    except SystemExit as e:
      sys.exit(0 if e.code in ("parsed", 0, None) else e.code)
    sys.exit("it ended without a parser")
  for name in _SHARED:
    importlib.import_module(name)
  print(json.dumps([failure(words) for words in json.load(sys.stdin)]))
