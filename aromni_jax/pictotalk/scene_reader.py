"""Reads a PictoTalk picture back: how many of which object on which colour.

A matched filter on the known glyphs. The background is the palette colour nearest to the border.
The picture and the glyphs drawn on that colour are blurred by the same `BLUR`, so that the reader
judges shape and colour, not sharpness, and every glyph is projected on every place it can stand at.
The layout (one large glyph, or small ones in a 2x2 grid) and glyph that explain most win. Clean
scenes are read without error. Needs the `demo` extra, which holds the glyphs.
"""

import functools
from collections.abc import Sequence

import numpy as np
from scipy.ndimage import gaussian_filter

from aromni_jax.pictotalk import world
from aromni_jax.pictotalk.world import Caption

BLUR = 2.0  # standard deviation in pixels
_FILLED = 0.45  # a cell counts if its projection is at least this share of the strongest one's
_SHIFTS = range(-2, 3)
_CENTRE, _CELLS = ((8, 8),), ((0, 0), (0, 32), (32, 0), (32, 32))
_LARGE, _SMALL = 48, 32
_MARGIN = 2  # glyphs are compared with a little of their surroundings


def read_scene(picture: np.ndarray, objects: Sequence[str] = world.OBJECTS) -> Caption:
  """Returns what a picture shows.

  Args:
    picture: uint8[64, 64, 3].
    objects: names that are looked for.

  Raises:
    ValueError: if the picture has another shape.
  """
  shape = (world.RESOLUTION, world.RESOLUTION, 3)
  if picture.shape != shape:
    raise ValueError(f"read_scene got a picture of shape {picture.shape}; expected {shape}")
  picture = picture.astype(np.float32)
  colour = _background(picture)
  signal = _blur(picture - np.array(world.COLOURS[colour], np.float32))
  signal = np.pad(signal, ((_MARGIN, _MARGIN), (_MARGIN, _MARGIN), (0, 0)))
  objects = tuple(objects)
  large = _project(signal, _CENTRE, objects, _LARGE, colour)  # [1, objects]
  small = _project(signal, _CELLS, objects, _SMALL, colour)  # [4, objects]
  one, many = large[0] ** 2, np.sum(small**2, axis=0)
  if one.max() >= many.max():
    return Caption(1, objects[int(one.argmax())], colour)
  best = int(many.argmax())
  filled = small[:, best] > _FILLED * small[:, best].max()
  return Caption(int(filled.sum()), objects[best], colour)


def _background(picture: np.ndarray) -> str:
  """The palette colour that most pixels of the border are nearest to."""
  names, palette = list(world.COLOURS), np.array(list(world.COLOURS.values()), np.float32)
  sides = (picture[:2], picture[-2:], picture[:, :2], picture[:, -2:])
  border = np.concatenate([side.reshape(-1, 3) for side in sides])
  votes = np.sum((border[:, None] - palette) ** 2, axis=-1).argmin(axis=1)
  return names[int(np.bincount(votes, minlength=len(names)).argmax())]


def _blur(picture: np.ndarray) -> np.ndarray:
  return gaussian_filter(picture, (BLUR, BLUR, 0))


def _project(signal, places, objects, size: int, colour: str) -> np.ndarray:
  """Largest projection [places, objects] on a glyph of norm 1 over shifts, at least 0."""
  side = size + 2 * _MARGIN
  cells = np.stack([signal[y : y + side, x : x + side].ravel() for y, x in places])
  projections = cells @ _templates(objects, size, colour).T
  return np.maximum(projections.reshape(len(places), len(objects), -1).max(-1), 0.0)


@functools.lru_cache(maxsize=64)
def _templates(objects: tuple[str, ...], size: int, colour: str) -> np.ndarray:
  """Blurred glyphs on a background, of norm 1: float32[objects * shifts, values]."""
  background = np.array(world.COLOURS[colour], np.float32)
  border, side, out = 6, size + 2 * _MARGIN, []
  for name in objects:
    art = world.glyph(name, size).astype(np.float32)
    drawn = np.zeros((size + 2 * border, size + 2 * border, 3), np.float32)
    drawn[border:-border, border:-border] = art[..., 3:] / 255 * (art[..., :3] - background)
    drawn = _blur(drawn)
    for dy in _SHIFTS:
      for dx in _SHIFTS:
        y, x = border - _MARGIN - dy, border - _MARGIN - dx
        out.append(drawn[y : y + side, x : x + side].ravel())
  out = np.stack(out)
  return out / np.linalg.norm(out, axis=1, keepdims=True)


def scene_scores(references: Sequence[Caption], found: Sequence[Caption]) -> dict[str, float]:
  """Returns the shares of scenes whose count, object, colour, and all three are right.

  Args:
    references: what the pictures should show.
    found: what `read_scene` reads.

  Raises:
    ValueError: if there are no pairs.
  """
  pairs = list(zip(references, found, strict=True))
  if not pairs:
    raise ValueError("scene scores need at least one picture")
  fields = ("count", "object", "colour")
  scores = {f: float(np.mean([getattr(a, f) == getattr(b, f) for a, b in pairs])) for f in fields}
  return scores | {"all": float(np.mean([a == b for a, b in pairs]))}
