"""SEANet, the released speech encoder: strided convolutions and an LSTM, exact for padded clips.

Every convolution mirrors a clip at both of its ends, so in a batch of clips of several lengths each
must be mirrored at its own end: then the valid frames of a row are those of its clip alone, however
long the padding and whatever stands in it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array


class SameConv(nnx.Module):
  """SEANet's convolution: mirrored ends, output length ceil(n / stride)."""

  def __init__(self, size: int, c_in: int, c_out: int, *, stride: int = 1, rngs: nnx.Rngs):
    self.size, self.stride = size, stride
    self.conv = nnx.Conv(c_in, c_out, (size,), strides=stride, padding="VALID", rngs=rngs)

  def __call__(self, x: Array, lengths: Array) -> tuple[Array, Array]:
    """Returns float32[B, ceil(n / stride), c_out] and its valid lengths int32[B].

    Args:
      x: float32[B, n, c_in].
      lengths: int32[B], valid positions of each row, from 1 to n.
    """
    frames = -(-lengths // self.stride)
    right = (self.size - self.stride) // 2
    left = self.size - self.stride - right
    # The last window must be full, which takes up to stride - 1 more positions on the right.
    x = mirror_ends(
      x, lengths, left, right + frames * self.stride - lengths, right + self.stride - 1
    )
    return self.conv(x), frames


def mirror_ends(x: Array, lengths: Array, left: int, right: Array, max_right: int) -> Array:
  """Returns float[B, left + n + max_right, C]: rows mirrored at their start and their own end.

  A row too short to mirror first gets zeros, up to one position more than its wider side needs.

  Args:
    x: float[B, n, C].
    lengths: int32[B], valid positions of each row.
    left: positions to add on the left.
    right: int32[B], positions to add on the right of each row's end; what stands after them is
      without meaning.
    max_right: the most that `right` can be.
  """
  if not left + max_right:
    return x
  extended = jnp.maximum(lengths, jnp.maximum(left, right) + 1)[:, None]

  def at(source):  # int32[B, k] -> float[B, k, C], zeros where there is no sample
    valid = source < lengths[:, None]
    taken = jnp.take_along_axis(x, jnp.where(valid, source, 0)[..., None], axis=1)
    return jnp.where(valid[..., None], taken, 0.0)

  head = at(jnp.broadcast_to(jnp.arange(left, 0, -1), (len(x), left)))
  after = lengths[:, None] + jnp.arange(max_right)
  tail = at(jnp.where(after < extended, after, jnp.abs(2 * (extended - 1) - after)))
  body = jnp.pad(x, ((0, 0), (0, max_right), (0, 0)))
  write = jax.vmap(lambda row, end, start: jax.lax.dynamic_update_slice(row, end, (start, 0)))
  return jnp.concatenate([head, write(body, tail, lengths)], axis=1)


class SEANetUnit(nnx.Module):
  """shortcut(x) + conv1(elu(conv3(elu(x))))."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    self.conv3 = SameConv(3, channels, channels // 2, rngs=rngs)
    self.conv1 = SameConv(1, channels // 2, channels, rngs=rngs)
    self.shortcut = SameConv(1, channels, channels, rngs=rngs)

  def __call__(self, x: Array, lengths: Array) -> Array:
    y, _ = self.conv3(jax.nn.elu(x), lengths)
    y, _ = self.conv1(jax.nn.elu(y), lengths)
    return self.shortcut(x, lengths)[0] + y


class LSTM(nnx.Module):
  """One layer with zero initial state; gates in the order input, forget, cell, output."""

  def __init__(self, dim: int, *, rngs: nnx.Rngs):
    self.input = nnx.Linear(dim, 4 * dim, rngs=rngs)
    self.recurrent = nnx.Linear(dim, 4 * dim, use_bias=False, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    kernel = self.recurrent.kernel[...]

    def step(carry, gates):
      hidden, cell = carry
      i, f, g, o = jnp.split(gates + hidden @ kernel, 4, axis=-1)
      cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
      hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
      return (hidden, cell), hidden

    zeros = jnp.zeros((len(x), x.shape[-1]), x.dtype)
    _, out = jax.lax.scan(step, (zeros, zeros), self.input(x).swapaxes(0, 1))
    return out.swapaxes(0, 1)


class SEANetEncoder(nnx.Module):
  """float32[B, n] and valid lengths int32[B] -> float32[B, ceil(n / hop), embed_dim].

  Args:
    num_filters: width of the first convolution; doubled at each stride.
    strides: first to last; their product is the hop.
    lstm_layers: layers of the LSTM.
    embed_dim: channels of the output.
  """

  def __init__(
    self,
    num_filters: int,
    strides: Sequence[int],
    lstm_layers: int,
    embed_dim: int,
    *,
    rngs: nnx.Rngs,
  ):
    width = num_filters
    self.conv_in = SameConv(7, 1, width, rngs=rngs)
    units, downs = [], []
    for stride in strides:
      units.append(SEANetUnit(width, rngs=rngs))
      downs.append(SameConv(2 * stride, width, 2 * width, stride=stride, rngs=rngs))
      width *= 2
    self.units, self.downs = nnx.List(units), nnx.List(downs)
    self.lstm = nnx.List([LSTM(width, rngs=rngs) for _ in range(lstm_layers)])
    self.conv_out = SameConv(7, width, embed_dim, rngs=rngs)

  def __call__(self, wav: Array, lengths: Array) -> Array:
    x, lengths = self.conv_in(wav[..., None], lengths)
    for unit, down in zip(self.units, self.downs, strict=True):
      x, lengths = down(jax.nn.elu(unit(x, lengths)), lengths)
    y = x
    for layer in self.lstm:  # runs forwards only: padding cannot reach back
      y = layer(y)
    return self.conv_out(jax.nn.elu(x + y), lengths)[0]
