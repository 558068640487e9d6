import dataclasses
import io

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from aromni_jax.codecs import image_vq
from aromni_jax.codecs.image_vq import ImageVQ, ImageVQConfig
from aromni_jax.convert.image_vq_names import from_torch, to_torch
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_released_size_equals_the_reference():
  tensors, _ = parity.load("vqgan_full_io")
  weights = parity.weights(tensors)
  codec = image_vq.from_params(ImageVQConfig(), from_torch(weights))
  assert sum(w.size for w in weights.values()) == 68_718_467
  pixels = nhwc(tensors["in.pixels_64"]).repeat(8, axis=1).repeat(8, axis=2)
  z, codes = nnx.jit(lambda c, x: (c.latents(x), c.encode(x)))(codec, pixels)
  np.testing.assert_allclose(z, nhwc(tensors["out.z"]), atol=1e-4)
  clear = tensors["out.code_gap"] > 1e-2  # all but 3 of 1024
  np.testing.assert_array_equal(codes[0, clear], tensors["out.codes"][0, clear])
  pixels = nnx.jit(lambda c, k: c.decode(k))(codec, tensors["out.codes"].astype(np.int32))
  np.testing.assert_allclose(pixels[:, ::4, ::4], nhwc(tensors["out.pixels_stride4"]), atol=1e-4)
  row = tensors["out.pixels_row200"].swapaxes(1, 2)
  np.testing.assert_allclose(pixels[:, 200], row, atol=1e-4)


def test_without_pixel_decoder_it_encodes_and_says_why_not_to_draw(released):
  tensors, codec = released
  names = {k: v for k, v in parity.weights(tensors).items() if "decoder" not in k}
  config = dataclasses.replace(codec.config, has_decoder=False)
  encoder = image_vq.from_params(config, from_torch(names))
  codes = encoder.encode(nhwc(tensors["in.pixels"]))
  np.testing.assert_array_equal(codes, tensors["out.codes"])
  with pytest.raises(ValueError, match="no pixel decoder; convert with the original vqgan.ckpt"):
    encoder.decode(codes)
  assert to_torch(image_vq.to_params(encoder)).keys() == names.keys()
  with pytest.raises(ValueError, match="missing .*decoder"):
    image_vq.from_params(codec.config, from_torch(names))


def test_names_round_trip_to_the_bit(released):
  tensors, codec = released
  weights = parity.weights(tensors)
  again = to_torch(image_vq.to_params(codec))
  assert again.keys() == weights.keys()
  for name, tensor in again.items():
    np.testing.assert_array_equal(tensor, weights[name], strict=True)
    assert tensor.flags.c_contiguous


@pytest.mark.slow
def test_small_preset_round_trips_shapes_and_params():
  config = image_vq.PRESETS["small"]
  rng = np.random.default_rng(0)
  abstract = nnx.eval_shape(lambda: ImageVQ(config, rngs=nnx.Rngs(0)))
  params = jax.tree.map(lambda x: rng.normal(size=x.shape), image_vq.to_params(abstract))
  codec = image_vq.from_params(config, params)
  pixels = jax.random.uniform(jax.random.key(0), (2, 64, 64, 3), minval=-1.0)
  encode = nnx.jit(lambda c, x: c.encode(x))
  codes = encode(codec, pixels)
  assert codes.shape == (2, 64) and codes.dtype == np.int32
  assert nnx.eval_shape(lambda c, k: c.decode(k), codec, codes).shape == (2, 64, 64, 3)
  again = image_vq.from_params(config, image_vq.to_params(codec))
  np.testing.assert_array_equal(encode(again, pixels), codes)


@pytest.mark.parametrize("case", ["rgb_up", "rgb_down", "rgba", "gray"])
def test_preprocessing_equals_the_reference(case):
  tensors, _ = parity.load("image_preprocess")
  picture = Image.fromarray(tensors[f"{case}.in"])
  np.testing.assert_array_equal(
    np.asarray(image_vq.whiten(picture)), tensors.get(f"{case}.out.whitened", tensors[f"{case}.in"])
  )
  expected = (tensors[f"{case}.out.u8_stride2"] / 255 * 2 - 1).astype(np.float32)
  np.testing.assert_array_equal(image_vq.preprocess(picture, 512)[::2, ::2], expected)


RED, HALF_BLACK = (255, 0, 0), (127, 127, 127)


def palette(**info):
  picture = Image.new("P", (9, 9), 1)
  picture.putpalette([0, 0, 255, 255, 0, 0])
  picture.info |= info
  return picture


