import json
import shutil

import numpy as np
import pytest

from aromni_jax import checkpoint, model_dir
from aromni_jax.vocabulary import get_vocabulary


@pytest.fixture
def copy(tmp_path):
  out = tmp_path / "model"
  shutil.copytree(model_dir.SHIPPED, out)
  return out


def edit(path, change):
  file = path / "model.json"
  info = json.loads(file.read_text())
  change(info)
  file.write_text(json.dumps(info))


def test_codes_of_batches_do_not_depend_on_the_batch():
  codec = model_dir.load_codec(model_dir.SHIPPED, "image_codec")
  pictures = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
  codes = model_dir.encode_images(codec, pictures, batch_size=2)
  assert codes.shape == (5, 64)
  np.testing.assert_array_equal(codes[3:], model_dir.encode_images(codec, pictures[3:], 2))
  assert model_dir.decode_images(codec, codes, batch_size=4).shape == pictures.shape


def test_ragged_speech_comes_back_at_its_length():
  codec = model_dir.load_codec(model_dir.SHIPPED, "speech_codec")
  rng = np.random.default_rng(0)
  clips = [rng.normal(size=n).astype(np.float32) * 0.1 for n in (1, 400, 5000, 20_000)]
  codes = model_dir.encode_speech(codec, clips, batch_size=2)
  assert [len(c) for c in codes] == [1, 1, 13, 50]
  wavs = model_dir.decode_speech(codec, codes, batch_size=2)
  assert [len(w) for w in wavs] == [400, 400, 5200, 20_000]
  (alone,) = model_dir.decode_speech(codec, codes[2:3], batch_size=2)
  np.testing.assert_allclose(wavs[2], alone, atol=1e-5)


def test_saved_codec_is_the_loaded_one(copy):
  codec = model_dir.load_codec(copy, "speech_codec")
  before = model_dir.read_info(copy)["speech_codec"]
  model_dir.save_codec(copy, "speech_codec", codec)
  assert model_dir.read_info(copy)["speech_codec"] == before


def test_missing_parts_are_named(copy, tmp_path):
  with pytest.raises(FileNotFoundError, match="is not a model directory: it has no model.json"):
    model_dir.load_model(tmp_path / "nowhere")
  edit(copy, lambda info: info.pop("image_codec"))
  with pytest.raises(ValueError, match="has no image_codec. Convert with --vqgan=vqgan.ckpt, or"):
    model_dir.load_model(copy).needed("image_codec")


def test_broken_parts_are_named(copy):
  (copy / "text.model").write_bytes(b"not a model")
  with pytest.raises(ValueError, match="text.model is not a SentencePiece model"):
    model_dir.load_model(copy)
  (copy / "model.json").write_text("{")
  with pytest.raises(ValueError, match="model.json is not JSON"):
    model_dir.load_model(copy)


def test_another_codec_than_the_noted_one_is_refused(copy):
  edit(copy, lambda info: info["speech_codec"].update(fingerprint="0" * 16))
  with pytest.raises(ValueError, match="speech_codec is damaged"):
    model_dir.load_codec(copy, "speech_codec")
  edit(copy, lambda info: info["image_codec"]["config"].update(ch=8))
  with pytest.raises(ValueError, match="image_codec"):
    model_dir.load_codec(copy, "image_codec")


def test_torn_checkpoints_are_named(copy, tmp_path):
  with pytest.raises(FileNotFoundError, match="expected an Orbax checkpoint"):
    checkpoint.load_params(tmp_path / "none")
  for file in (copy / "image_codec").rglob("*"):
    if file.is_file() and file.stat().st_size > 10_000:
      file.write_bytes(file.read_bytes()[:1000])
  with pytest.raises(ValueError, match="is not a whole Orbax checkpoint"):
    checkpoint.load_params(copy / "image_codec")


def test_params_round_trip_in_bfloat16(tmp_path):
  params = {"a": {"kernel": np.arange(6, dtype=np.float32)}, "n": np.array([3], np.int32)}
  checkpoint.save_params(tmp_path / "p", params, "bfloat16")
  out = checkpoint.load_params(tmp_path / "p")
  np.testing.assert_array_equal(out["a"]["kernel"], params["a"]["kernel"])
  assert out["a"]["kernel"].dtype == np.float32 and out["n"].dtype == np.int32


def test_the_shipped_model_is_small_and_whole():
  size = sum(f.stat().st_size for f in model_dir.SHIPPED.rglob("*") if f.is_file())
  assert size < 40e6
  model = model_dir.load_model()
  assert model.vocabulary == get_vocabulary("demo")
