"""Image codec: the VQGAN of Chameleon, pictures <-> a grid of discrete codes.

`ImageVQConfig()` is the released tokenizer (512x512 pixels -> 32x32 codes of 8192); the preset
"small" (64x64 -> 8x8 codes of 1024) is what the demo trains. One module serves both.
Pixels are float32 `[B, H, W, 3]` in [-1, 1]; codes are int32 `[B, h*w]` in raster order.
"""

import dataclasses
import io
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image, ImageOps, UnidentifiedImageError

from aromni_jax.codecs import params as codec_params
from aromni_jax.codecs import vq

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


PRESETS = {
  "chameleon": ImageVQConfig(),
  "small": ImageVQConfig(
    resolution=64,
    ch=16,
    ch_mult=(1, 2, 4, 8),
    num_res_blocks=1,
    z_channels=64,
    embed_dim=32,
    n_embed=1024,
    num_groups=8,
  ),
}


def _conv(size: int, c_in: int, c_out: int, rngs: nnx.Rngs, **options) -> nnx.Conv:
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
    self.conv1 = _conv(3, c_in, c_out, rngs)
    self.norm2 = _norm(c_out, config, rngs)
    self.conv2 = _conv(3, c_out, c_out, rngs)
    self.nin_shortcut = _conv(1, c_in, c_out, rngs) if c_in != c_out else None

  def __call__(self, x: Array) -> Array:
    h = self.conv1(jax.nn.silu(self.norm1(x)))
    h = self.conv2(jax.nn.silu(self.norm2(h)))
    return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nnx.Module):
  """Single-head self-attention over all positions, with residual."""

  def __init__(self, channels: int, config: ImageVQConfig, *, rngs: nnx.Rngs):
    self.norm = _norm(channels, config, rngs)
    self.q = _conv(1, channels, channels, rngs)
    self.k = _conv(1, channels, channels, rngs)
    self.v = _conv(1, channels, channels, rngs)
    self.proj_out = _conv(1, channels, channels, rngs)

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
    self.conv = _conv(3, channels, channels, rngs, strides=2, padding=((0, 1), (0, 1)))

  def __call__(self, x: Array) -> Array:
    return self.conv(x)


