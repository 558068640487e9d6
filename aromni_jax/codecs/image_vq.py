"""Image codec: the VQGAN of Chameleon, pictures <-> a grid of discrete codes.

`ImageVQConfig()` is the released tokenizer (512x512 pixels -> 32x32 codes of 8192); the preset
"small" (64x64 -> 8x8 codes of 1024) is what the demo trains. One module serves both.
Pixels are float32 `[B, H, W, 3]` in [-1, 1]; codes are int32 `[B, h*w]` in raster order.
"""

import io
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image, ImageOps, UnidentifiedImageError

from aromni_jax.codecs import vq
from aromni_jax.codecs.vqgan import Decoder, Encoder, ImageVQConfig, conv
from aromni_jax.models import params as codec_params

Array = jax.Array

_MAX_ASPECT = 100

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
  """VQGAN image codec; every convolution runs at the highest matmul precision.

  Without a pixel decoder (`config.has_decoder`) it keeps `post_quant_conv`, as the Hugging Face
  checkpoints do, and only encodes.
  """

  def __init__(self, config: ImageVQConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.encoder = Encoder(config, rngs=rngs)
    self.decoder = Decoder(config, rngs=rngs) if config.has_decoder else None
    self.quantize = Quantiser(config, rngs=rngs)
    self.quant_conv = conv(1, config.z_channels, config.embed_dim, rngs)
    self.post_quant_conv = conv(1, config.embed_dim, config.z_channels, rngs)

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
      ValueError: if there are not `config.image_length` codes per picture, or no pixel decoder.
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
    """Returns the pixels of quantised vectors float32[B, h, w, embed_dim].

    Raises:
      ValueError: if the codec has no pixel decoder.
    """
    if self.decoder is None:
      raise ValueError(
        "this model has no pixel decoder; convert with the original vqgan.ckpt to draw"
      )
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
  `resolution` (Lanczos), centre crop. EXIF orientation is applied first; of an animation the first
  picture is read.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not a picture, damaged, over 100 times as long as wide (all of it is scaled before
      the crop), of floats, or too large for Pillow's decompression limit.
  """
  rgb = whiten(read_picture(picture))
  short, long = sorted(rgb.size)
  if long > _MAX_ASPECT * short:
    raise ValueError(
      f"The picture ({_name(picture)}) is {rgb.width}x{rgb.height} pixels, {long // short} times "
      f"as long as wide; expected at most {_MAX_ASPECT}. Crop it first: only the middle is encoded."
    )
  size = tuple(round(resolution / short * side) for side in rgb.size)
  rgb = rgb.resize(size, resample=Image.Resampling.LANCZOS)
  left, top = ((side - resolution) // 2 for side in size)
  rgb = rgb.crop((left, top, left + resolution, top + resolution))
  return (np.asarray(rgb) / 255.0 * 2.0 - 1.0).astype(np.float32)


def whiten(picture: Image.Image) -> Image.Image:
  """Returns an RGB picture with any transparency blended on white (truncated to uint8).

  Raises:
    ValueError: for pixels of floats, whose range is unknown, and other modes without a conversion.
  """
  if picture.mode == "RGB":
    return picture
  if picture.mode.startswith("I"):
    # 16-bit and 32-bit greys: the conversion of Pillow clips them at 255 instead of scaling.
    grey = np.asarray(picture).astype(np.float64) / 257.0
    return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")
  if picture.mode in ("F", "La"):
    raise ValueError(
      f"A picture has Pillow's mode {picture.mode}; expected integer pixels, grey, palette, RGB or "
      "CMYK, with or without transparency. Convert it first."
    )
  rgba = np.asarray(picture.convert("RGBA"))
  if rgba[..., 3].min() == 255:
    return picture.convert("RGB")
  alpha = rgba[..., 3:] / 255.0
  return Image.fromarray(((1.0 - alpha) * 255.0 + alpha * rgba[..., :3]).astype(np.uint8))


def _name(picture: Image.Image | str | os.PathLike | bytes) -> str:
  """What error messages call the picture."""
  if isinstance(picture, bytes):
    return f"{len(picture)} bytes"
  return "in memory" if isinstance(picture, Image.Image) else os.fspath(picture)


def read_picture(picture: Image.Image | str | os.PathLike | bytes) -> Image.Image:
  """Returns a loaded, upright picture.

  Raises:
    FileNotFoundError, ValueError: as in `preprocess`; they name the file and say what is wrong.
  """
  if isinstance(picture, Image.Image):
    return ImageOps.exif_transpose(picture)
  name = _name(picture)
  if isinstance(picture, bytes):
    source, empty = io.BytesIO(picture), not picture
  else:
    source = picture
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
