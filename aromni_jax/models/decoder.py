"""The decoder: Chameleon's Transformer (arXiv 2405.09818) with AR-Omni's swin-norm as a choice.

Parameters are float32 (or `param_dtype`), computation runs in `dtype`. The head is apart from the
stack, so that losses can apply it in blocks. Axis letters: B batch, T query length, S key length,
N heads, K kv heads, H head_dim, D embed, F mlp, V vocabulary, L layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from aromni_jax.models import remat
from aromni_jax.models.attention import choose, masked_attention
from aromni_jax.models.config import DecoderConfig
from aromni_jax.models.sharding import RULES, lookup, product, shard, weight

Array = jax.Array

_QK_NORM_EPSILON = 1e-5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys (after rotation) and values; slot s holds position s.

  Attributes:
    layers: (k, v) of each layer, [B, K, S, H] in the compute dtype. They are apart so that a step
      writes into them and copies nothing.
  """

  layers: tuple[tuple[Array, Array], ...]


def init_cache(config: DecoderConfig, batch_size: int, max_length: int) -> Cache:
  """Returns an empty cache of `max_length` positions for `batch_size` rows."""
  zeros = jnp.zeros(
    (batch_size, config.num_kv_heads, max_length, config.head_dim), config.compute_dtype
  )
  return Cache(((zeros, zeros),) * config.num_layers)


class RMSNorm(nnx.Module):
  """x / sqrt(mean(x^2) + eps) in float32, cast to x's dtype, times the gain."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    init = weight(nnx.initializers.ones_init(), "norm")
    self.scale = nnx.Param(init(rngs.params(), (config.embed_dim,), jnp.dtype(config.param_dtype)))
    self.epsilon = config.norm_eps

  def __call__(self, x: Array) -> Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
    return y.astype(x.dtype) * self.scale[...].astype(x.dtype)


class HeadNorm(nnx.Module):
  """LayerNorm over head_dim; gain and bias are shared by the heads or one per head. [..., n, H]."""

  def __init__(self, num_heads: int, config: DecoderConfig, *, rngs: nnx.Rngs):
    shape, names = (config.head_dim,), ("head_dim",)
    if config.per_head_norm:
      shape, names = (num_heads, *shape), ("norm", *names)
    dtype = jnp.dtype(config.param_dtype)
    ones, zeros = nnx.initializers.ones_init(), nnx.initializers.zeros_init()
    self.scale = nnx.Param(weight(ones, *names)(rngs.params(), shape, dtype))
    self.bias = nnx.Param(weight(zeros, *names)(rngs.params(), shape, dtype))

  def __call__(self, x: Array, heads_first: bool = False) -> Array:
    """Normalises [..., n, H], or [B, n, T, H] with heads first."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + _QK_NORM_EPSILON)
    scale, bias = (p[...].astype(jnp.float32) for p in (self.scale, self.bias))
    if heads_first and scale.ndim == 2:
      scale, bias = scale[:, None], bias[:, None]
    return (y * scale + bias).astype(x.dtype)


class Linear(nnx.Module):
  """A product with a kernel [in, out] whose axes have logical names; no bias."""

  def __init__(
    self,
    c_in: int,
    c_out: int,
    names: tuple[str, str],
    config: DecoderConfig,
    *,
    std: float,
    rngs: nnx.Rngs,
  ):
    init = weight(nnx.initializers.normal(std), *names)
    self.kernel = nnx.Param(init(rngs.params(), (c_in, c_out), jnp.dtype(config.param_dtype)))
    self.names = names

  def __call__(self, x: Array) -> Array:
    return product(x, self.kernel[...], self.names)


