"""The GPU's attention as far as a CPU can tell: what cuDNN is told, and that JAX still takes it.
`benchmarks/gpu_stack.py` compares the numbers on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from aromni_jax.models import attention as attention_lib


@pytest.fixture
def gpu(monkeypatch):
  """JAX asks the machine for cuDNN's version and the card's generation: an H100's."""
  for name, answer in (
    ("check_cudnn_version", 91500),
    ("check_compute_capability", True),
    ("is_cuda_compute_capability_equal", False),
  ):
    monkeypatch.setattr(fused_attention_stablehlo, name, lambda *_, answer=answer: answer)


def program(**arguments) -> str:
  """The GPU program of attention and its gradient on [2, 256, 4, 128] with two key heads."""
  q, kv = (jax.ShapeDtypeStruct((2, 256, heads, 128), jnp.bfloat16) for heads in (4, 2))
  ids = jax.ShapeDtypeStruct((2, 256), jnp.int32)

  def total(q, k, v, ids):
    out = attention_lib.attention(q, k, v, segment_ids=ids, backend="cudnn", **arguments)
    return out.astype(jnp.float32).sum()

  traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(q, kv, kv, ids)
  return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_runs():
  rng = np.random.default_rng(0)
  for count in (2, 5, 200):
    ids = np.repeat(rng.integers(0, 3, (8, 12)), rng.integers(1, 9, 12), axis=1)
    offsets, sizes, fits = map(np.asarray, attention_lib._runs(jnp.asarray(ids), count))
    assert offsets.shape == (8, count + 1) and sizes.shape == (8, count)
    for row, row_offsets, row_sizes, row_fits in zip(ids, offsets, sizes, fits, strict=True):
      starts = np.flatnonzero(np.diff(row, prepend=-1))
      assert row_fits == (len(starts) <= count)
      if row_fits:
        ends = np.append(starts[1:], len(row))
        n = len(starts)
        np.testing.assert_array_equal(row_offsets[:n], starts)
        np.testing.assert_array_equal(row_sizes[:n], ends - starts)
        assert (row_offsets[n:] == -1).all() and (row_sizes[n:] == -1).all()


def test_cudnn_skips_segments_where_their_number_is_known(gpu):
  masked, skipping = program(), program(max_segments=3)
  for text in (masked, skipping):
    assert text.count("custom_call @__cudnn$fmha") == 2  # forward and backward
  assert "256x256" in masked
  assert "256x256" not in skipping
  assert skipping.count("max_seg_per_batch\\22: 3") == 2
