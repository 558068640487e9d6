"""The choice of a backend; and the GPU's as far as a CPU can tell: what cuDNN is told, and that JAX
still takes it. `benchmarks/gpu_stack.py` compares the numbers on a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.ad_checkpoint import checkpoint_name

from aromni_jax.configs import base
from aromni_jax.models import attention as attention_lib
from aromni_jax.models import decoder as decoder_lib
from aromni_jax.models import remat
from aromni_jax.models.config import DecoderConfig
from aromni_jax.planning import estimate
from aromni_jax.training.config import TrainConfig, to_dataclass


@pytest.fixture
def gpu(monkeypatch):
  """JAX asks the machine for cuDNN's version and the card's generation: an H100's."""
  monkeypatch.setattr(attention_lib, "platform_of_mesh", lambda: "gpu")
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


@pytest.mark.parametrize(
  "platform, length, head_dim, dtype, auto",
  [
    ("tpu", 4096, 128, "bfloat16", "splash"),
    ("tpu", 128, 64, "float32", "splash"),
    ("tpu", 100, 128, "bfloat16", "xla"),
    ("tpu", 4096, 96, "bfloat16", "xla"),
    ("gpu", 4096, 128, "bfloat16", "cudnn"),
    ("gpu", 4096, 128, "float32", "xla"),
    ("gpu", 4096, 256, "bfloat16", "xla"),
    ("gpu", 4096, 60, "bfloat16", "xla"),
    ("gpu", 4095, 128, "bfloat16", "xla"),
    ("cpu", 4096, 128, "bfloat16", "xla"),
  ],
)
def test_auto_and_what_else_can_be_had(platform, length, head_dim, dtype, auto):
  shape = length, head_dim, dtype, platform
  assert attention_lib.choose("auto", *shape).name == auto
  able = {auto, "xla"}
  for name in attention_lib.BACKENDS:
    if name in able:
      assert attention_lib.choose(name, *shape).name == name
      continue
    with pytest.raises(ValueError) as e:
      attention_lib.choose(name, *shape)
    (line,) = str(e.value).splitlines()
    assert line.startswith(f"model.attention {name!r} needs a ")
    assert f"this is platform {platform}, length {length}, model.head_dim {head_dim}" in line


@pytest.mark.parametrize("backend, need", [("splash", "a TPU"), ("cudnn", "a GPU")])
def test_a_model_whose_backend_is_impossible_is_refused_before_it_is_compiled(backend, need):
  config = DecoderConfig(
    vocab_size=64, embed_dim=128, mlp_dim=64, num_layers=1, num_heads=1, num_kv_heads=1
  )
  config = dataclasses.replace(config, attention=backend)
  decoder = nnx.eval_shape(lambda: decoder_lib.Decoder(config, rngs=nnx.Rngs(0)))
  graphdef, params = nnx.split(decoder)
  ids = jax.ShapeDtypeStruct((1, 128), jnp.int32)
  with pytest.raises(ValueError, match=f"^model.attention '{backend}' needs {need}, .*cpu"):
    jax.jit(lambda params, ids: nnx.merge(graphdef, params)(ids, ids)).trace(params, ids)


@pytest.mark.slow
def test_an_entry_is_all_that_a_backend_needs(monkeypatch):
  """A new one is chosen, computes, keeps what it names and is counted."""

  def run(q, k, v, segment_ids, max_segments):
    calls.append(q.shape)
    k, v, q = (x.swapaxes(1, 2) for x in (k, v, q))
    return attention_lib.BACKENDS["xla"].run(q, k, v, segment_ids, max_segments).swapaxes(1, 2)

  calls = []
  new = dataclasses.replace(
    attention_lib.BACKENDS["xla"], name="new", run=run, heads_first=True, kept_floats=5
  )
  q, kv = (jax.random.normal(jax.random.key(0), (2, 16, heads, 8)) for heads in (4, 2))
  want = attention_lib.attention(q, kv, kv)
  backends = {"new": new, **attention_lib.BACKENDS}
  monkeypatch.setattr(attention_lib, "BACKENDS", backends)
  np.testing.assert_array_equal(attention_lib.attention(q, kv, kv), want)
  assert calls == [(2, 4, 16, 8)]
  run = to_dataclass(TrainConfig, base.get_config().to_dict())
  model = dataclasses.replace(run.model, remat_policy="norms")
  run = dataclasses.replace(run, model=model)
  found = [
    estimate.kept_bytes(
      dataclasses.replace(run, model=dataclasses.replace(model, attention=a)), 1, "cpu"
    )
    for a in ("auto", "xla")
  ]
  assert found[0] - found[1] == 5 * 4 * run.model.num_heads


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


@pytest.mark.parametrize("policy, kernels", [("full", 3), ("mlp", 2), ("norms", 2)])
def test_what_cudnn_gave_is_kept(gpu, policy, kernels):
  """Its forward kernel runs again only where the policy keeps nothing of attention."""
  ids = jnp.zeros((2, 256), jnp.int32)

  def layer(x):  # [B, T, N, H]
    x = checkpoint_name(x * 2, "qkv")
    return x + attention_lib.attention(x, x, x, segment_ids=ids, max_segments=3, backend="cudnn")

  def total(x):
    return remat.checkpoint(layer, policy)(x).astype(jnp.float32).sum()

  x = jax.ShapeDtypeStruct((2, 256, 4, 128), jnp.bfloat16)
  text = jax.jit(jax.value_and_grad(total)).trace(x).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("custom_call @__cudnn$fmha") == kernels
