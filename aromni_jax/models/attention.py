"""Causal attention inside segments: several backends, equal results.

A backend is an entry of `BACKENDS` at the end of this file, and what differs between them stands in
it; "auto" takes the first that the platform and the shape allow. Axis letters: B batch, T query
length, S key length, N heads, K kv heads, H head_dim.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aromni_jax import compat
from aromni_jax.models.sharding import on_devices, platform_of_mesh, shard

Array = jax.Array

_MASKED = -1e30

# Name of what the backward pass needs of the forward pass, see `models/remat.py`.
CONTEXT = "context"


@dataclasses.dataclass(frozen=True)
class Backend:
  """One way to compute attention.

  Attributes:
    name: of it, as `model.attention` has it.
    run: (q, k, v, segment_ids, max_segments) -> what `attention` returns, in the layout below.
    heads_first: whether q, k, v and the result are [B, N, T, H], which the decoder then computes
      from the start, instead of [B, T, N, H].
    supports: (platform, length, head_dim, dtype) -> whether it can run there.
    needs: what `supports` asks for, in words.
    keeps: the remat policy that keeps what its backward pass needs of its forward pass.
    kept_floats: float32 numbers per token and head that it keeps beside q, k, v and its result.
  """

  name: str
  run: Callable[[Array, Array, Array, Array | None, int], Array]
  heads_first: bool
  supports: Callable[[str, int, int, str], bool]
  needs: str
  keeps: Callable[..., bool]
  kept_floats: int


def choose(
  name: str, length: int, head_dim: int, dtype: str, platform: str | None = None
) -> Backend:
  """Returns the backend of a name.

  Args:
    name: "auto", or of `BACKENDS`.
    length: T, positions of a row.
    head_dim: H.
    dtype: of q, k and v, e.g. "bfloat16".
    platform: "cpu", "gpu" or "tpu"; by default the one that is traced for.

  Raises:
    ValueError: if the backend cannot run there, saying what it needs.
  """
  platform = platform or platform_of_mesh()
  able = [b for b in BACKENDS.values() if b.supports(platform, length, head_dim, dtype)]
  if name == "auto":
    return able[0]
  if BACKENDS[name] not in able:
    raise ValueError(
      f"model.attention {name!r} needs {BACKENDS[name].needs}; this is platform {platform}, length "
      f"{length}, model.head_dim {head_dim}, model.dtype {dtype}. Take 'auto', or one of "
      f"{', '.join(b.name for b in able)}"
    )
  return BACKENDS[name]


def attention(
  q: Array,
  k: Array,
  v: Array,
  *,
  segment_ids: Array | None = None,
  max_segments: int = 0,
  backend: str = "auto",
) -> Array:
  """Causal attention inside segments, by any backend.

  Args:
    q: [B, T, N, H]; scaled by H ** -0.5 here.
    k, v: [B, T, K, H]; N is a multiple of K, and query head n sees key head n // (N // K).
    segment_ids: int32[B, T]; positions see earlier positions of their own segment. None is one
      segment.
    max_segments: no row has more runs of equal ids than this, padding counted, and every segment is
      one run; 0 promises nothing. The cuDNN backend then skips other segments instead of masking
      them; a row with more runs has NaN.
    backend: "auto", or of `BACKENDS`.

  Returns:
    [B, T, N, H] in q's dtype. Softmax is computed in float32.

  Raises:
    ValueError: as `choose`.
  """
  chosen = choose(backend, q.shape[1], q.shape[3], q.dtype.name)
  if chosen.heads_first:
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, N, T, H], [B, K, T, H] twice
  out = chosen.run(q, k, v, segment_ids, max_segments)
  return out.swapaxes(1, 2) if chosen.heads_first else out  # [B, T, N, H]


def masked_attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
  """Attention under an explicit mask: what the XLA backend and the cached step use.

  Args:
    q: [B, T, N, H]. k, v: [B, K, S, H], as the cache has them: a step reads every head's keys in
      one piece. mask: bool[B, T, S], True where a query sees a key.
  """
  batch, length, heads, head_dim = q.shape
  groups = k.shape[1]
  q = q.reshape(batch, length, groups, heads // groups, head_dim)  # [B, T, K, N / K, H]
  scores = jnp.einsum("btkgh,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
  scores = jnp.where(mask[:, None, None], scores * head_dim**-0.5, _MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)  # [B, K, N / K, T, S]
  out = jnp.einsum("bkgts,bksh->btkgh", weights, v)
  return out.reshape(batch, length, heads, head_dim)  # [B, T, N, H]


def _xla(q: Array, k: Array, v: Array, segment_ids: Array | None, max_segments: int) -> Array:
  del max_segments
  length = q.shape[1]
  mask = jnp.tril(jnp.ones((length, length), bool))[None]  # [1, T, T]
  if segment_ids is not None:
    mask &= segment_ids[:, :, None] == segment_ids[:, None, :]  # [B, T, T]
  return checkpoint_name(masked_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask), CONTEXT)


def _cudnn(q: Array, k: Array, v: Array, segment_ids: Array | None, max_segments: int) -> Array:
  if segment_ids is not None and max_segments:
    return _cudnn_packed(q, k, v, segment_ids, max(max_segments, 2))
  mask = None
  if segment_ids is not None:
    mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]  # [B, 1, T, T]
  return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")


def _cudnn_packed(q: Array, k: Array, v: Array, segment_ids: Array, max_segments: int) -> Array:
  """The kernel for packed rows, which skips other segments.

  Its backward pass works in 4 * B * max_segments * T * N * H bytes, so the number should be tight.
  """
  offsets, sizes, fits = _runs(segment_ids, max_segments)
  offsets, sizes = (shard(x, "act_batch", None) for x in (offsets, sizes))  # as q, k and v
  # NaN where the promise is broken. Of q, since the product fuses with its rotation.
  q *= jnp.where(fits, 1, jnp.nan).astype(q.dtype)[:, None, None, None]
  # jax 0.10.2 takes the offsets of k and v for those of q, so they need as many heads.
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))  # [B, T, N, H]
  return compat.cudnn_attention(q, k, v, offsets, sizes)


def _runs(segment_ids: Array, count: int) -> tuple[Array, Array, Array]:
  """Returns the runs of equal ids of each row, as cuDNN wants them.

  Args:
    segment_ids: int32[B, T].
    count: most runs of a row.

  Returns:
    First positions int32[B, count + 1] and lengths int32[B, count], -1 for runs that a row does not
    have; bool[B], whether the row has no more than `count`.
  """
  length = segment_ids.shape[1]
  starts = segment_ids[:, 1:] != segment_ids[:, :-1]
  starts = jnp.pad(starts, ((0, 0), (1, 0)), constant_values=True)  # bool[B, T]
  fits = jnp.sum(starts, axis=1) <= count
  starts = jnp.sort(jnp.where(starts, jnp.arange(length, dtype=jnp.int32), length))
  starts = jnp.pad(starts, ((0, 0), (0, count + 1)), constant_values=length)
  starts = starts[:, : count + 1]  # [B, count + 1]
  sizes = jnp.where(starts[:, :-1] < length, jnp.diff(starts), -1)
  offsets = jnp.where(starts < length, starts, -1).at[:, -1].set(-1)
  return offsets, sizes, fits


def splash(
  q: Array, k: Array, v: Array, segment_ids: Array | None, *, interpret: bool = False
) -> Array:
  """The TPU kernel, on each device's own rows and heads: the compiler cannot split a kernel.

  Args:
    q: [B, N, T, H]. k, v: [B, K, T, H]; heads first.
    segment_ids: as in `attention`.
    interpret: runs it without a TPU, slowly.

  Returns:
    [B, N, T, H].
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

  k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))  # [B, N, T, H]
  if segment_ids is None:
    segment_ids = jnp.zeros((q.shape[0], q.shape[2]), jnp.int32)

  def local(q, k, v, ids):
    run = _splash_kernel(q.shape[1], q.shape[2], interpret)
    return jax.vmap(lambda q, k, v, ids: run(q, k, v, segment_ids=kernel.SegmentIds(ids, ids)))(
      q, k, v, ids
    )

  heads = ("act_batch", "act_heads", "act_length", None)
  run = on_devices(local, (heads, heads, heads, ("act_batch", "act_length")), heads)
  return run(q * q.shape[-1] ** -0.5, k, v, segment_ids)


