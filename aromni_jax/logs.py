"""How jobs start and what they say: flags, our own lines, every warning, errors as one message."""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

_OURS = ("aromni_jax", "data_pipelines", "configs")


def run(main: Callable[[list[str]], None], required: Sequence[str] = ()) -> None:
  """Runs a job: parses its flags, calls it and ends the program.

  Args:
    main: the job; gets the words that are no flags, which is the program's name alone.
    required: names of the flags that must be given.
  """
  setup()

  def clear_main(argv: list[str]) -> None:
    with clear_errors():
      main(argv)

  app.run(clear_main, flags_parser=lambda argv: _parse(argv, required))


def _parse(argv: list[str], required: Sequence[str]) -> list[str]:
  """Parses the program's flags; what is wrong with them ends it with one line."""
  try:
    rest = flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as e:
    hint = "; name a --config before its fields" if e.flagname.startswith("config.") else ""
    sys.exit(f"error: {e}{hint}")
  except flags.Error as e:
    sys.exit(f"error: {' '.join(str(e).split())}")
  except SystemExit:  # --help has shown it
    sys.exit(0)
  if len(rest) > 1:
    sys.exit(f"error: unexpected arguments {' '.join(rest[1:])}; flags are --name=value")
  if missing := [f"--{name}" for name in required if flags.FLAGS[name].value is None]:
    sys.exit(f"error: {' and '.join(missing)} missing; --help tells of the flags")
  return rest


def setup() -> None:
  """Shows our information lines on the screen and hides those of libraries that use absl, too."""
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(_is_ours)


def _is_ours(record) -> bool:
  folders = record.pathname.split(os.sep)[:-1]
  return record.levelno > logging.converter.absl_to_standard(logging.INFO) or any(
    name in folders for name in _OURS
  )


@contextlib.contextmanager
def clear_errors():
  """Ends the program with the message alone if something expected goes wrong: no stack of calls."""
  try:
    yield
  except (ValueError, OSError, ImportError, FloatingPointError) as e:
    sys.exit(f"error: {e}")
