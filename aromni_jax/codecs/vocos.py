"""Vocos, the decoder of the speech codec: ConvNeXt blocks and an inverse STFT.

A batch may hold rows of several lengths. Whatever looks past one frame (convolutions, attention,
statistics of norms, the overlap of the STFT's frames) then sees the valid frames alone, so that
each row comes out as it would by itself. Frames are float32[B, L, D]; `mask`, bool[B, L], marks
the valid ones.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from aromni_jax.codecs.spectrogram import hann, overlap_add

Array = jax.Array

_EPSILON = 1e-6
_MAX_MAGNITUDE = 100.0


def silence(x: Array, mask: Array) -> Array:
  """Returns [B, L, D] with zeros past each row's end, as a convolution of the row alone sees it."""
  return jnp.where(mask[..., None], x, 0.0)


class AdaptiveNorm(nnx.Module):
  """LayerNorm whose gain and bias are rows of a table: `norm(x) * scale[i] + shift[i]`."""

  def __init__(self, dim: int, num_conditions: int, *, rngs: nnx.Rngs):
    del rngs
    self.scale = nnx.Param(jnp.ones((num_conditions, dim)))
    self.shift = nnx.Param(jnp.zeros((num_conditions, dim)))

  def __call__(self, x: Array, condition: int | Array = 0) -> Array:
    mean = x.mean(-1, keepdims=True)
    x = x - mean
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + _EPSILON)
    return x * self.scale[...][condition] + self.shift[...][condition]


class ConvNeXt(nnx.Module):
  """Depthwise convolution of 7 frames, adaptive norm, MLP with GELU, scaled residual. [B, L, D]."""

  def __init__(self, dim: int, mlp_dim: int, num_conditions: int, depth: int, *, rngs: nnx.Rngs):
    # Kernel [7, 1, D] as nnx.Conv would have it, applied as seven shifted products: XLA's grouped
    # convolutions are many times slower on a CPU.
    init = nnx.initializers.truncated_normal(0.02)
    self.depthwise = nnx.Param(init(rngs.params(), (7, 1, dim)))
    self.depthwise_bias = nnx.Param(jnp.zeros(dim))
    self.norm = AdaptiveNorm(dim, num_conditions, rngs=rngs)
    self.up = nnx.Linear(dim, mlp_dim, rngs=rngs)
    self.down = nnx.Linear(mlp_dim, dim, rngs=rngs)
    self.gamma = nnx.Param(jnp.full(dim, 1.0 / depth))

  def __call__(self, x: Array, condition: int | Array = 0) -> Array:
    kernel = self.depthwise[...]
    reach = len(kernel) // 2
    padded = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)))
    h = sum(padded[:, i : i + x.shape[1]] * kernel[i, 0] for i in range(len(kernel)))
    h = self.norm(h + self.depthwise_bias[...], condition)
    h = self.down(jax.nn.gelu(self.up(h), approximate=False))
    return x + self.gamma[...] * h


class GroupNorm(nnx.GroupNorm):
  """Group normalisation whose statistics run over the valid frames of each row."""

  def __init__(self, dim: int, num_groups: int, *, rngs: nnx.Rngs):
    super().__init__(dim, num_groups=num_groups, epsilon=_EPSILON, rngs=rngs)

  def __call__(self, x: Array, mask: Array) -> Array:
    count = mask.sum(1)[:, None] * self.group_size

    def group_mean(y):  # [B, L, D] -> [B, 1, D]
      sums = silence(y, mask).sum(1).reshape(len(x), -1, self.group_size).sum(-1)
      return jnp.repeat(sums / count, self.group_size, axis=-1)[:, None]

    centred = x - group_mean(x)
    scale = jax.lax.rsqrt(group_mean(centred**2) + self.epsilon) * self.scale[...]
    return centred * scale + self.bias[...]


class PositionRes(nnx.Module):
  """norm, swish, conv, norm, swish, conv, plus the input; statistics run over the whole clip."""

  def __init__(self, dim: int, num_groups: int, *, rngs: nnx.Rngs):
    self.norm1, self.norm2 = (GroupNorm(dim, num_groups, rngs=rngs) for _ in range(2))
    self.conv1 = nnx.Conv(dim, dim, (3,), rngs=rngs)
    self.conv2 = nnx.Conv(dim, dim, (3,), rngs=rngs)

  def __call__(self, x: Array, mask: Array) -> Array:
    h = self.conv1(silence(jax.nn.silu(self.norm1(x, mask)), mask))
    return x + self.conv2(silence(jax.nn.silu(self.norm2(h, mask)), mask))


