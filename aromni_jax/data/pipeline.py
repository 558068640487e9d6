"""From token shards to batches with Grain: mix, pack, batch.

The order is a function of (seed, step) alone. Mixing and packing work on the records' lengths, so
each process plans all rows and reads only its own; the state of the iterator is a small JSON dict.
"""

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np
from absl import logging

from aromni_jax.data.batch import Batch
from aromni_jax.data.loss_weights import LossWeightConfig, loss_weights
from aromni_jax.data.packing import PackedOrder
from aromni_jax.data.token_shards import TokenShards
from aromni_jax.sample import without_prompt
from aromni_jax.tasks import get_task
from aromni_jax.vocabulary import Vocabulary

_ENDLESS = 2**40  # rows; Grain asks for a length
# The random stream of an epoch's order; every group of samples has another. There were nine tasks
# when the first runs began, and it stays nine, so that a seed's order stays.
_EPOCH = 9


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What is read, mixed and packed.

  Attributes:
    shards: folder of token shards.
    split: split to read.
    sequence_length: tokens of a row.
    mixture: task -> weight; tasks without one are left out. Empty takes all samples as they are.
    mixture_unit: whether weights are shares of "samples" or of "tokens".
    long_samples: what to do with a sample longer than a row: "error" or "drop".
    drop_prompt: share of the samples that answer with a picture alone which lose their prompt, so
      that pictures can be drawn with guidance (Ho and Salimans 2022).
    code_noise: share of the picture and speech codes of responses that are read as random ones, so
      that what comes next depends more on the prompt (`pkeep` in the code of Esser et al. 2021).
      Targets stay.
    window: samples that are packed together.
    max_samples: samples of a row at most; 0 is any number.
    seed: seed of the order.
    threads: reader threads of this process.
    loss_weights: token weights.
  """

  shards: str
  split: str = "train"
  sequence_length: int = 512
  mixture: Mapping[str, float] = dataclasses.field(default_factory=dict)
  mixture_unit: str = "tokens"
  long_samples: str = "error"
  drop_prompt: float = 0.0
  code_noise: float = 0.0
  window: int = 1024
  max_samples: int = 0
  seed: int = 0
  threads: int = 2
  loss_weights: LossWeightConfig = dataclasses.field(default_factory=LossWeightConfig)

  def __post_init__(self):
    for field, choices in {
      "mixture_unit": ("samples", "tokens"),
      "long_samples": ("error", "drop"),
    }.items():
      if getattr(self, field) not in choices:
        raise ValueError(f"data.{field} {getattr(self, field)!r}; expected one of {choices}")
    for field in ("drop_prompt", "code_noise"):
      if not 0 <= getattr(self, field) < 1:
        raise ValueError(f"data.{field} is {getattr(self, field)}; it must be a share, 0 <= x < 1")
    for task, weight in self.mixture.items():
      get_task(task)
      if weight < 0:
        raise ValueError(f"data.mixture.{task} is {weight}; weights must be >= 0")


class RowPlan:
  """Rows of sample numbers, epoch after epoch; made as they are asked for, from any thread.

  Args:
    lengths, tasks: of every sample.
    config: mixture, packing and seed.

  Raises:
    ValueError: if a sample is too long, or no sample has a task of the mixture.
  """

  def __init__(self, lengths: np.ndarray, tasks: np.ndarray, config: DataConfig):
    self.lengths, self.config = lengths, config
    long = np.flatnonzero(lengths > config.sequence_length)
    if len(long) and config.long_samples == "error":
      raise ValueError(
        f"{len(long)} samples of {config.shards} ({config.split}) are longer than "
        f"data.sequence_length {config.sequence_length}: record {long[0]} has {lengths[long[0]]} "
        "tokens; raise data.sequence_length or set data.long_samples=drop"
      )
    if len(long):
      logging.warning("Leaving out %d samples of %s that are too long.", len(long), config.shards)
    fits = lengths <= config.sequence_length
    self._pools = self._make_pools(tasks, fits)
    if not sum(len(pool) for pool, _ in self._pools):
      raise ValueError(f"{config.shards} ({config.split}) has no sample for data.mixture")
    self._lock = threading.Lock()  # reader threads share the plan
    self._epochs: dict[int, PackedOrder] = {}  # the last two that were asked for
    self._starts = [0]  # first row of each epoch that is known

  def _make_pools(self, tasks: np.ndarray, fits: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Sample numbers of each group and how many of them an epoch takes."""
    mixture = {task: w for task, w in self.config.mixture.items() if w > 0}
    if not mixture:
      everything = _numbers(fits)
      return [(everything, len(everything))]
    pools = {task: _numbers(fits & (tasks == get_task(task).id)) for task in mixture}
    pools = {task: pool for task, pool in pools.items() if len(pool)}
    share = {
      task: mixture[task]
      / (self.lengths[pool].mean() if self.config.mixture_unit == "tokens" else 1.0)
      for task, pool in pools.items()
    }
    # An epoch ends when the first task is used up; the others go on where they stopped.
    scale = min((len(pools[task]) / share[task] for task in pools), default=0)
    return [(pools[t], max(1, round(share[t] * scale))) for t in sorted(pools)]

  def epoch(self, number: int) -> PackedOrder:
    """Returns the rows of an epoch, arrays of sample numbers."""
    if number not in self._epochs:
      while len(self._epochs) > 1:
        del self._epochs[next(iter(self._epochs))]
      self._epochs[number] = self._make_epoch(number)
    return self._epochs[number]

  def _make_epoch(self, number: int) -> PackedOrder:
    seed, chosen = self.config.seed, []
    for group, (pool, count) in enumerate(self._pools):
      at, stop = number * count, (number + 1) * count
      while at < stop:  # continues through shuffled passes of the group
        turn, begin = divmod(at, len(pool))
        stream = group + (group >= _EPOCH)
        order = np.random.default_rng([seed, stream, turn]).permutation(pool)
        chosen.append(order[begin : begin + stop - at])
        at += len(chosen[-1])
    rng = np.random.default_rng([seed, _EPOCH, number])
    order = np.concatenate(chosen)
    rng.shuffle(order)
    config = self.config
    return PackedOrder(
      order, self.lengths, config.sequence_length, config.window, rng, config.max_samples
    )

  def row(self, number: int) -> np.ndarray:
    """Returns the sample numbers of a row, counted from the beginning of the first epoch."""
    with self._lock:
      while True:
        epoch = int(np.searchsorted(self._starts, number, side="right")) - 1
        try:
          return self.epoch(epoch)[number - self._starts[epoch]]
        except IndexError:  # it is past the last epoch that is known
          self._starts.append(self._starts[epoch] + len(self.epoch(epoch)))


