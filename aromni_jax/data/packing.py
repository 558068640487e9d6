"""Packing: which samples share a row. Works on lengths alone, so no tokens are read."""

import bisect

import numpy as np
from absl import logging


class PackedOrder:
  """Rows of sample numbers: best fit decreasing inside windows of a given order.

  A window is packed when one of its rows is first asked for, so the first row of 100 M samples is
  there at once. It is a list of rows to whoever reads it; asking for its length packs everything.

  Args:
    order: int[n] sample numbers; is reordered in place as windows are packed.
    lengths: int[...], tokens of every sample; those in `order` fit a row.
    row_length: tokens of a row.
    window: samples that are packed together; a larger one packs tighter and mixes less.
    rng: shuffles the rows of each window, which come out sorted by length.
    most: samples of a row; 0 is any number.
  """

  def __init__(
    self,
    order: np.ndarray,
    lengths: np.ndarray,
    row_length: int,
    window: int,
    rng: np.random.Generator,
    most: int = 0,
  ):
    self._order, self._lengths = order, lengths
    self._row_length, self._window, self._rng, self._most = row_length, window, rng, most
    self._packed = 0  # samples of the windows that are packed
    # Where each row ends in `order`: _ends[i] to _ends[i + 1]. Grows by doubling.
    self._ends = np.zeros(1024, np.int64)
    self._rows = 0

  def __len__(self) -> int:
    while self._pack_window():
      pass
    return self._rows

  def __getitem__(self, number: int) -> np.ndarray:
    """Returns the sample numbers of a row; packs the windows up to it.

    Raises:
      IndexError: if there are fewer rows.
    """
    while number >= self._rows:
      if not self._pack_window():
        raise IndexError(f"row {number} of {self._rows}")
    return self._order[self._ends[number] : self._ends[number + 1]]

  def _pack_window(self) -> bool:
    """Packs the next window; returns whether there was one."""
    start = self._packed
    samples = self._order[start : start + self._window]
    if not len(samples):
      return False
    lengths = self._lengths[samples]
    by_length = np.argsort(-lengths, kind="stable")
    row_of = _best_fit(lengths[by_length].tolist(), self._row_length, self._most)
    count = int(row_of.max()) + 1
    rank = np.empty(count, np.int64)
    rank[self._rng.permutation(count)] = np.arange(count)
    row_of = rank[row_of]
    samples[:] = samples[by_length[np.argsort(row_of, kind="stable")]]
    if self._rows + count >= len(self._ends):
      self._ends = np.concatenate([self._ends, np.zeros(len(self._ends) + count, np.int64)])
    ends = start + np.cumsum(np.bincount(row_of, minlength=count))
    self._ends[self._rows + 1 : self._rows + 1 + count] = ends
    self._rows += count
    self._packed += len(samples)
    logging.log_every_n_seconds(
      logging.INFO, "%d of %d samples are packed into rows.", 10, self._packed, len(self._order)
    )
    return True


def _best_fit(lengths: list[int], row_length: int, most: int) -> np.ndarray:
  """Returns int64[n], the row of each sample; rows are numbered as they are opened.

  Args:
    lengths: tokens of the samples, longest first.
    row_length: tokens of a row.
    most: samples of a row; 0 is any number.
  """
  row_of, counts = [], []
  space: list[int] = []  # sorted; free tokens and, in the lower 32 bits, the row
  for length in lengths:
    at = bisect.bisect_left(space, length << 32)
    if at == len(space):
      entry = row_length << 32 | len(counts)
      counts.append(0)
    else:
      entry = space.pop(at)
    row = entry & 0xFFFFFFFF
    row_of.append(row)
    counts[row] += 1
    if counts[row] != most:
      bisect.insort(space, entry - (length << 32))
  return np.array(row_of, np.int64)
