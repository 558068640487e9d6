import io

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from aromni_jax.codecs import image_vq
from aromni_jax.codecs.image_vq import ImageVQ, ImageVQConfig
from aromni_jax.convert.image_vq_names import from_torch
from tests import parity


@pytest.fixture(scope="module")
def released():
  """The reference VQGAN's tensors, and our codec with its weights."""
  tensors, meta = parity.load("vqgan_tiny")
  names = ("resolution", "ch", "ch_mult", "num_res_blocks", "z_channels")
  config = ImageVQConfig(
    **{n: meta["ddconfig"][n] for n in names}, n_embed=meta["n_embed"], embed_dim=meta["embed_dim"]
  )
  return tensors, image_vq.from_params(config, from_torch(parity.weights(tensors)))


def nhwc(x):
  return x.transpose(0, 2, 3, 1)


def test_encode_equals_the_reference(released):
  tensors, codec = released
  pixels = nhwc(tensors["in.pixels"])
  np.testing.assert_allclose(codec.latents(pixels), nhwc(tensors["out.z"]), atol=1e-4)
  np.testing.assert_array_equal(codec.encode(pixels), tensors["out.codes"])


def test_decode_equals_the_reference(released):
  tensors, codec = released
  pixels = codec.decode(tensors["out.codes"].astype(np.int32))
  np.testing.assert_allclose(pixels, nhwc(tensors["out.pixels"]), atol=1e-4)
  off = image_vq.to_uint8(pixels).astype(int) - tensors["out.u8"]
  # Truncation turns a float difference of 1e-6 into one grey level at a boundary.
  assert np.abs(off).max() <= 1 and (off != 0).mean() < 1e-3
  np.testing.assert_array_equal(image_vq.to_uint8(nhwc(tensors["out.pixels"])), tensors["out.u8"])


def test_full_size_has_the_parameters_of_the_release():
  codec = nnx.eval_shape(lambda: ImageVQ(ImageVQConfig(), rngs=nnx.Rngs(0)))
  leaves = jax.tree.leaves(image_vq.to_params(codec))
  assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == 68_718_467


def test_small_preset_round_trips_shapes_and_params():
  config = image_vq.PRESETS["small"]
  codec = ImageVQ(config, rngs=nnx.Rngs(0))
  pixels = jax.random.uniform(jax.random.key(0), (2, 64, 64, 3), minval=-1.0)
  codes = codec.encode(pixels)
  assert codes.shape == (2, 64) and codes.dtype == np.int32
  assert codec.decode(codes).shape == (2, 64, 64, 3)
  again = image_vq.from_params(config, image_vq.to_params(codec))
  np.testing.assert_array_equal(again.encode(pixels), codes)


@pytest.mark.parametrize("case", ["rgb_up", "rgb_down", "rgba", "gray"])
def test_preprocessing_equals_the_reference(case):
  tensors, _ = parity.load("image_preprocess")
  picture = Image.fromarray(tensors[f"{case}.in"])
  np.testing.assert_array_equal(
    np.asarray(image_vq.whiten(picture)), tensors.get(f"{case}.out.whitened", tensors[f"{case}.in"])
  )
  expected = (tensors[f"{case}.out.u8_stride2"] / 255 * 2 - 1).astype(np.float32)
  np.testing.assert_array_equal(image_vq.preprocess(picture, 512)[::2, ::2], expected)


def test_odd_pictures_are_read():
  for picture in (
    Image.new("P", (10, 7)),
    Image.new("1", (3, 3)),
    Image.new("RGB", (1, 1)),
    Image.new("LA", (5, 900)),
    Image.fromarray(np.full((8, 8), 40000, np.uint16)),
  ):
    pixels = image_vq.preprocess(picture, 32)
    assert pixels.shape == (32, 32, 3) and np.abs(pixels).max() <= 1


def test_exif_rotation_is_applied():
  exif = Image.Exif()
  exif[0x0112] = 6  # stored on its side: turn by 270 degrees
  side = np.zeros((64, 64, 3), np.uint8)
  side[:, :32] = 255  # white left half becomes the top half
  buffer = io.BytesIO()
  Image.fromarray(side).save(buffer, "PNG", exif=exif)
  pixels = image_vq.preprocess(buffer.getvalue(), 64)
  assert pixels[:32].min() == 1 and pixels[32:].max() == -1


def test_bad_pictures_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="No picture at .*none.png"):
    image_vq.preprocess(tmp_path / "none.png", 64)
  with pytest.raises(ValueError, match="is a directory"):
    image_vq.preprocess(tmp_path, 64)
  empty = tmp_path / "empty.png"
  empty.touch()
  with pytest.raises(ValueError, match="empty.png\\) is empty"):
    image_vq.preprocess(empty, 64)
  text = tmp_path / "text.png"
  text.write_text("not a picture")
  with pytest.raises(ValueError, match="text.png\\) is in no format"):
    image_vq.preprocess(text, 64)
  torn = tmp_path / "torn.png"
  Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), np.uint8)).save(torn)
  torn.write_bytes(torn.read_bytes()[:2000])
  with pytest.raises(ValueError, match="torn.png\\) is damaged or cut short"):
    image_vq.preprocess(torn, 64)


def test_wrong_shapes_are_named(released):
  _, codec = released
  with pytest.raises(ValueError, match=r"expected \[B, 64, 64, 3\]"):
    codec.encode(np.zeros((1, 32, 32, 3), np.float32))
  with pytest.raises(ValueError, match=r"expected \[B, 256\]"):
    codec.decode(np.zeros((1, 64), np.int32))
  with pytest.raises(ValueError, match="do not fit its config"):
    image_vq.from_params(image_vq.PRESETS["small"], image_vq.to_params(codec))
  with pytest.raises(ValueError, match="not a multiple of num_groups=32"):
    ImageVQConfig(ch=20)
  with pytest.raises(ValueError, match="'quant_conv.weight' has shape"):
    from_torch({"quant_conv.weight": np.zeros((2, 2))})
