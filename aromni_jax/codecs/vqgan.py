"""The networks of the image codec: encoder and pixel decoder of Chameleon's VQGAN.

Arrays are channels-last: pixels float32[B, H, W, 3], latents float32[B, h, w, z_channels].
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array

_NORM_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class ImageVQConfig:
  """Shape of the codec. The defaults are the released Chameleon tokenizer.

  Attributes:
    resolution: side of the square picture in pixels.
    in_channels: colour channels.
    ch: width of the first level.
    ch_mult: width of each level as a multiple of `ch`; each level but the last halves the side.
    num_res_blocks: residual blocks of an encoder level (the decoder has one more).
    z_channels: channels that the encoder hands to the quantiser convolutions.
    embed_dim: dimensions of a code.
    n_embed: number of codes.
    num_groups: groups of every group normalisation.
    has_decoder: whether the codec can draw. Hugging Face checkpoints of Chameleon can only encode.
  """

  resolution: int = 512
  in_channels: int = 3
  ch: int = 128
  ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
  num_res_blocks: int = 2
  z_channels: int = 256
  embed_dim: int = 256
  n_embed: int = 8192
  num_groups: int = 32
  has_decoder: bool = True

  def __post_init__(self):
    object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
    if not self.ch_mult:
      raise ValueError("ImageVQConfig.ch_mult is empty; expected one multiple per level.")
    if self.resolution % self.downsampling:
      raise ValueError(
        f"ImageVQConfig.resolution {self.resolution} is not a multiple of {self.downsampling}, "
        f"the downsampling of {len(self.ch_mult)} levels."
      )
    for width in (self.ch, *self.widths):
      if width % self.num_groups:
        raise ValueError(
          f"ImageVQConfig: width {width} (ch={self.ch}, ch_mult={self.ch_mult}) is not a multiple "
          f"of num_groups={self.num_groups}."
        )

  @property
  def widths(self) -> tuple[int, ...]:
    """Channels of each level."""
    return tuple(self.ch * m for m in self.ch_mult)

  @property
  def downsampling(self) -> int:
    """Pixels per code along one side."""
    return 2 ** (len(self.ch_mult) - 1)

  @property
  def grid(self) -> int:
    """Codes along one side."""
    return self.resolution // self.downsampling

  @property
  def image_length(self) -> int:
    """Codes per picture."""
    return self.grid**2


def conv(size: int, c_in: int, c_out: int, rngs: nnx.Rngs, **options) -> nnx.Conv:
  return nnx.Conv(c_in, c_out, (size, size), rngs=rngs, **options)


class GroupNorm(nnx.GroupNorm):
  """The same function of [B, H, W, C]; means go over positions first, which a CPU does faster."""

  def __call__(self, x: Array) -> Array:
    batch = len(x)

    def group_mean(y):
      means = jnp.mean(y, axis=(1, 2)).reshape(batch, -1, self.group_size).mean(-1)
      return jnp.repeat(means, self.group_size, axis=-1)[:, None, None]

    centred = x - group_mean(x)
    scale = jax.lax.rsqrt(group_mean(centred**2) + self.epsilon) * self.scale[...]
    return centred * scale + self.bias[...]


def _norm(channels: int, config: ImageVQConfig, rngs: nnx.Rngs) -> GroupNorm:
  return GroupNorm(
    channels,
    num_groups=config.num_groups,
    epsilon=_NORM_EPSILON,
    rngs=rngs,
  )


class ResBlock(nnx.Module):
  """norm, swish, conv, norm, swish, conv, plus the input (through 1x1 if the width changes)."""

  def __init__(self, c_in: int, c_out: int, config: ImageVQConfig, *, rngs: nnx.Rngs):
    self.norm1 = _norm(c_in, config, rngs)
    self.conv1 = conv(3, c_in, c_out, rngs)
    self.norm2 = _norm(c_out, config, rngs)
    self.conv2 = conv(3, c_out, c_out, rngs)
    self.nin_shortcut = conv(1, c_in, c_out, rngs) if c_in != c_out else None

  def __call__(self, x: Array) -> Array:
    h = self.conv1(jax.nn.silu(self.norm1(x)))
    h = self.conv2(jax.nn.silu(self.norm2(h)))
    return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nnx.Module):
  """Single-head self-attention over all positions, with residual."""

  def __init__(self, channels: int, config: ImageVQConfig, *, rngs: nnx.Rngs):
    self.norm = _norm(channels, config, rngs)
    self.q = conv(1, channels, channels, rngs)
    self.k = conv(1, channels, channels, rngs)
    self.v = conv(1, channels, channels, rngs)
    self.proj_out = conv(1, channels, channels, rngs)

  def __call__(self, x: Array) -> Array:
    batch, height, width, channels = x.shape
    h = self.norm(x)
    q, k, v = (f(h).reshape(batch, height * width, channels) for f in (self.q, self.k, self.v))
    weights = jax.nn.softmax(jnp.einsum("btc,bsc->bts", q, k) * channels**-0.5, axis=-1)
    h = jnp.einsum("bts,bsc->btc", weights, v).reshape(x.shape)
    return x + self.proj_out(h)


class Middle(nnx.Module):
  """Residual block, attention, residual block at the lowest resolution."""

  def __init__(self, channels: int, config: ImageVQConfig, *, rngs: nnx.Rngs):
    self.block_1 = ResBlock(channels, channels, config, rngs=rngs)
    self.attn_1 = AttnBlock(channels, config, rngs=rngs)
    self.block_2 = ResBlock(channels, channels, config, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nnx.Module):
  """Halves the side: zeros on the right and the bottom only, then a 3x3 convolution of stride 2."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    self.conv = conv(3, channels, channels, rngs, strides=2, padding=((0, 1), (0, 1)))

  def __call__(self, x: Array) -> Array:
    return self.conv(x)


