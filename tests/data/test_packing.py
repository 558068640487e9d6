import numpy as np
import pytest

from aromni_jax.data import packing


def packed(lengths, row_length, window, most=0, seed=1):
  """Rows of samples that come in the order of their numbers."""
  order, rng = np.arange(len(lengths)), np.random.default_rng(seed)
  return packing.PackedOrder(order, np.asarray(lengths), row_length, window, rng, most)


def best_fit_decreasing(samples, lengths, row_length, most):
  """The textbook's: the longest first, each into the fullest row that still has room."""
  rows = []
  for sample in sorted(samples, key=lambda s: -lengths[s]):
    space = [row_length - sum(lengths[s] for s in row) for row in rows]
    fits = [r for r in range(len(rows)) if space[r] >= lengths[sample] and len(rows[r]) != most]
    if fits:
      rows[min(fits, key=lambda r: (space[r], r))].append(sample)
    else:
      rows.append([sample])
  return rows


@pytest.mark.parametrize("most", [0, 1, 3])
def test_windows_are_packed_best_fit_decreasing(most):
  lengths = np.random.default_rng(0).integers(1, 61, 230)
  rows = packed(lengths, 60, window=50, most=most)
  want, at = [], 0
  for start in range(0, 230, 50):
    want.append(best_fit_decreasing(range(start, min(start + 50, 230)), lengths, 60, most))
  assert len(rows) == sum(map(len, want))
  for window in want:  # rows of a window stay together, shuffled
    got = [rows[at + i].tolist() for i in range(len(window))]
    assert sorted(got) == sorted(window)
    assert got != window
    at += len(window)
  with pytest.raises(IndexError, match=f"row {at} of {at}"):
    rows[at]


def test_rows_take_any_number_of_samples_unless_told_otherwise():
  rng = np.random.default_rng(0)
  rows = list(packing.PackedOrder(np.arange(7), np.ones(7, int), 7, 10, rng))
  assert [len(row) for row in rows] == [7]


def test_a_sample_fills_what_is_left_of_a_row_to_the_last_token():
  assert [row.tolist() for row in packed([6, 4, 10], 10, window=3, seed=0)] in (
    [[2], [0, 1]],
    [[0, 1], [2]],
  )


def test_there_may_be_more_rows_than_at_first():
  lengths = np.random.default_rng(0).integers(30, 61, 9000)
  for window in (10, 9000):
    rows = list(packed(lengths, 60, window))
    assert sorted(np.concatenate(rows)) == list(range(9000)) and len(rows) > 2048
    assert max(lengths[row].sum() for row in rows) <= 60 and all(map(len, rows))


def test_another_seed_shuffles_the_rows_another_way():
  lengths = np.random.default_rng(0).integers(1, 61, 100)
  one, other, again = ([r.tolist() for r in packed(lengths, 60, 100, seed=s)] for s in (1, 2, 1))
  assert one == again != other and sorted(one) == sorted(other)


def test_rows_have_no_more_samples_than_allowed():
  lengths = np.random.default_rng(0).integers(1, 60, 500)
  rng = np.random.default_rng(1)
  rows = list(packing.PackedOrder(np.arange(500), lengths, 200, 100, rng, most=3))
  assert max(map(len, rows)) == 3
  assert sorted(np.concatenate(rows)) == list(range(500))
  assert max(lengths[row].sum() for row in rows) <= 200
