"""Tokens per second of the loader, against what the busiest host could train on.

  python -m benchmarks.data
  python -m benchmarks.data --shards=data/tokens_base --sequence_length=512 --latencies_ms=0

Without --shards, samples of 100 to 1500 random ids of the 7B vocabulary are written and read. A
number of readers is measured at each latency per record: 0 is a local disk, 20 ms is simulated, as
of a bucket that is mounted. Cases take turns, and the median round counts. `of_need` is the speed
over what one host of the topology trains on with the 7B model at --mfu; at 1 the loader just keeps
up. Planning (mixing and packing, from lengths alone) is measured on its own, at --planned samples.
"""

import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from unittest import mock

import numpy as np
from absl import app, flags

from aromni_jax.cluster import hardware
from aromni_jax.data import token_shards
from aromni_jax.data.pipeline import DataConfig, RowPlan, make_train_iterator
from aromni_jax.data.token_shards import TokenShards
from aromni_jax.models.config import DecoderConfig
from aromni_jax.sample import Sample
from aromni_jax.tasks import TASKS, task_name
from aromni_jax.vocabulary import Vocabulary, get_vocabulary

_SHARDS = flags.DEFINE_string("shards", "", "Folder of token shards; empty makes some.")
_BATCHES = flags.DEFINE_integer("batches", 40, "Measured batches of a case and round.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Times that every case has its turn.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Rows of a batch.")
_LENGTH = flags.DEFINE_integer("sequence_length", 4096, "Tokens of a row.")
_THREADS = flags.DEFINE_list("threads", ["1", "2", "4"], "Numbers of readers.")
_LATENCIES = flags.DEFINE_list("latencies_ms", ["0", "20"], "Added to the read of each record.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5p:4x4x4", "What is to be fed; v5p-128 by default.")
_MFU = flags.DEFINE_float("mfu", 0.7, "Share of the chips' peak that training reaches.")
_PLANNED = flags.DEFINE_integer("planned", 1_000_000, "Samples of the plan; 0 plans none.")


def samples(count: int, vocabulary: Vocabulary) -> Iterator[Sample]:
  """Yields samples of 100 to 1500 random ids."""
  rng = np.random.default_rng(0)
  for i in range(count):
    ids = rng.integers(10, vocabulary.size, rng.integers(100, 1501), dtype=np.int32)
    ids[0], ids[-1] = vocabulary.bos, vocabulary.eos
    yield Sample(ids, task_name(i % len(TASKS)), len(ids) // 3, f"sample{i}")


def host_tokens_per_second(topology: str, mfu: float, length: int) -> float:
  """Returns what one host of a topology trains on with the 7B model."""
  chip = hardware.parse_topology(topology).chip
  return chip.chips_per_host * chip.peak_flops * mfu / DecoderConfig().flops_per_token(length)


def measure(shards: str, threads: int, latency_ms: float) -> tuple[float, float]:
  """Returns tokens per second, of which padding is no part, and the share of them in the rows."""
  vocabulary = Vocabulary.from_dict(token_shards.read_manifest(shards)["vocabulary"])
  config = DataConfig(shards, sequence_length=_LENGTH.value, long_samples="drop", threads=threads)
  read = TokenShards.__getitem__

  def slow(self, index):
    time.sleep(latency_ms / 1000)
    return read(self, index)

  with mock.patch.object(TokenShards, "__getitem__", slow if latency_ms else read):
    iterator = make_train_iterator(config, vocabulary, batch_size=_BATCH_SIZE.value)
    # What was read ahead of the clock would be counted: as many batches go first. A slow store is
    # measured on fewer.
    for _ in range(4 * threads + 1):
      next(iterator)
    batches = max(4, _BATCHES.value // 10) if latency_ms else _BATCHES.value
    real = total = 0
    began = time.perf_counter()
    for _ in range(batches):
      batch = next(iterator)
      real, total = real + int((batch.segment_ids > 0).sum()), total + batch.tokens.size
    seconds = time.perf_counter() - began
  return real / seconds, real / total


def measure_plan(count: int) -> dict[str, float]:
  """Returns seconds until the first row of a new run, and until the last of an epoch is known."""
  lengths = np.random.default_rng(0).integers(100, 1501, count).astype(np.int32)
  began = time.perf_counter()
  config = DataConfig("", sequence_length=_LENGTH.value)
  plan = RowPlan(lengths, np.zeros(count, np.int8), config)
  plan.row(0)
  first = time.perf_counter() - began
  rows = len(plan.epoch(0))
  seconds = time.perf_counter() - began
  return {
    "samples": count,
    "rows": rows,
    "first_row_s": round(first, 3),
    "all_s": round(seconds, 3),
  }


def main(argv: list[str]) -> None:
  del argv
  with tempfile.TemporaryDirectory() as scratch:
    shards = _SHARDS.value
    if not shards:
      shards = str(pathlib.Path(scratch) / "tokens")
      vocabulary = get_vocabulary("aromni_7b")
      token_shards.write(shards, {"train": samples(10_000, vocabulary)}, vocabulary, {})
    cases = [(int(t), float(ms)) for ms in _LATENCIES.value for t in _THREADS.value]
    speeds = {case: [] for case in cases}
    for i in range(_ROUNDS.value):
      for case in cases:
        speed, share = measure(shards, *case)
        speeds[case].append(speed)
        print(f"round {i}: {case[0]} readers, {case[1]} ms: {speed:,.0f} tokens/s", flush=True)
  need = host_tokens_per_second(_TOPOLOGY.value, _MFU.value, _LENGTH.value)
  readers = [
    {
      "threads": threads,
      "latency_ms": ms,
      "tokens_per_second": round(statistics.median(speeds[threads, ms])),
      "of_need": round(statistics.median(speeds[threads, ms]) / need, 2),
    }
    for threads, ms in cases
  ]
  result = {
    "benchmark": "data",
    "cores": os.cpu_count(),
    "sequence_length": _LENGTH.value,
    "real_share": round(share, 4),
    "topology": _TOPOLOGY.value,
    "mfu": _MFU.value,
    "host_needs_tokens_per_second": round(need),
    "readers": readers,
  }
  if _PLANNED.value:
    result["plan"] = measure_plan(_PLANNED.value)
  print(json.dumps(result))


if __name__ == "__main__":
  app.run(main)