class Upsample(nnx.Module):
  """Doubles the side: nearest neighbour, then a 3x3 convolution."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    self.conv = conv(3, channels, channels, rngs)

  def __call__(self, x: Array) -> Array:
    return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


class Level(nnx.Module):
  """The residual blocks of one resolution and, unless it is the last, the step to the next."""

  def __init__(
    self,
    c_in: int,
    c_out: int,
    num_blocks: int,
    config: ImageVQConfig,
    *,
    resample: type[Downsample] | type[Upsample] | None,
    rngs: nnx.Rngs,
  ):
    self.block = nnx.List(
      [ResBlock(c_in if i == 0 else c_out, c_out, config, rngs=rngs) for i in range(num_blocks)]
    )
    self.downsample = resample(c_out, rngs=rngs) if resample is Downsample else None
    self.upsample = resample(c_out, rngs=rngs) if resample is Upsample else None

  def __call__(self, x: Array) -> Array:
    for block in self.block:
      x = block(x)
    if self.downsample is not None:
      x = self.downsample(x)
    if self.upsample is not None:
      x = self.upsample(x)
    return x


class Encoder(nnx.Module):
  """float32[B, H, W, 3] -> float32[B, h, w, z_channels]."""

  def __init__(self, config: ImageVQConfig, *, rngs: nnx.Rngs):
    widths = config.widths
    last = len(widths) - 1
    self.conv_in = conv(3, config.in_channels, config.ch, rngs)
    self.down = nnx.List(
      [
        Level(
          widths[i - 1] if i else config.ch,
          widths[i],
          config.num_res_blocks,
          config,
          resample=Downsample if i < last else None,
          rngs=rngs,
        )
        for i in range(len(widths))
      ]
    )
    self.mid = Middle(widths[-1], config, rngs=rngs)
    self.norm_out = _norm(widths[-1], config, rngs)
    self.conv_out = conv(3, widths[-1], config.z_channels, rngs)

  def __call__(self, x: Array) -> Array:
    x = self.conv_in(x)
    for level in self.down:
      x = level(x)
    return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
  """float32[B, h, w, z_channels] -> float32[B, H, W, 3] (not clipped).

  `up` is indexed by resolution level, as in the encoder, and run from the last to the first.
  """

  def __init__(self, config: ImageVQConfig, *, rngs: nnx.Rngs):
    widths = config.widths
    last = len(widths) - 1
    self.conv_in = conv(3, config.z_channels, widths[-1], rngs)
    self.mid = Middle(widths[-1], config, rngs=rngs)
    self.up = nnx.List(
      [
        Level(
          widths[min(i + 1, last)],
          widths[i],
          config.num_res_blocks + 1,
          config,
          resample=Upsample if i else None,
          rngs=rngs,
        )
        for i in range(len(widths))
      ]
    )
    self.norm_out = _norm(widths[0], config, rngs)
    self.conv_out = conv(3, widths[0], config.in_channels, rngs)

  def __call__(self, z: Array) -> Array:
    x = self.mid(self.conv_in(z))
    for level in reversed(self.up):
      x = level(x)
    return self.conv_out(jax.nn.silu(self.norm_out(x)))