def _splash_kernel(heads: int, length: int, interpret: bool):
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  mask = masks.MultiHeadMask([masks.CausalMask((length, length)) for _ in range(heads)])
  return kernel.make_splash_mha(
    mask,
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
    block_sizes=_block_sizes(length),
    residual_checkpoint_name=CONTEXT,
  )


def _block_sizes(length: int):
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

  # The largest that divides the length: fewer steps of the kernel. Beyond 512 more of the causal
  # triangle's upper half is computed than is won.
  block = max(b for b in range(128, 513, 128) if length % b == 0)
  return kernel.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=block,
    block_q_dq=block,
    block_kv_dq=block,
  )


_NAMED = jax.checkpoint_policies.save_only_these_names(CONTEXT)

# The first that supports a shape is what "auto" takes.
BACKENDS: dict[str, Backend] = {
  backend.name: backend
  for backend in (
    Backend(
      name="splash",
      run=lambda q, k, v, segment_ids, _: splash(q, k, v, segment_ids),
      heads_first=True,
      supports=lambda platform, length, head_dim, dtype: (
        platform == "tpu" and length % 128 == 0 and head_dim % 64 == 0
      ),
      needs="a TPU, a length of whole 128s and a model.head_dim of whole 64s",
      keeps=_NAMED,
      kept_floats=1,  # the logarithm of the softmax's denominator
    ),
    Backend(
      name="cudnn",
      run=_cudnn,
      heads_first=False,
      supports=lambda platform, length, head_dim, dtype: (
        platform == "gpu"
        and length % 2 == 0
        and head_dim % 8 == 0
        and head_dim <= 128
        and dtype == "bfloat16"
      ),
      needs="a GPU, an even length, a model.head_dim of whole 8s up to 128 and bfloat16",
      keeps=lambda primitive, *_, **__: primitive.name == compat.CUDNN_FORWARD,
      kept_floats=1,  # the same
    ),
    Backend(
      name="xla",
      run=_xla,
      heads_first=False,
      supports=lambda *_: True,
      needs="nothing",
      keeps=_NAMED,
      kept_floats=0,  # the softmax is computed again
    ),
  )
}
