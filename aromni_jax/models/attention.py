"""One attention function, three backends, equal results.

"xla" runs everywhere, "splash" is the TPU kernel, "cudnn" the GPU one; "auto" chooses by platform
and shape.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aromni_jax.models.sharding import on_devices, shard

Array = jax.Array

_MASKED = -1e30

# Name of what the backward pass needs of the forward pass, see `decoder.REMAT_SAVES`.
CONTEXT = "context"


def keep_cudnn(primitive, *_, **__) -> bool:
  """A remat policy: keeps what cuDNN's forward pass returns, which JAX gives no name."""
  return primitive.name == "dot_product_attention_fwd_wrapper"


def attention(
  q: Array,
  k: Array,
  v: Array,
  *,
  segment_ids: Array | None = None,
  max_segments: int = 0,
  backend: str = "auto",
) -> Array:
  """Causal attention inside segments.

  Args:
    q: [B, T, N, H]; scaled by H ** -0.5 here.
    k, v: [B, T, K, H]; N is a multiple of K, and query head n sees key head n // (N // K).
    segment_ids: int32[B, T]; positions see earlier positions of their own segment. None is one
      segment.
    max_segments: no row has more runs of equal ids than this, padding counted, and every segment is
      one run; 0 promises nothing. The cuDNN backend then skips other segments instead of masking
      them; a row with more runs has NaN.
    backend: "auto", "xla", "splash" or "cudnn".

  Returns:
    [B, T, N, H] in q's dtype. Softmax is computed in float32.
  """
  if backend == "auto":
    backend = choose(jax.default_backend(), q.shape[1], q.shape[3], q.dtype.name)
  if backend == "splash":
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return splash(q, k, v, segment_ids).swapaxes(1, 2)
  if backend == "cudnn":
    return _cudnn(q, k, v, segment_ids, max_segments)
  length = q.shape[1]
  mask = jnp.tril(jnp.ones((length, length), bool))[None]
  if segment_ids is not None:
    mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
  return checkpoint_name(masked_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask), CONTEXT)


def masked_attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
  """Attention under an explicit mask: what the XLA backend and the cached step use.

  Args:
    q: [B, T, N, H]. k, v: [B, K, S, H], as the cache has them: a step reads every head's keys in
      one piece. mask: bool[B, T, S], True where a query sees a key.
  """
  batch, length, heads, head_dim = q.shape
  q = q.reshape(batch, length, k.shape[1], heads // k.shape[1], head_dim)
  scores = jnp.einsum("btkgh,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
  scores = jnp.where(mask[:, None, None], scores * head_dim**-0.5, _MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum("bkgts,bksh->btkgh", weights, v).reshape(batch, length, heads, head_dim)


def choose(platform: str, length: int, head_dim: int, dtype: str = "bfloat16") -> str:
  """Returns the fastest backend of a platform for a shape."""
  if platform == "tpu" and length % 128 == 0 and head_dim % 64 == 0:
    return "splash"
  if platform == "gpu" and dtype == "bfloat16" and head_dim <= 128:
    return "cudnn"
  return "xla"


def _cudnn(q: Array, k: Array, v: Array, segment_ids: Array | None, max_segments: int) -> Array:
  if segment_ids is not None and max_segments:
    return _cudnn_packed(q, k, v, segment_ids, max(max_segments, 2))
  mask = None
  if segment_ids is not None:
    mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
  return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")


def _cudnn_packed(q: Array, k: Array, v: Array, segment_ids: Array, max_segments: int) -> Array:
  """The kernel for packed rows, which skips other segments. JAX has no public name for it.

  Its backward pass works in 4 * B * max_segments * T * N * H bytes, so the number should be tight.
  """
  from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

  offsets, sizes, fits = _runs(segment_ids, max_segments)
  offsets, sizes = (shard(x, "act_batch", None) for x in (offsets, sizes))  # as q, k and v
  # NaN where the promise is broken. Of q, since the product fuses with its rotation.
  q *= jnp.where(fits, 1, jnp.nan).astype(q.dtype)[:, None, None, None]
  # jax 0.10.2 takes the offsets of k and v for those of q, so they need as many heads.
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  return dot_product_attention(
    q,
    k,
    v,
    q_seqlen=sizes,
    kv_seqlen=sizes,
    q_offsets=offsets,
    kv_offsets=offsets,
    scale=q.shape[-1] ** -0.5,
    mask_type=MaskType.PADDING_CAUSAL,
  )


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
  starts = jnp.pad(starts, ((0, 0), (1, 0)), constant_values=True)
  fits = jnp.sum(starts, axis=1) <= count
  starts = jnp.sort(jnp.where(starts, jnp.arange(length, dtype=jnp.int32), length))
  starts = jnp.pad(starts, ((0, 0), (0, count + 1)), constant_values=length)[:, : count + 1]
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

  k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
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