def rotary_angles(positions: Array, config: DecoderConfig, dtype: jnp.dtype) -> tuple[Array, Array]:
  """Returns cos and sin [B, T, 1, H/2] of the rotary embedding, computed in float32."""
  half = config.head_dim // 2
  frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = positions[..., None, None].astype(jnp.float32) * frequencies
  return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
  """Rotates [B, T, N, H], pairing dimension j with j + H/2 (half-split layout)."""
  a, b = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Attention(nnx.Module):
  """Self-attention with q/k norms and rotary positions."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    c = self.config = config
    q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    std, out_std = c.init_std, c.init_std / (2 * c.num_layers) ** 0.5
    self.q = Linear(c.embed_dim, q_width, ("embed", "heads"), c, std=std, rngs=rngs)
    self.k = Linear(c.embed_dim, kv_width, ("embed", "kv_heads"), c, std=std, rngs=rngs)
    self.v = Linear(c.embed_dim, kv_width, ("embed", "kv_heads"), c, std=std, rngs=rngs)
    self.out = Linear(q_width, c.embed_dim, ("heads", "embed"), c, std=out_std, rngs=rngs)
    self.q_norm = HeadNorm(c.num_heads, c, rngs=rngs)
    self.k_norm = HeadNorm(c.num_kv_heads, c, rngs=rngs)

  def __call__(
    self,
    x: Array,
    rotary: tuple[Array, Array],
    positions: Array,
    segment_ids: Array | None,
    cache: tuple[Array, Array] | None,
  ) -> tuple[Array, tuple[Array, Array] | None]:
    """Returns [B, T, D] and the new cache of the layer.

    Args:
      x: [B, T, D].
      rotary: of the positions, see `rotary_angles`.
      positions: int32[B, T]; slots of the cache.
      segment_ids: int32[B, T], without a cache.
      cache: keys and values [B, K, S, H] of earlier steps; None attends to x alone.
    """
    q, k, v = self._project(x)
    if cache is None:
      out = self._attend(q, k, v, rotary, segment_ids)
    else:
      out, cache = self._attend_to_cache(q, k, v, rotary, positions, cache)
    out = out.reshape(*x.shape[:2], -1)  # [B, T, N * H]
    return checkpoint_name(self.out(out), "attention_out"), cache  # [B, T, D]

  def _project(self, x: Array) -> tuple[Array, Array, Array]:
    """[B, T, D] -> q [B, T, N, H], k and v [B, T, K, H]."""
    c = self.config
    if self.k is None:  # joined by `unroll`
      ends = c.num_heads * c.head_dim, (c.num_heads + c.num_kv_heads) * c.head_dim
      projected = jnp.split(self.q(x), ends, axis=-1)
    else:
      projected = [checkpoint_name(f(x), "qkv") for f in (self.q, self.k, self.v)]
    counts = c.num_heads, c.num_kv_heads, c.num_kv_heads
    return tuple(
      y.reshape(*x.shape[:2], count, c.head_dim) for y, count in zip(projected, counts, strict=True)
    )

  def _attend(self, q, k, v, rotary, segment_ids) -> Array:
    """Training, and whatever else has whole rows: [B, T, N, H] of what `_project` gives."""
    c = self.config
    backend = choose(c.attention, q.shape[1], c.head_dim, c.dtype)
    if backend.heads_first:  # what comes before the kernel is faster in its order, too
      q, k, v, *rotary = (x.swapaxes(1, 2) for x in (q, k, v, *rotary))  # [B, N, T, H] ...
    q, k, v = self._normalise_and_rotate(q, k, v, rotary, backend.heads_first)
    out = backend.run(q, k, v, segment_ids, c.max_segments)
    return out.swapaxes(1, 2) if backend.heads_first else out

  def _attend_to_cache(self, q, k, v, rotary, positions, cache) -> tuple[Array, Any]:
    """Steps of generation: [B, T, N, H], and the cache with their keys and values."""
    q, k, v = self._normalise_and_rotate(q, k, v, rotary, heads_first=False)
    rows = jnp.arange(len(q))[:, None]
    k_all, v_all = (  # [B, K, S, H]
      old.at[rows, :, positions].set(new) for old, new in zip(cache, (k, v), strict=True)
    )
    slots = jnp.arange(k_all.shape[2])
    out = masked_attention(q, k_all, v_all, slots <= positions[..., None])  # mask [B, T, S]
    return out, (k_all, v_all)

  def _normalise_and_rotate(self, q, k, v, rotary, heads_first: bool):
    """Norms and rotary positions of q and k, and the places of all three on the mesh."""

    def place(x: Array, heads: str) -> Array:
      length_and_heads = (heads, "act_length") if heads_first else ("act_length", heads)
      return shard(x, "act_batch", *length_and_heads, None)

    q = place(rotate(self.q_norm(q, heads_first), *rotary), "act_heads")
    k = place(rotate(self.k_norm(k, heads_first), *rotary), "act_kv_heads")
    return q, k, place(v, "act_kv_heads")


class MLP(nnx.Module):
  """SwiGLU: down(silu(gate x) * up x)."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    c = config
    std, out_std = c.init_std, c.init_std / (2 * c.num_layers) ** 0.5
    self.gate = Linear(c.embed_dim, c.mlp_dim, ("embed", "mlp"), c, std=std, rngs=rngs)
    self.up = Linear(c.embed_dim, c.mlp_dim, ("embed", "mlp"), c, std=std, rngs=rngs)
    self.down = Linear(c.mlp_dim, c.embed_dim, ("mlp", "embed"), c, std=out_std, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    if self.up is None:  # joined by `unroll`
      gate, up = jnp.split(self.gate(x), 2, axis=-1)
    else:
      gate, up = checkpoint_name(self.gate(x), "mlp_gate"), checkpoint_name(self.up(x), "mlp_up")
    h = shard(jax.nn.silu(gate) * up, "act_batch", "act_length", "act_mlp")  # [B, T, F]
    return checkpoint_name(self.down(h), "mlp_out")  # [B, T, D]


class Layer(nnx.Module):
  """Attention and MLP, each with residual. Pre-norm normalises the branches' inputs, swin-norm
  their outputs: `h = x + norm(attention(x)); y = h + norm(mlp(h))`."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    self.swin = config.norm_placement == "swin"
    self.attention_norm = RMSNorm(config, rngs=rngs)
    self.attention = Attention(config, rngs=rngs)
    self.mlp_norm = RMSNorm(config, rngs=rngs)
    self.mlp = MLP(config, rngs=rngs)

  def __call__(self, x, rotary, positions, segment_ids, cache):
    """Returns [B, T, D] and the new cache of the layer; arguments are those of `Attention`."""
    x = shard(x, "act_batch", "act_length", "act_embed")
    h = x if self.swin else self.attention_norm(x)
    h, cache = self.attention(h, rotary, positions, segment_ids, cache)
    x = x + (self.attention_norm(h) if self.swin else h)
    h = self.mlp(x if self.swin else self.mlp_norm(x))
    x = x + (self.mlp_norm(h) if self.swin else h)
    return x, cache


class Decoder(nnx.Module):
  """Token ids -> hidden states; `logits` applies the untied head."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    c = self.config = config
    dtype = jnp.dtype(c.param_dtype)
    shape = (c.vocab_size, c.embed_dim)
    # Named so that a lookup needs no gather of the table: rows over tensor, columns over fsdp.
    init = weight(nnx.initializers.normal(c.init_std), "vocab", "embed")
    self.embedding = nnx.Param(init(rngs.params(), shape, dtype))

    @nnx.transform_metadata(in_axes=0, out_axes=0, partition=RULES["layers"])
    def make_layers(key: Array) -> Layer:
      return Layer(config, rngs=nnx.Rngs(key))

    self.layers = jax.vmap(make_layers)(jax.random.split(rngs.params(), c.num_layers))
    self.norm = RMSNorm(c, rngs=rngs)
    init = weight(nnx.initializers.normal(c.init_std), "embed", "vocab")
    self.head = nnx.Param(init(rngs.params(), shape[::-1], dtype))

  def __call__(
    self,
    tokens: Array,
    positions: Array,
    segment_ids: Array | None = None,
    cache: Cache | None = None,
  ) -> Array | tuple[Array, Cache]:
    """Returns the hidden states after the final norm, [B, T, D] in the compute dtype.

    Args:
      tokens: int32[B, T].
      positions: int32[B, T], position of each token in its sequence.
      segment_ids: int32[B, T]; attention never crosses segments. Without a cache only.
      cache: if given, keys and values are written to slot = position, a query at position p sees
        slots <= p, and the result is (hidden, new cache). Rows may end in padding as long as
        later steps overwrite its slots.
    """
    c = self.config
    x = lookup(self.embedding[...], tokens, c.compute_dtype)  # [B, T, D]
    rotary = rotary_angles(positions, c, c.compute_dtype)
    graphdef, layers = self._split_layers()

    def body(x, scanned):
      params, layer_cache = scanned
      return nnx.merge(graphdef, params)(x, rotary, positions, segment_ids, layer_cache)

    if cache is None:
      body = remat.checkpoint(body, c.remat_policy)
      if isinstance(layers, nnx.State) and c.scan_layers:
        x, _ = jax.lax.scan(body, x, (layers, None))
        return self.norm(x)
    caches = []
    if isinstance(layers, nnx.State):
      layers = _unstack(layers, c.num_layers)
    for i, params in enumerate(layers):
      x, layer_cache = body(x, (params, cache and cache.layers[i]))
      caches.append(layer_cache)
    x = self.norm(x)
    return x if cache is None else (x, Cache(tuple(caches)))

  def _split_layers(self) -> tuple[nnx.GraphDef, nnx.State | list[nnx.State]]:
    """A layer's structure and the parameters, stacked [L, ...] or one state per layer."""
    if isinstance(self.layers, Layer):
      return nnx.split(self.layers)
    return nnx.graphdef(self.layers[0]), [nnx.state(layer) for layer in self.layers]

  def logits(self, hidden: Array) -> Array:
    """Returns float32[..., V] of hidden states [..., D]."""
    head = self.head[...].astype(hidden.dtype)
    return jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)


