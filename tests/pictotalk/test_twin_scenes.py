import jax.numpy as jnp
import numpy as np
import pytest

from aromni_jax.pictotalk import world
from aromni_jax.pictotalk.train_image import twin_loss
from aromni_jax.pictotalk.twin_scenes import TwinScenes


def source(seed=0, **options):
  captions = world.captions("tiny", "train")
  return TwinScenes(captions, **({"batch_size": 6, "grid": 8, "seed": seed} | options))


def test_pictures_are_a_function_of_seed_and_step():
  first = source()(3)["pictures"]
  assert first.shape == (6, 64, 64, 3) and first.dtype == np.uint8
  np.testing.assert_array_equal(first, source()(3)["pictures"])
  assert (first != source(seed=1)(3)["pictures"]).any()
  assert (first != source()(4)["pictures"]).any()


def test_twins_differ_in_colour_alone():
  batch = source()(0)
  scenes, twins = np.split(batch["pictures"].astype(int), 2)
  for scene, twin, covered in zip(scenes, twins, batch["covered"].reshape(-1, 8, 8), strict=True):
    cells = covered.repeat(8, 0).repeat(8, 1)
    background = (scene[0, 0] - twin[0, 0])[None]
    assert np.abs(background).sum() > 0
    assert 0 < covered.sum() < 64
    # Where nothing covers them, twins differ by their backgrounds; glyphs are the same in both.
    empty = (scene - twin)[~cells] - background
    assert np.abs(empty).mean() < 1
    assert (scene == twin).all(-1)[cells].any() and not (scene == twin).all(-1)[~cells].any()


def test_colours_are_many_and_spare_held_out_pairs():
  captions = [c for c in world.captions("tiny") if (c.object, c.colour) != ("lemon", "white")]
  colours, names = world.COLOURS, sorted({c.object for c in captions})
  scenes = TwinScenes(captions, batch_size=100, grid=8, seed=0)(0)
  corners = scenes["pictures"][:, 0, 0].astype(float)
  nearest = [min(colours, key=lambda n, c=c: np.sum((c - colours[n]) ** 2)) for c in corners]
  shown = np.tile(scenes["object"], 2)
  assert {n for n, o in zip(nearest, shown, strict=True) if names[o] == "lemon"} == set(
    list(colours)[1:4]
  )
  of_palette = np.mean([any((c == v).all() for v in colours.values()) for c in corners])
  assert 0.3 < of_palette < 0.7
  one, other = np.split(corners, 2)
  assert np.linalg.norm(one - other, axis=1).min() > 50


def test_twin_loss_is_zero_for_equal_cells_and_knows_no_scale():
  rng = np.random.default_rng(0)
  z = jnp.asarray(rng.normal(size=(4, 2, 2, 3)), jnp.float32)
  covered = jnp.array([[True, False, False, True], [False, False, True, False]])
  one = float(twin_loss(z, covered))
  assert one > 0.1 and float(twin_loss(10 * z, covered)) == pytest.approx(one, rel=1e-5)
  flat = z.reshape(2, 2, 4, 3)
  same = flat.at[1].set(jnp.where(covered[..., None], flat[0], flat[1]))
  assert float(twin_loss(same.reshape(z.shape), covered)) == 0


def test_wrong_sources_are_named():
  with pytest.raises(ValueError, match="batch_size 3 is odd"):
    source(batch_size=3)
  with pytest.raises(ValueError, match="have one colour each"):
    TwinScenes([world.Caption(1, "dog", "red")], batch_size=2, grid=8, seed=0)
