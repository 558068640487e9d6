"""Pictures to train the image codec on: PictoTalk scenes in pairs that differ in colour alone.

A decoder that has seen a dog on seven colours can draw it on the eighth only if the codes of a dog
do not depend on the colour behind it. So every scene comes with a twin, the same glyphs at the same
places on another colour, and with the cells of the code grid that the glyphs cover: there the codec
is trained to see the same.
"""

from collections.abc import Sequence

import numpy as np

from aromni_jax import pictotalk
from aromni_jax.pictotalk import Caption

_COVERED = 0.02  # share of a cell's area from which on it counts as covered


class TwinScenes:
  """Draws the pictures of every training step.

  Args:
    captions: PictoTalk captions to draw; twins take colours that stand here with the same object.
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
    self.colours: dict[str, set[str]] = {}
    for caption in captions:
      self.colours.setdefault(caption.object, set()).add(caption.colour)
    if alone := [name for name, colours in self.colours.items() if len(colours) < 2]:
      raise ValueError(f"objects {alone} have one colour each; twins need another")

  def __call__(self, step: int) -> dict[str, np.ndarray]:
    """Returns a step's "pictures" uint8[2 n, 64, 64, 3], whose second half are the twins of the
    first, and "covered" bool[n, grid * grid], the cells that glyphs cover."""
    rng = np.random.default_rng([self.seed, step])
    scenes, twins, covered = [], [], []
    for _ in range(self.pairs):
      caption = self.captions[rng.integers(len(self.captions))]
      others = sorted(self.colours[caption.object] - {caption.colour})
      other = Caption(caption.count, caption.object, others[rng.integers(len(others))])
      seed = int(rng.integers(2**31))
      scenes.append(pictotalk.draw_scene(caption, seed))
      twins.append(pictotalk.draw_scene(other, seed))
      covered.append(_covered(scenes[-1], twins[-1], caption.colour, other.colour, self.grid))
    return {"pictures": np.stack(scenes + twins), "covered": np.stack(covered)}


def _covered(a: np.ndarray, b: np.ndarray, colour_a: str, colour_b: str, grid: int) -> np.ndarray:
  """Returns bool[grid * grid]; glyphs are where two scenes differ less than their backgrounds."""
  background = np.subtract(pictotalk.COLOURS[colour_a], pictotalk.COLOURS[colour_b], dtype=float)
  difference = a.astype(float) - b
  glyph = 1 - difference @ background / (background @ background)  # [64, 64], 0 .. 1
  side = len(a) // grid
  cells = glyph.reshape(grid, side, grid, side).mean((1, 3))
  return (cells > _COVERED).reshape(-1)
