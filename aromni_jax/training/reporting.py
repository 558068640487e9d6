"""What a run tells while it trains: progress, speed, and one line of metrics."""

import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from aromni_jax.training import writer as writer_lib
from aromni_jax.training.config import TrainConfig
from aromni_jax.training.goodput import Goodput
from aromni_jax.training.writer import Writer
from aromni_jax.vocabulary import MODALITIES


class Clock:
  """Progress and speed of a run.

  Args:
    config: its length.
    step: steps that are done already.
    goodput: what the speed is measured with.
  """

  def __init__(self, config: TrainConfig, step: int, goodput: Goodput):
    self._config, self._began, self._goodput = config, time.monotonic(), goodput
    self._start = self._step = step
    self._tokens, self._since, self._waited = 0.0, *self._seconds()

  def progress(self, step: int) -> float:
    """Share of the run that is done, by steps or, with `max_minutes`, by the clock if that is more.

    The clock starts after the first step, which compiles.
    """
    done = step / self._config.num_steps
    if not self._config.max_minutes:
      return done
    if step <= self._start + 1:
      self._began = time.monotonic()
    return max(done, (time.monotonic() - self._began) / (60 * self._config.max_minutes))

  def count(self, tokens: float) -> None:
    """Adds real tokens to those since the last `speed`."""
    self._tokens += tokens

  def speed(self, step: int) -> dict[str, float]:
    """Returns real tokens per second, seconds of a step and share of waiting for data since the
    last call, without compiling, saves, evaluations and the like."""
    steps, waited = self._seconds()
    spent = max(steps - self._since, 1e-9)
    out = {
      "tokens_per_second": self._tokens / spent,
      "step_seconds": spent / max(step - self._step, 1),
      "data_wait": (waited - self._waited) / spent,
    }
    self._tokens, self._step, self._since, self._waited = 0.0, step, steps, waited
    return out

  def _seconds(self) -> tuple[float, float]:
    """In steps, and of these waiting for data."""
    seconds = self._goodput.seconds
    return seconds("step", "data_wait"), seconds("data_wait")


def fetch(step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
  """Returns the metrics of a step on the host.

  Raises:
    FloatingPointError: if the loss or its gradient is not finite.
  """
  values = {k: float(v) for k, v in jax.device_get(metrics).items()}
  if not np.isfinite([values["loss"], values["grad_norm"]]).all():
    raise FloatingPointError(
      f"the loss is {values['loss']} at step {step}, the norm of its gradient "
      f"{values['grad_norm']}; nothing was saved after it. Lower "
      "config.optimizer.learning_rate, or go on from the last checkpoint with other data"
    )
  return values


def write_line(
  config: TrainConfig,
  step: int,
  values: Mapping[str, float],
  clock: Clock,
  goodput: Goodput,
  writer: Writer,
) -> None:
  """Writes the metrics of a step with the run's speed, memory and goodput, and logs the main ones.

  Args:
    config: the run.
    step: that is done.
    values: what `fetch` returned; tasks and modalities that the batch lacks are left out.
    clock, goodput, writer: of the run.
  """
  speed = clock.speed(step)
  peak = writer_lib.peak_flops()
  if peak:
    flops = config.model.flops_per_token(config.data.sequence_length)
    speed["mfu"] = speed["tokens_per_second"] * flops / peak
  values = {k: v for k, v in values.items() if v or not k.startswith(("task/", "modality/"))}
  goodput.record(step)
  memory, shares = writer_lib.memory(), goodput.shares()
  writer.write(step, values | speed | memory | shares)
  modalities = " ".join(
    f"{m} {values.get(f'modality/{m}', 0.0):.3f}" for m in MODALITIES if m != "special"
  )
  logging.info(
    "step %d (%.0f %%) loss %.4f, %s, rate %.2e, norm %.2f, "
    "%.0f tokens/s, %.3f s/step, data wait %.0f %%%s%s, goodput %.0f %%",
    *(step, 100 * clock.progress(step), values["loss"], modalities),
    *(values["learning_rate"], values["grad_norm"], speed["tokens_per_second"]),
    *(speed["step_seconds"], 100 * speed["data_wait"]),
    f", MFU {100 * speed['mfu']:.0f} %" if "mfu" in speed else "",
    f", HBM {memory['memory/peak_gib']:.1f} GiB" if "memory/peak_gib" in memory else "",
    100 * shares["goodput"],
  )
