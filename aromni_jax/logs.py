"""What jobs say: our own lines, every warning, and errors as one clear message."""

import contextlib
import os
import sys

from absl import logging

_OURS = ("aromni_jax", "data_pipelines", "configs")


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