@pytest.mark.parametrize(
  ("picture", "colour"),
  [
    (Image.new("RGB", (9, 9), RED), RED),
    (Image.new("RGBA", (9, 9), (*RED, 255)), RED),
    (Image.new("RGBA", (9, 9), (*RED, 0)), (255, 255, 255)),
    (Image.new("RGBA", (9, 9), (0, 0, 0, 128)), HALF_BLACK),
    (Image.new("RGBA", (9, 9), (10, 10, 10, 100)), (158, 158, 158)),  # 158.9 truncated
    (Image.new("LA", (9, 9), (0, 128)), HALF_BLACK),
    (Image.new("L", (9, 9), 200), (200, 200, 200)),
    (Image.new("1", (9, 9), 1), (255, 255, 255)),
    (Image.fromarray(np.full((9, 9), 200 * 257, np.uint16)), (200, 200, 200)),
    (Image.fromarray(np.full((9, 9), 200 * 257, np.int32)), (200, 200, 200)),
    (palette(), RED),
    (palette(transparency=1), (255, 255, 255)),
    (palette(transparency=bytes([255, 0])), (255, 255, 255)),
    (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), RED),
    (Image.new("YCbCr", (9, 9), (76, 85, 255)), (254, 0, 0)),
  ],
  ids=lambda x: x.mode if isinstance(x, Image.Image) else "",
)
def test_every_mode_is_read(picture, colour):
  pixels = image_vq.preprocess(picture, 32)
  assert pixels.shape == (32, 32, 3) and pixels.dtype == np.float32
  np.testing.assert_array_equal(image_vq.to_uint8(pixels), np.full((32, 32, 3), colour))


def test_files_of_every_mode_are_read(tmp_path):
  """What a file keeps of its mode: 16 bits, a palette's transparency, CMYK."""
  grey = Image.fromarray(np.full((9, 9), 40_000, np.uint16))
  cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
  for name, picture, colour in (
    ("grey.png", grey, (155, 155, 155)),
    ("palette.png", palette(transparency=1), (255, 255, 255)),
    ("cmyk.tiff", cmyk, RED),
    ("cmyk.jpg", cmyk, (254, 0, 0)),
  ):
    picture.save(tmp_path / name)
    found = image_vq.to_uint8(image_vq.preprocess(tmp_path / name, 32)).reshape(-1, 3)
    assert np.abs(found.astype(int) - colour).max() <= 1, name


def test_the_first_picture_of_an_animation_is_read(tmp_path):
  first, second = Image.new("RGB", (20, 20), RED), Image.new("RGB", (20, 20), (0, 0, 255))
  for name, options in (("a.gif", {}), ("a.webp", {"lossless": True})):
    first.save(tmp_path / name, save_all=True, append_images=[second], **options)
    found = image_vq.to_uint8(image_vq.preprocess(tmp_path / name, 32))
    np.testing.assert_array_equal(found, np.full((32, 32, 3), RED))


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (100, 1), (2, 2), (31, 33), (6000, 4000)])
def test_every_size_is_read(size):
  pixels = image_vq.preprocess(Image.new("RGB", size, RED), 512)
  np.testing.assert_array_equal(image_vq.to_uint8(pixels), np.full((512, 512, 3), RED))


def test_strips_are_refused_before_they_fill_the_memory(tmp_path):
  path = tmp_path / "strip.png"
  Image.new("L", (1, 10_000)).save(path)
  with pytest.raises(ValueError, match=r"strip.png\) is 1x10000 pixels, 10000 times .* Crop it"):
    image_vq.preprocess(path, 512)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
  upright = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
  how = Image.Transpose  # what a camera in this orientation does to the picture
  stored = {
    2: how.FLIP_LEFT_RIGHT,
    3: how.ROTATE_180,
    4: how.FLIP_TOP_BOTTOM,
    5: how.TRANSPOSE,
    6: how.ROTATE_90,
    7: how.TRANSVERSE,
    8: how.ROTATE_270,
  }.get(orientation)
  exif = Image.Exif()
  exif[0x0112] = orientation
  buffer = io.BytesIO()
  (upright.transpose(stored) if stored is not None else upright).save(buffer, "PNG", exif=exif)
  pixels = image_vq.preprocess(buffer.getvalue(), 64)
  np.testing.assert_array_equal(pixels, image_vq.preprocess(upright, 64))


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
  with pytest.raises(ValueError, match="bytes\\) is damaged or cut short"):
    image_vq.preprocess(cut_jpeg(), 64)
  with pytest.raises(ValueError, match="mode F; expected integer pixels"):
    image_vq.preprocess(Image.new("F", (9, 9)), 64)


def cut_jpeg():
  buffer = io.BytesIO()
  Image.new("RGB", (300, 300), RED).save(buffer, "JPEG")
  return buffer.getvalue()[:-300]


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