class Upsample(nnx.Module):
  """Doubles the side: nearest neighbour, then a 3x3 convolution."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    self.conv = _conv(3, channels, channels, rngs)

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
    self.conv_in = _conv(3, config.in_channels, config.ch, rngs)
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
    self.conv_out = _conv(3, widths[-1], config.z_channels, rngs)

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
    self.conv_in = _conv(3, config.z_channels, widths[-1], rngs)
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
    self.conv_out = _conv(3, widths[0], config.in_channels, rngs)

  def __call__(self, z: Array) -> Array:
    x = self.mid(self.conv_in(z))
    for level in reversed(self.up):
      x = level(x)
    return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Quantiser(nnx.Module):
  """The codebook, float32[n_embed, embed_dim]."""

  def __init__(self, config: ImageVQConfig, *, rngs: nnx.Rngs):
    shape = (config.n_embed, config.embed_dim)
    self.embedding = nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32))

  def __call__(self, z: Array) -> Array:
    """Returns the int32[...] codes nearest to z float[..., embed_dim]."""
    return vq.nearest_codes(z, self.embedding[...])

  def lookup(self, codes: Array) -> Array:
    """Returns the float32[..., embed_dim] vectors of int32[...] codes."""
    return self.embedding[...][codes]


class ImageVQ(nnx.Module):
  """VQGAN image codec; every convolution runs at the highest matmul precision."""

  def __init__(self, config: ImageVQConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.encoder = Encoder(config, rngs=rngs)
    self.decoder = Decoder(config, rngs=rngs)
    self.quantize = Quantiser(config, rngs=rngs)
    self.quant_conv = _conv(1, config.z_channels, config.embed_dim, rngs)
    self.post_quant_conv = _conv(1, config.embed_dim, config.z_channels, rngs)

  def encode(self, pixels: Array) -> Array:
    """Returns the codes int32[B, h*w] of pixels float32[B, H, W, 3] in [-1, 1].

    Raises:
      ValueError: if the pictures do not have the resolution and channels of the config.
    """
    expected = (self.config.resolution, self.config.resolution, self.config.in_channels)
    if pixels.ndim != 4 or pixels.shape[1:] != expected:
      raise ValueError(
        f"ImageVQ.encode got pixels of shape {pixels.shape}; expected [B, {expected[0]}, "
        f"{expected[1]}, {expected[2]}]. `preprocess(picture, resolution)` makes them so."
      )
    codes = self.quantize(self.latents(pixels))
    return codes.reshape(len(pixels), -1)

  def decode(self, codes: Array) -> Array:
    """Returns pixels float32[B, H, W, 3], about in [-1, 1], of codes int32[B, h*w].

    Raises:
      ValueError: if there are not `config.image_length` codes per picture.
    """
    if codes.ndim != 2 or codes.shape[1] != self.config.image_length:
      raise ValueError(
        f"ImageVQ.decode got codes of shape {codes.shape}; expected "
        f"[B, {self.config.image_length}], the square grid of one picture in raster order."
      )
    grid = codes.reshape(-1, self.config.grid, self.config.grid)
    return self.render(self.quantize.lookup(grid))

  def latents(self, pixels: Array) -> Array:
    """Returns the vectors before quantisation, float32[B, h, w, embed_dim]."""
    with jax.default_matmul_precision("highest"):
      return self.quant_conv(self.encoder(pixels))

  def render(self, z: Array) -> Array:
    """Returns the pixels of quantised vectors float32[B, h, w, embed_dim]."""
    with jax.default_matmul_precision("highest"):
      return self.decoder(self.post_quant_conv(z))


def to_uint8(pixels: Array | np.ndarray) -> np.ndarray:
  """Returns uint8 pictures of float pixels: clamp to [-1, 1], scale to 0..255, truncate."""
  pixels = np.clip(np.asarray(pixels, np.float32), -1.0, 1.0)
  return ((pixels + np.float32(1.0)) / np.float32(2.0) * np.float32(255.0)).astype(np.uint8)


def psnr(output: np.ndarray, target: np.ndarray) -> float:
  """Returns the mean over pictures uint8[n, H, W, 3] of the peak signal-to-noise ratio, in dB."""
  error = np.mean((output.astype(np.float64) - target) ** 2, axis=(1, 2, 3))
  return float(np.mean(10 * np.log10(255.0**2 / np.maximum(error, 1e-3))))


def preprocess(picture: Image.Image | str | os.PathLike | bytes, resolution: int) -> np.ndarray:
  """Returns a picture as the codec reads it, float32[resolution, resolution, 3] in [-1, 1].

  The native preprocessing of Chameleon: transparency blended on white, short side scaled to
  `resolution` (Lanczos), centre crop. EXIF orientation is applied first.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not a picture, damaged, or too large for Pillow's decompression limit.
  """
  rgb = whiten(_open(picture))
  short = min(rgb.size)
  size = tuple(round(resolution / short * side) for side in rgb.size)
  rgb = rgb.resize(size, resample=Image.Resampling.LANCZOS)
  left, top = ((side - resolution) // 2 for side in size)
  rgb = rgb.crop((left, top, left + resolution, top + resolution))
  return (np.asarray(rgb) / 255.0 * 2.0 - 1.0).astype(np.float32)


def whiten(picture: Image.Image) -> Image.Image:
  """Returns an RGB picture with any transparency blended on white (truncated to uint8)."""
  if picture.mode == "RGB":
    return picture
  if picture.mode.startswith("I"):
    # 16-bit and 32-bit greys: the conversion of Pillow clips them at 255 instead of scaling.
    grey = np.asarray(picture).astype(np.float64) / 257.0
    return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")
  rgba = np.asarray(picture.convert("RGBA"))
  if rgba[..., 3].min() == 255:
    return picture.convert("RGB")
  alpha = rgba[..., 3:] / 255.0
  return Image.fromarray(((1.0 - alpha) * 255.0 + alpha * rgba[..., :3]).astype(np.uint8))


def _open(picture: Image.Image | str | os.PathLike | bytes) -> Image.Image:
  """Returns a loaded, upright picture; all failures name the file and say what is wrong."""
  if isinstance(picture, Image.Image):
    return ImageOps.exif_transpose(picture)
  if isinstance(picture, bytes):
    name, source = f"{len(picture)} bytes", io.BytesIO(picture)
    empty = not picture
  else:
    name, source = os.fspath(picture), picture
    if not os.path.exists(name):
      raise FileNotFoundError(f"No picture at {name!r}; check the path.")
    if os.path.isdir(name):
      raise ValueError(f"{name!r} is a directory; expected one picture file.")
    empty = os.path.getsize(name) == 0
  if empty:
    raise ValueError(f"The picture ({name}) is empty; expected a PNG, JPEG, WebP or similar file.")
  try:
    with Image.open(source) as image:
      image.load()
      return ImageOps.exif_transpose(image)
  except UnidentifiedImageError as error:
    raise ValueError(
      f"The picture ({name}) is in no format that Pillow reads; expected PNG, JPEG, WebP or "
      "similar. Convert it first."
    ) from error
  except Image.DecompressionBombError as error:
    raise ValueError(
      f"The picture ({name}) is too large: {error} Scale it down to at most "
      f"{Image.MAX_IMAGE_PIXELS} pixels."
    ) from error
  except (OSError, SyntaxError) as error:
    raise ValueError(
      f"The picture ({name}) is damaged or cut short ({error}); save it again."
    ) from error


def to_params(codec: ImageVQ) -> dict:
  """Returns the parameters as nested dicts of arrays, all keys strings (list positions too)."""
  return codec_params.to_params(codec)


def from_params(config: ImageVQConfig, params: dict) -> ImageVQ:
  """Returns the codec with the given parameters (nested dicts as `to_params` makes them).

  Raises:
    ValueError: if names or shapes are not those of the config, naming the differences.
  """
  return codec_params.from_params(lambda rngs: ImageVQ(config, rngs=rngs), params, "image codec")
