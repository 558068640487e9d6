"""Packing: which samples share a row. Works on lengths alone, so no tokens are read."""

import bisect
from collections.abc import Sequence

import numpy as np


def pack(
  order: Sequence[int], lengths: np.ndarray, row_length: int, window: int, rng: np.random.Generator
) -> list[list[int]]:
  """Returns rows of sample numbers, best fit decreasing inside windows of the given order.

  Args:
    order: sample numbers.
    lengths: int[n], tokens of every sample; those in `order` fit a row.
    row_length: tokens of a row.
    window: samples that are packed together; a larger one packs tighter and mixes less.
    rng: shuffles the rows of each window, which come out sorted by length.
  """
  rows = []
  for start in range(0, len(order), window):
    packed = _best_fit(order[start : start + window], lengths, row_length)
    rows += [packed[i] for i in rng.permutation(len(packed))]
  return rows


def _best_fit(samples: Sequence[int], lengths: np.ndarray, row_length: int) -> list[list[int]]:
  rows: list[list[int]] = []
  space: list[tuple[int, int]] = []  # (free tokens, row), sorted
  for sample in sorted(samples, key=lambda s: -lengths[s]):
    length = int(lengths[sample])
    at = bisect.bisect_left(space, (length, -1))
    if at == len(space):
      free, row = row_length, len(rows)
      rows.append([])
    else:
      free, row = space.pop(at)
    rows[row].append(int(sample))
    bisect.insort(space, (free - length, row))
  return rows
