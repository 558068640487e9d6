"""Goodput of a run: the share of its wall time that went into steps that count, and where the rest
went, over all attempts.

Google's ml-goodput-measurement has the same idea, but keeps its records in Cloud Logging alone and
needs four Google Cloud clients; here they are lines of `attempts.jsonl` in the folder of the run.
"""

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

# Activity -> how the table calls it. Steps that count are the goodput.
ACTIVITIES = {
  "step": "steps that count",
  "redone": "steps lost in a kill, done again",
  "compile": "first step, which compiles",
  "data_wait": "devices waiting for a batch",
  "checkpoint": "saving",
  "restore": "restoring",
  "evaluation": "evaluation",
  "samples": "samples",
  "profile": "writing a profile",
  "export": "writing the model directory",
  "initialisation": "start-up and the rest",
  "down": "between attempts",
}


class Goodput:
  """Where the time of this attempt, and of the run before it, went. All times are seconds.

  Args:
    workdir: folder of the run; None keeps no record (all processes but the first).
    began: `time.monotonic()` at which this process began; now by default.
  """

  def __init__(self, workdir: str | None, began: float | None = None):
    now = time.monotonic()
    self._began = now if began is None else began
    self._began_wall = time.time() - (now - self._began)
    self._seconds: dict[str, float] = dict.fromkeys(ACTIVITIES, 0.0)
    self._open, self._since = ["initialisation"], self._began
    self._path = pathlib.Path(workdir) / "attempts.jsonl" if workdir else None
    self._earlier = _read_attempts(self._path) if self._path else []
    self._start = 0
    self._before = _totals(self._earlier, 0, self._began_wall)

  def begin(self, step: int) -> None:
    """Says which step this attempt goes on from, and writes the attempt's first line.

    Args:
      step: number of steps that are done already.
    """
    self._start = step
    self._before = _totals(self._earlier, step, self._began_wall)
    if self._path and self._path.exists() and not self._path.read_bytes().endswith(b"\n"):
      with self._path.open("a") as f:
        f.write("\n")  # ends a line that a kill has torn
    self.record(step)

  @contextlib.contextmanager
  def measure(self, activity: str) -> Iterator[None]:
    """Counts the time inside as one of `ACTIVITIES`, but for what is measured in it in turn."""
    self._count()
    self._open.append(activity)
    try:
      yield
    finally:
      self._count()
      self._open.pop()

  def move(self, seconds: float, activity: str) -> None:
    """Counts some of the time of what is being measured as another activity.

    Args:
      seconds: time to move.
      activity: key of `ACTIVITIES` that it is moved to.
    """
    self._seconds[self._open[-1]] -= seconds
    self._seconds[activity] += seconds

  def seconds(self, *activities: str) -> float:
    """Returns the seconds of this attempt that were spent in some of `ACTIVITIES`."""
    self._count()
    return sum(self._seconds[a] for a in activities)

  def _count(self) -> None:
    now = time.monotonic()
    self._seconds[self._open[-1]] += now - self._since
    self._since = now

  def record(self, step: int, end: str = "") -> None:
    """Writes a line of `attempts.jsonl` after a step.

    Args:
      step: number of steps that are done.
      end: how the attempt ends, "finished" or "preempted"; empty while it goes on.
    """
    if self._path:
      with self._path.open("a") as f:
        f.write(json.dumps(self._line(step, end)) + "\n")

  def _line(self, step: int, end: str = "") -> dict[str, Any]:
    self._count()
    return {
      "attempt": len(self._earlier) + 1,
      "began": round(self._began_wall, 3),
      "elapsed": round(self._since - self._began, 3),
      "start": self._start,
      "step": step,
      "end": end,
      "seconds": {a: round(s, 3) for a, s in self._seconds.items() if s},
    }

  def totals(self) -> dict[str, float]:
    """Returns activity -> seconds over all attempts; they add up to the run's wall time."""
    self._count()
    return {a: seconds + self._seconds[a] for a, seconds in self._before.items()}

  def shares(self) -> dict[str, float]:
    """Returns shares of the run's wall time: `goodput` and, per other activity with any time,
    `goodput/<activity>`; their sum is 1."""
    totals = self.totals()
    wall = sum(totals.values()) or 1.0
    out = {"goodput": totals.pop("step") / wall}
    return out | {f"goodput/{a}": s / wall for a, s in totals.items() if s > 0}

  def table(self) -> str:
    """Returns where the time went, one activity a line, the largest first."""
    totals = self.totals()
    wall = sum(totals.values()) or 1.0
    count = len(self._earlier) + 1
    lines = [f"Where {_duration(wall)} went ({count} attempt{'s' * (count > 1)}):"]
    for activity, seconds in sorted(totals.items(), key=lambda item: -item[1]):
      if seconds >= 0.0005 * wall:
        share = f"{100 * seconds / wall:5.1f} %"
        lines.append(f"  {ACTIVITIES[activity]:34s} {share}  {_duration(seconds):>10s}")
    return "\n".join(lines)


def _read_attempts(path: pathlib.Path) -> list[list[dict[str, Any]]]:
  """The lines of every attempt, in order; torn ones are left out."""
  attempts: dict[int, list[dict[str, Any]]] = {}
  for line in path.read_text().splitlines() if path.exists() else []:
    with contextlib.suppress(json.JSONDecodeError):
      record = json.loads(line)
      attempts.setdefault(record["attempt"], []).append(record)
  return [attempts[number] for number in sorted(attempts)]


def _totals(attempts: list[list[dict[str, Any]]], start: int, began: float) -> dict[str, float]:
  """Returns activity -> seconds in earlier attempts, and between them and this one.

  A step counts once: what an attempt did after the step that a later one went on from is redone.

  Args:
    attempts: lines of each earlier attempt, in order.
    start: number of steps that were done when this attempt began.
    began: `time.time()` at which it began.
  """
  totals = dict.fromkeys(ACTIVITIES, 0.0)
  for lines in reversed(attempts):
    last = lines[-1]
    for activity, seconds in last["seconds"].items():
      totals[activity] += seconds
    # A later line of the same step has what was spent on it; np.interp takes rising steps.
    spent = {last["start"]: 0.0} | {x["step"]: x["seconds"].get("step", 0.0) for x in lines}
    all_spent = last["seconds"].get("step", 0.0)
    counts = np.interp(start, list(spent), list(spent.values())) if start > last["start"] else 0.0
    totals["redone"] += all_spent - counts
    totals["step"] -= all_spent - counts
    if last["end"] != "finished":  # what comes after the end is a run that goes on further
      totals["down"] += max(0.0, began - (last["began"] + last["elapsed"]))
    start, began = min(start, last["start"]), last["began"]
  return totals


def _duration(seconds: float) -> str:
  hours, rest = divmod(round(seconds), 3600)
  if hours:
    return f"{hours} h {rest // 60:02d} min"
  return f"{rest // 60} min {rest % 60:02d} s" if rest >= 60 else f"{seconds:.1f} s"
