"""Where a run's figures go: metrics.jsonl, TensorBoard and the log."""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import tensorboardX

from aromni_jax.cluster import hardware


def peak_flops() -> float | None:
  """Returns the peak FLOPs per second of all devices, or None where no data sheet says so."""
  chip = hardware.chip_of(jax.devices()[0].device_kind)
  return chip.peak_flops * jax.device_count() if chip else None


def memory() -> dict[str, float]:
  """Returns the GiB that are and were at most in use on the fullest device of this process, or
  nothing where the platform does not count them (CPU)."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  names = {"memory/in_use_gib": "bytes_in_use", "memory/peak_gib": "peak_bytes_in_use"}
  found = {ours: [s[theirs] for s in stats if theirs in s] for ours, theirs in names.items()}
  return {name: max(values) / hardware.GIB for name, values in found.items() if values}


class Writer:
  """Writes figures of the first process; the others' calls do nothing.

  Args:
    workdir: `metrics.jsonl` and `tensorboard/` are made in it; lines after `step` are cut, so that
      a resumed run has every step once.
    step: the step that the run goes on from.

  Attributes:
    names: of the figures of `step` that are there already; empty in all processes but the first.
  """

  def __init__(self, workdir: str | os.PathLike, step: int):
    self._active = jax.process_index() == 0
    self.names: frozenset[str] = frozenset()
    if not self._active:
      return
    path = pathlib.Path(workdir) / "metrics.jsonl"
    if path.exists():
      lines = path.read_text().splitlines()
      kept = [line for line in lines if _step_of(line) <= step]
      self.names = frozenset(n for x in map(json.loads, kept) if x["step"] == step for n in x)
      partial = path.with_name(path.name + ".partial")
      partial.write_text("".join(line + "\n" for line in kept))
      partial.replace(path)
    self._file = path.open("a")
    # TensorBoard forgets what a killed attempt wrote after the step.
    purge = {"purge_step": step + 1} if step else {}
    self._board = tensorboardX.SummaryWriter(str(pathlib.Path(workdir) / "tensorboard"), **purge)

  def write(self, step: int, values: dict[str, float]) -> None:
    """Writes one line of scalars."""
    if not self._active:
      return
    self._file.write(json.dumps({"step": step, **values}) + "\n")
    self._file.flush()
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def write_sample(self, step: int, name: str, sample: Any, sample_rate: int) -> None:
    """Writes a generated response: text, picture and sound, whichever it has."""
    if not self._active:
      return
    if sample.text:
      self._board.add_text(name, sample.text, step)
    if sample.image is not None:
      self._board.add_image(name, np.asarray(sample.image), step, dataformats="HWC")
    if sample.speech is not None:
      wav = np.clip(sample.speech, -1, 1)[:, None]
      self._board.add_audio(name, wav, step, sample_rate=sample_rate)

  def close(self) -> None:
    if self._active:
      self._file.close()
      self._board.close()


def _step_of(line: str) -> float:
  try:
    return json.loads(line)["step"]
  except (json.JSONDecodeError, KeyError):
    return float("inf")  # a torn last line
