"""A profile of some steps, for xprof and TensorBoard."""

import dataclasses
import re
from typing import Any

import jax
from absl import logging


@dataclasses.dataclass(frozen=True)
class Window:
  """Steps `start` to `stop - 1`, counted from 1 as in the log."""

  start: int
  stop: int


def parse_window(text: str | None, num_steps: int) -> Window | None:
  """Returns the window of START:STOP, or None for an empty text.

  Args:
    text: e.g. 100:110, the ten steps 100 to 109.
    num_steps: of the run.

  Raises:
    ValueError: if there are no such steps.
  """
  if not text:
    return None
  match = re.fullmatch(r"(\d+):(\d+)", text)
  if not match:
    raise ValueError(f"--profile_steps is {text!r}; expected START:STOP, e.g. 100:110")
  start, stop = int(match[1]), int(match[2])
  if not 1 <= start < stop <= num_steps + 1:
    raise ValueError(
      f"--profile_steps is {text}, steps {start} to {stop - 1}; expected 1 <= START < STOP, and "
      f"steps up to config.num_steps {num_steps}"
    )
  return Window(start, stop)


class Profiler:
  """Traces the steps of a window into a folder, in the first process.

  Args:
    window: which steps; None traces nothing.
    directory: where to.
    step: the last step that is done already.
  """

  def __init__(self, window: Window | None, directory: str, step: int):
    self._window = window if jax.process_index() == 0 else None
    self._directory, self._on = directory, False
    if window and step >= window.start:
      logging.warning("--profile_steps begins at step %d, but %d is done.", window.start, step)
      self._window = None

  def before(self, step: int) -> None:
    """Is called before a step; begins the trace at the first one of the window."""
    if self._window and step == self._window.start:
      jax.profiler.start_trace(self._directory)
      self._on = True

  def after(self, step: int, outputs: Any) -> None:
    """Is called with what a step returned; ends the trace after the last one of the window."""
    if self._on and step == self._window.stop - 1:
      jax.block_until_ready(outputs)
      self.close()

  def close(self) -> None:
    """Ends the trace if there is one."""
    if self._on:
      self._on = False
      jax.profiler.stop_trace()
      logging.info("Wrote a profile to %s; see docs/running.md.", self._directory)