class PositionAttention(nnx.Module):
  """Single-head attention over all frames of the clip, with residual."""

  def __init__(self, dim: int, num_groups: int, *, rngs: nnx.Rngs):
    self.norm = GroupNorm(dim, num_groups, rngs=rngs)
    self.q, self.k, self.v = (nnx.Linear(dim, dim, rngs=rngs) for _ in range(3))
    self.proj_out = nnx.Linear(dim, dim, rngs=rngs)

  def __call__(self, x: Array, mask: Array) -> Array:
    h = self.norm(x, mask)
    scores = jnp.einsum("btd,bsd->bts", self.q(h), self.k(h)) * x.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    return x + self.proj_out(weights @ self.v(h))


class PositionNet(nnx.Module):
  """Two residual blocks, attention, two residual blocks, norm: the part that sees whole clips."""

  def __init__(self, dim: int, num_groups: int, *, rngs: nnx.Rngs):
    make = PositionRes, PositionRes, PositionAttention, PositionRes, PositionRes
    self.blocks = nnx.List([block(dim, num_groups, rngs=rngs) for block in make])
    self.norm = GroupNorm(dim, num_groups, rngs=rngs)

  def __call__(self, x: Array, mask: Array) -> Array:
    for block in self.blocks:
      x = block(x, mask)
    return self.norm(x, mask)


class Decoder(nnx.Module):
  """float32[B, L, embed_dim] and mask bool[B, L] -> float32[B, L * hop].

  Args:
    embed_dim: dimensions of a code.
    dim, mlp_dim, num_layers: width, inner width and number of the ConvNeXt blocks.
    num_conditions: rows of the adaptive norms.
    position_groups: groups of the position net's norms, or None for no position net.
    hop: samples per code.
    n_fft: samples of the inverse STFT's window.
  """

  def __init__(
    self,
    *,
    embed_dim: int,
    dim: int,
    mlp_dim: int,
    num_layers: int,
    num_conditions: int,
    position_groups: int | None,
    hop: int,
    n_fft: int,
    rngs: nnx.Rngs,
  ):
    self.hop, self.n_fft = hop, n_fft
    self.embed = nnx.Conv(embed_dim, dim, (7,), rngs=rngs)
    groups = position_groups
    self.position_net = None if groups is None else PositionNet(dim, groups, rngs=rngs)
    self.norm = AdaptiveNorm(dim, num_conditions, rngs=rngs)
    self.blocks = nnx.List(
      [ConvNeXt(dim, mlp_dim, num_conditions, num_layers, rngs=rngs) for _ in range(num_layers)]
    )
    self.final_norm = nnx.LayerNorm(dim, epsilon=_EPSILON, use_fast_variance=False, rngs=rngs)
    self.head = nnx.Linear(dim, n_fft + 2, rngs=rngs)

  def hidden(self, features: Array, mask: Array, condition: int | Array = 0) -> Array:
    """Returns the frames before the head, float32[B, L, dim]."""
    x = self.embed(silence(features, mask))
    if self.position_net is not None:
      x = self.position_net(x, mask)
    x = self.norm(x, condition)
    for block in self.blocks:
      x = block(silence(x, mask), condition)
    return self.final_norm(x)

  def __call__(self, features: Array, mask: Array, condition: int | Array = 0) -> Array:
    x = self.head(self.hidden(features, mask, condition))
    magnitude, phase = jnp.split(x, 2, axis=-1)
    magnitude = jnp.minimum(jnp.exp(magnitude), _MAX_MAGNITUDE)
    spectrum = jax.lax.complex(magnitude * jnp.cos(phase), magnitude * jnp.sin(phase))
    window = hann(self.n_fft)
    wav = overlap_add(silence(jnp.fft.irfft(spectrum, self.n_fft) * window, mask), self.hop)
    envelope = overlap_add(mask[..., None] * window**2, self.hop)
    trim = (self.n_fft - self.hop) // 2
    wav = (wav / jnp.where(envelope > 1e-11, envelope, 1.0))[:, trim : wav.shape[1] - trim]
    return jnp.where(jnp.repeat(mask, self.hop, axis=1), wav, 0.0)
