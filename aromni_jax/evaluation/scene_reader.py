"""Reads a PictoTalk picture back: how many of which object on which colour.

A template reader on the known glyphs, and a referee, not a part of the model: the same reader
scores original, reconstructed and generated pictures. Needs the `demo` extra, which holds the
glyphs.
"""

import functools
from collections.abc import Sequence

import numpy as np

from aromni_jax import pictotalk
from aromni_jax.pictotalk import Caption

_JITTER = 2
_SHIFTS = tuple(
  (dy, dx) for dy in range(-_JITTER, _JITTER + 1) for dx in range(-_JITTER, _JITTER + 1)
)
# Layouts of PictoTalk: glyph size and the top left corners that glyphs jitter around.
_ONE = (48, ((8, 8),))
_MANY = (32, ((0, 0), (0, 32), (32, 0), (32, 32)))
_BORDER = 2  # pixels of the frame that shows the background


def read_scene(picture: np.ndarray, objects: Sequence[str] = pictotalk.OBJECTS) -> Caption:
  """Returns what a picture most likely shows; it always names one of `objects`.

  The background is the palette colour that most border pixels are nearest to. A glyph's gain at a
  place is the squared error that drawing it there saves over leaving the place empty, at its best
  shift of up to 2 px. The object and layout (one large glyph, or small ones in the four cells) of
  the largest total gain win; a cell counts as filled if drawing some glyph there gains anything.

  Args:
    picture: uint8[64, 64, 3].
    objects: names that are looked for.

  Raises:
    ValueError: if the picture has another shape or dtype, or an object does not exist.
    ImportError: if the `demo` extra is not installed.
  """
  picture = np.asarray(picture)
  shape = (pictotalk.RESOLUTION, pictotalk.RESOLUTION, 3)
  if picture.shape != shape or picture.dtype != np.uint8:
    raise ValueError(
      f"read_scene got a picture of {picture.dtype}{list(picture.shape)}; "
      f"expected uint8{list(shape)}"
    )
  picture = picture.astype(np.float32)
  colour, background = _background(picture)
  signal = np.pad(picture - background, ((_JITTER,) * 2, (_JITTER,) * 2, (0, 0)))
  one = _gains(signal, _ONE, tuple(objects), colour)[0]  # [objects]
  many = _gains(signal, _MANY, tuple(objects), colour)  # [4, objects]
  totals = np.maximum(many, 0).sum(0)
  if one.max() >= totals.max():
    return Caption(1, objects[int(one.argmax())], colour)
  filled = int((many.max(1) > 0).sum())
  return Caption(max(filled, 2), objects[int(totals.argmax())], colour)


def _background(picture: np.ndarray) -> tuple[str, np.ndarray]:
  """Name of the background colour, and the median of the border pixels that show it [3]."""
  inside = slice(_BORDER, -_BORDER)
  frame = np.ones(picture.shape[:2], bool)
  frame[inside, inside] = False
  border = picture[frame]
  palette = np.array(list(pictotalk.COLOURS.values()), np.float32)
  votes = np.sum((border[:, None] - palette) ** 2, axis=-1).argmin(axis=1)
  winner = int(np.bincount(votes, minlength=len(palette)).argmax())
  return list(pictotalk.COLOURS)[winner], np.median(border[votes == winner], axis=0)


def _gains(signal: np.ndarray, layout, objects: tuple[str, ...], colour: str) -> np.ndarray:
  """Best gain over all shifts, float32 [places, objects].

  Args:
    signal: picture minus background, float32 [68, 68, 3], with a margin of 2 px.
  """
  size, places = layout
  templates, norms = _templates(objects, size, colour)
  crops = np.stack(
    [
      signal[y + dy + _JITTER :, x + dx + _JITTER :][:size, :size].ravel()
      for y, x in places
      for dy, dx in _SHIFTS
    ]
  )
  gains = 2 * crops @ templates.T - norms
  return gains.reshape(len(places), len(_SHIFTS), len(objects)).max(1)


@functools.lru_cache(maxsize=64)
def _templates(
  objects: tuple[str, ...], size: int, colour: str
) -> tuple[np.ndarray, np.ndarray]:
  """What each glyph adds to the background, [objects, size * size * 3], and its energy."""
  background = np.array(pictotalk.COLOURS[colour], np.float32)
  art = np.stack([pictotalk.glyph(name, size) for name in objects]).astype(np.float32)
  added = (art[..., 3:] / 255 * (art[..., :3] - background)).reshape(len(objects), -1)
  return added, np.sum(added**2, axis=1)