def _numbers(chosen: np.ndarray) -> np.ndarray:
  """Returns where bool[n] is true, in half of NumPy's memory where that is enough."""
  return np.flatnonzero(chosen).astype(np.int32 if len(chosen) <= 2**31 else np.int64)


class PackedRows:
  """Random access to the rows that one process reads, as dicts of arrays [T]."""

  def __init__(
    self,
    shards: TokenShards,
    config: DataConfig,
    vocabulary: Vocabulary,
    batch_size: int,
    process_index: int,
    process_count: int,
  ):
    if batch_size % process_count:
      raise ValueError(f"batch_size {batch_size} is not a multiple of {process_count} processes")
    self.shards, self.config, self.vocabulary = shards, config, vocabulary
    self.plan = RowPlan(shards.lengths, shards.tasks, config)
    self.plan.row(0)
    self.batch_size, self.local = batch_size, batch_size // process_count
    self.offset = process_index * self.local

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    step, row = divmod(int(index), self.local)
    number = step * self.batch_size + self.offset + row
    rng = np.random.default_rng([self.config.seed, number])
    out = empty_row(self.config.sequence_length, self.vocabulary.eos)
    at = 0
    for segment, record in enumerate(self.plan.row(number), 1):
      sample = self.shards[record]
      if rng.random() < self.config.drop_prompt and get_task(sample.task).only_draws:
        sample = without_prompt(sample)
      n = len(sample.tokens)
      span = slice(at, at + n)
      out["tokens"][span] = sample.tokens
      if self.config.code_noise:
        for start, stop in at + sample.spans:
          response = out["tokens"][start:stop]
          add_code_noise(response, self.config.code_noise, self.vocabulary, rng)
      out["targets"][at : at + n - 1] = sample.tokens[1:]
      out["loss_weights"][span] = loss_weights(sample, self.vocabulary, self.config.loss_weights)
      out["positions"][span] = np.arange(n)
      out["segment_ids"][span] = segment
      out["task_ids"][span] = get_task(sample.task).id
      at += n
    return out


def add_code_noise(
  ids: np.ndarray, share: float, vocabulary: Vocabulary, rng: np.random.Generator
) -> None:
  """Puts random codes in place of a share of the picture and speech codes among int32[n] ids."""
  chosen = rng.random(len(ids)) < share
  for codes in (vocabulary.image, vocabulary.speech):
    hit = chosen & (ids >= codes.start) & (ids < codes.stop)
    ids[hit] = rng.integers(codes.start, codes.stop, hit.sum())


def empty_row(length: int, padding: int) -> dict[str, np.ndarray]:
  """Returns a row of padding, a dict of the fields of `Batch`."""
  row = {f.name: np.zeros(length, np.int32) for f in dataclasses.fields(Batch)}
  row["loss_weights"] = np.zeros(length, np.float32)
  row["tokens"][:] = row["targets"][:] = padding
  return row


class TrainIterator:
  """Endless batches of this process; `get_state` and `set_state` are exact."""

  def __init__(self, dataset: grain.IterDataset):
    self._iterator = iter(dataset)

  def __iter__(self) -> "TrainIterator":
    return self

  def __next__(self) -> Batch:
    return Batch(**next(self._iterator))

  def get_state(self) -> dict[str, Any]:
    """Returns a JSON-ready dict: the position after the batches handed out so far, the same for
    every number of processes."""
    return self._iterator.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to where `get_state` was called."""
    self._iterator.set_state(state)


def make_train_iterator(
  config: DataConfig,
  vocabulary: Vocabulary,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  codecs: Mapping[str, str] | None = None,
) -> TrainIterator:
  """Returns the iterator over this process's part of every batch, [batch_size / processes, T].

  Args:
    config: what is read.
    vocabulary: the model's id space.
    batch_size: rows of a step over all processes.
    process_index, process_count: which part this process reads.
    codecs: name -> fingerprint that the shards must have been made with.

  Raises:
    ValueError, FileNotFoundError: see `TokenShards`, `RowPlan`; or if the batch cannot be divided.
  """
  shards = TokenShards(config.shards, config.split, vocabulary, codecs)
  rows = PackedRows(shards, config, vocabulary, batch_size, process_index, process_count)
  # Batches are made before Grain counts, so a position is a step, whatever the number of processes.
  dataset = grain.MapDataset.source(rows).batch(batch_size // process_count)
  options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=4 * config.threads)
  return TrainIterator(dataset.to_iter_dataset(options))
