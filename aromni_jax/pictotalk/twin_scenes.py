"""Pictures to train the image codec on: PictoTalk scenes in pairs that differ in colour alone.

A decoder that has seen a dog on seven colours can draw it on the eighth only if the codes of a dog
do not depend on the colour behind it. So every scene comes with a twin, the same glyphs at the same
places on another colour, with the cells of the code grid that the glyphs cover, and with the
object: there the codec is trained to see the same, and what it is.

Half of the colours are the palette's, half are any, so that no pair is learned by heart. An object
never stands on a colour that is nearest to one which its captions do not have: pairs that are held
out stay unseen.
"""

from collections.abc import Sequence

import numpy as np

from aromni_jax.pictotalk import world
from aromni_jax.pictotalk.world import Caption

_NEAR = 60.0  # twins' colours are further apart, as vectors of red, green and blue
_COVERED = 0.02  # share of a cell's area from which on it counts as covered


class TwinScenes:
  """Draws the pictures of every training step.

  Args:
    captions: PictoTalk captions to draw; they say which colours an object may have.
    batch_size: pictures per step, an even number.
    grid: cells along a side of a picture.
    seed: the pictures of a step depend on (seed, step) alone.

  Raises:
    ValueError: if the batch size is odd, or an object has one colour only.
  """

  def __init__(self, captions: Sequence[Caption], *, batch_size: int, grid: int, seed: int):
    if batch_size % 2:
      raise ValueError(f"batch_size {batch_size} is odd; pictures come in pairs")
    self.captions, self.pairs, self.grid, self.seed = list(captions), batch_size // 2, grid, seed
    self.objects = sorted({caption.object for caption in captions})
    self.colours: dict[str, set[str]] = {}
    for caption in captions:
      self.colours.setdefault(caption.object, set()).add(caption.colour)
    if alone := [name for name, colours in self.colours.items() if len(colours) < 2]:
      raise ValueError(f"objects {alone} have one colour each; twins need another")

  def __call__(self, step: int) -> dict[str, np.ndarray]:
    """Returns a step's "pictures" uint8[2 n, 64, 64, 3], whose second half are the twins of the
    first, "covered" bool[n, grid * grid], the cells that glyphs cover, and "object" int32[n], what
    they show, a position in `objects`."""
    rng = np.random.default_rng([self.seed, step])
    scenes, twins, covered, shown = [], [], [], []
    for _ in range(self.pairs):
      caption = self.captions[rng.integers(len(self.captions))]
      one = other = self._colour(caption.object, rng)
      while _distance(one, other) < _NEAR:
        other = self._colour(caption.object, rng)
      seed = int(rng.integers(2**31))
      scenes.append(world.draw_scene(caption, seed, one))
      twins.append(world.draw_scene(caption, seed, other))
      covered.append(_covered(scenes[-1], twins[-1], one, other, self.grid))
      shown.append(self.objects.index(caption.object))
    return {
      "pictures": np.stack(scenes + twins),
      "covered": np.stack(covered),
      "object": np.array(shown, np.int32),
    }

  def _colour(self, name: str, rng: np.random.Generator) -> tuple[int, int, int]:
    """A colour of the palette or any other, among those that are nearest to one of the object's."""
    palette, own = world.COLOURS, sorted(self.colours[name])
    if rng.random() < 0.5:
      return palette[own[rng.integers(len(own))]]
    while True:
      colour = tuple(int(x) for x in rng.integers(0, 256, 3))
      if min(palette, key=lambda other: _distance(colour, palette[other])) in own:
        return colour


def _distance(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
  return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5


def _covered(
  a: np.ndarray, b: np.ndarray, colour_a: tuple[int, ...], colour_b: tuple[int, ...], grid: int
) -> np.ndarray:
  """Returns bool[grid * grid]; glyphs are where two scenes differ less than their backgrounds."""
  background = np.subtract(colour_a, colour_b, dtype=float)
  difference = a.astype(float) - b
  glyph = 1 - difference @ background / (background @ background)  # [64, 64], 0 .. 1
  side = len(a) // grid
  cells = glyph.reshape(grid, side, grid, side).mean((1, 3))
  return (cells > _COVERED).reshape(-1)