def _unstack(stacked: nnx.State, count: int) -> list[nnx.State]:
  """Returns each layer's parameters. They are split: the gradient of that is one concatenation,
  where that of slices is a sum of `count` padded stacks."""
  leaves, treedef = jax.tree_util.tree_flatten(stacked)
  parts = [jax.lax.split(leaf, (1,) * count) for leaf in leaves]
  return [
    jax.tree_util.tree_unflatten(treedef, [part[i].reshape(part[i].shape[1:]) for part in parts])
    for i in range(count)
  ]


def unroll(decoder: Decoder, *, consume: bool = False) -> Decoder:
  """Returns a decoder for steps of one token, with its own copy of the layers' parameters.

  Layers are apart: a loop over stacked ones would slice, that is copy, all of them in every step.
  Projections of one input are joined (q with k and v, gate with up): fewer and longer products.

  Args:
    decoder: as it is trained.
    consume: frees each of its stacked arrays once it is copied, so that a model that fills the
      memory fits; the decoder cannot be used afterwards.
  """
  count = decoder.config.num_layers
  graphdef, stacked = nnx.split(decoder.layers)
  leaves, treedef = jax.tree_util.tree_flatten(stacked)
  apart: list[list[Array]] = [[] for _ in range(count)]
  for array in leaves:
    kernel = array.ndim == 3  # steps would cast it every time
    dtype = decoder.config.compute_dtype if kernel else array.dtype
    for i, arrays in enumerate(apart):
      arrays.append(array[i].astype(dtype))
    if consume:
      jax.block_until_ready([arrays[-1] for arrays in apart])
      array.delete()
  out = nnx.merge(*nnx.split(decoder))
  out.head.set_value(out.head[...].astype(decoder.config.compute_dtype))
  out.layers = nnx.List([])
  for i in range(count):
    layer = nnx.merge(graphdef, jax.tree_util.tree_unflatten(treedef, apart[i]))
    apart[i] = []
    a, m = layer.attention, layer.mlp
    a.q.kernel.set_value(jnp.concatenate([x.kernel[...] for x in (a.q, a.k, a.v)], axis=1))
    m.gate.kernel.set_value(jnp.concatenate([m.gate.kernel[...], m.up.kernel[...]], axis=1))
    a.k = a.v = m.up = None
    out.layers.append(layer)
  return out


def init_params(config: DecoderConfig, key: Array) -> tuple[nnx.GraphDef, nnx.State]:
  """Returns the structure and the parameters of a decoder; call it under jit to have the
  parameters born sharded."""
  return nnx.split(Decoder(config, rngs=nnx.Rngs(key)))
