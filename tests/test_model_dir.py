import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from aromni_jax import model_dir, storage
from aromni_jax.codecs import batching, image_vq, speech_codec
from aromni_jax.model import load_model
from aromni_jax.recipes import PAPER
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


def zeros(module, config):
  """Returns a codec whose parameters are all zero."""
  graphdef, state = nnx.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))
  return nnx.merge(graphdef, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state))


@pytest.mark.slow
def test_codes_of_batches_do_not_depend_on_the_batch():
  codec = model_dir.load_codec(model_dir.SHIPPED, "image_codec")
  pictures = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
  codes = batching.encode_images(codec, pictures, batch_size=2)
  assert codes.shape == (5, 64)
  np.testing.assert_array_equal(codes[3:], batching.encode_images(codec, pictures[3:], 2))
  assert batching.decode_images(codec, codes, batch_size=4).shape == pictures.shape


def test_batches_of_big_pictures_are_small(monkeypatch):
  seen = []

  def encode(codec, pixels):
    seen.append(pixels.shape)
    return pixels[:, 0, 0, :1].astype(np.int32)

  monkeypatch.setattr(image_vq.ImageVQ, "encode", encode)
  config = image_vq.ImageVQConfig(resolution=512, ch=8, ch_mult=(1,), n_embed=2, num_groups=8)
  pictures = np.zeros((6, 512, 512, 3), np.float32)
  pictures += np.arange(6)[:, None, None, None]
  codes = batching.encode_images(zeros(image_vq.ImageVQ, config), pictures)
  assert codes.ravel().tolist() == [0, 1, 2, 3, 4, 5]
  assert seen == [(4, 512, 512, 3)]  # traced once, though the last batch is not full


@pytest.mark.slow
def test_ragged_speech_comes_back_at_its_length():
  codec = model_dir.load_codec(model_dir.SHIPPED, "speech_codec")
  rng = np.random.default_rng(0)
  clips = [rng.normal(size=n).astype(np.float32) * 0.1 for n in (1, 400, 5000, 20_000)]
  codes = batching.encode_speech(codec, clips, batch_size=2)
  assert [len(c) for c in codes] == [1, 1, 13, 50]
  wavs = batching.decode_speech(codec, codes, batch_size=2)
  assert [len(w) for w in wavs] == [400, 400, 5200, 20_000]
  (alone,) = batching.decode_speech(codec, codes[2:3], batch_size=2)
  np.testing.assert_allclose(wavs[2], alone, atol=1e-5)


@pytest.mark.slow
def test_a_clip_sounds_as_it_does_alone():
  """The small codec pads with silence (its codes hear it), but decodes each clip by itself."""
  codec = model_dir.load_codec(model_dir.SHIPPED, "speech_codec")
  clip = 0.1 * np.random.default_rng(0).normal(size=400 * 47).astype(np.float32)
  (codes,) = batching.encode_speech(codec, [clip], batch_size=1)
  silent = np.pad(clip, (0, 400 * (64 - 47)))[None]
  np.testing.assert_array_equal(codes, nnx.jit(lambda c: c.encode(silent))(codec)[0, :47])
  (wav,) = batching.decode_speech(codec, [codes], batch_size=1)
  want = nnx.jit(lambda c: c.decode(codes[None]))(codec)[0]
  np.testing.assert_allclose(wav, want, atol=1e-5)


@pytest.mark.slow
def test_many_lengths_need_few_compilations(monkeypatch):
  traced = {"encode": [], "decode": []}
  for name, calls in traced.items():

    def counted(codec, rows, lengths, name=name, calls=calls):
      calls.append(rows.shape)
      hop = codec.config.hop
      if name == "encode":
        return rows[:, ::hop].astype(np.int32)
      return rows.repeat(hop, axis=1).astype(np.float32)

    monkeypatch.setattr(speech_codec.SpeechCodec, name, counted)
  config = speech_codec.SpeechCodecConfig(num_filters=2, dim=32, mlp_dim=1, num_layers=1)
  codec = zeros(speech_codec.SpeechCodec, config)
  lengths = np.random.default_rng(0).integers(1, 600 * 500, 60)
  clips = [np.full(n, i, np.float32) for i, n in enumerate(lengths)]
  codes = batching.encode_speech(codec, clips, batch_size=4)
  wavs = batching.decode_speech(codec, codes, batch_size=4)
  for i, n in enumerate(lengths):
    assert len(codes[i]) == -(-n // 600) and len(wavs[i]) == 600 * len(codes[i])
    assert (codes[i] == i).all() and (wavs[i] == i).all()
  assert len(traced["encode"]) == len(set(traced["encode"])) <= 9
  assert len(traced["decode"]) == len(set(traced["decode"])) <= 9


def test_buckets_waste_at_most_a_third():
  units = range(1, 7201)  # to three minutes at 40 codes per second
  sizes = [batching.bucket(n) for n in units]
  assert all(n <= size <= max(1.5 * n, 32) for n, size in zip(units, sizes, strict=True))
  assert len(set(sizes)) == 17
  # The codes of the small codec hear their padding, so these must stay what they are.
  assert [batching.bucket(n, halves=False) for n in (1, 32, 33, 65, 100)] == [32, 32, 64, 128, 128]


@pytest.mark.slow
def test_saved_codec_is_the_loaded_one(copy):
  codec = model_dir.load_codec(copy, "speech_codec")
  before = model_dir.read_info(copy)["speech_codec"]
  model_dir.save_codec(copy, "speech_codec", codec)
  assert model_dir.read_info(copy)["speech_codec"] == before
  codec = model_dir.load_codec(copy, "image_codec")
  model_dir.save_codec(copy, "image_codec", codec)
  after, shipped = (model_dir.read_info(p)["image_codec"] for p in (copy, model_dir.SHIPPED))
  assert after["fingerprint"] == shipped["fingerprint"]  # the one written before `has_decoder`


def test_a_codec_without_pixel_decoder_is_kept(copy):
  config = dataclasses.replace(image_vq.PRESETS["small"], has_decoder=False)
  params = image_vq.to_params(model_dir.load_codec(copy, "image_codec"))
  params.pop("decoder")
  model_dir.save_codec(copy, "image_codec", image_vq.from_params(config, params))
  codec = model_dir.load_codec(copy, "image_codec")
  assert not codec.config.has_decoder
  with pytest.raises(ValueError, match="no pixel decoder; convert with the original"):
    batching.decode_images(codec, np.zeros((1, 64), np.int32))


def test_missing_parts_are_named(copy, tmp_path):
  with pytest.raises(FileNotFoundError, match="is not a model directory: it has no model.json"):
    load_model(tmp_path / "nowhere")
  edit(copy, lambda info: info.pop("image_codec"))
  with pytest.raises(ValueError, match="has no image_codec. Convert with --vqgan=vqgan.ckpt, or"):
    load_model(copy).needed("image_codec")


def test_broken_parts_are_named(copy):
  (copy / "text.model").write_bytes(b"not a model")
  with pytest.raises(ValueError, match="text.model is not a SentencePiece model"):
    load_model(copy)
  (copy / "model.json").write_text("{")
  with pytest.raises(ValueError, match="model.json is not JSON"):
    load_model(copy)


def test_model_json_says_its_version(copy, tmp_path):
  assert "version" not in model_dir.read_info(model_dir.SHIPPED)  # from before it was written
  model_dir.create(tmp_path / "new", get_vocabulary("demo"), PAPER)
  assert model_dir.read_info(tmp_path / "new")["version"] == model_dir.VERSION == 1
  edit(copy, lambda info: info.update(version=2))
  with pytest.raises(ValueError, match="model.json: version is 2, and .* up to 1: made by a newer"):
    load_model(copy)


def test_fields_of_other_versions_are_named(copy):
  edit(copy, lambda info: info["decoder"]["config"].update(rope_scale=2, moe=True))
  with pytest.raises(ValueError, match="model.json: decoder.config has moe, rope_scale, which"):
    model_dir.decoder_config(copy)
  codec = model_dir.read_info(copy)["image_codec"]
  codec["config"]["depth"] = 3
  params = storage.load_params(copy / "image_codec")
  codec["fingerprint"] = model_dir.fingerprint(codec["config"], params)
  edit(copy, lambda info: info.update(image_codec=codec))
  with pytest.raises(
    ValueError, match="model.json: image_codec.config has depth, which this aromn"
  ):
    model_dir.load_codec(copy, "image_codec")
  edit(copy, lambda info: info["decoder"].update(config={"num_layers": "4"}))
  with pytest.raises(ValueError, match="decoder.config.num_layers is '4'; expected int"):
    model_dir.decoder_config(copy)


def test_another_codec_than_the_noted_one_is_refused(copy):
  edit(copy, lambda info: info["speech_codec"].update(fingerprint="0" * 16))
  with pytest.raises(ValueError, match="speech_codec is damaged"):
    model_dir.load_codec(copy, "speech_codec")
  edit(copy, lambda info: info["image_codec"]["config"].update(ch=8))
  with pytest.raises(ValueError, match="image_codec"):
    model_dir.load_codec(copy, "image_codec")


def test_torn_checkpoints_are_named(copy, tmp_path):
  with pytest.raises(FileNotFoundError, match="expected an Orbax checkpoint"):
    storage.load_params(tmp_path / "none")
  for file in (copy / "image_codec").rglob("*"):
    if file.is_file() and file.stat().st_size > 10_000:
      file.write_bytes(file.read_bytes()[:1000])
  with pytest.raises(ValueError, match="is not a whole Orbax checkpoint"):
    storage.load_params(copy / "image_codec")


def test_params_round_trip_in_bfloat16(tmp_path):
  params = {"a": {"kernel": np.arange(6, dtype=np.float32)}, "n": np.array([3], np.int32)}
  storage.save_params(tmp_path / "p", params, "bfloat16")
  out = storage.load_params(tmp_path / "p")
  np.testing.assert_array_equal(out["a"]["kernel"], params["a"]["kernel"])
  assert out["a"]["kernel"].dtype == np.float32 and out["n"].dtype == np.int32


def test_the_shipped_model_is_small_and_whole():
  size = sum(f.stat().st_size for f in model_dir.SHIPPED.rglob("*") if f.is_file())
  assert size < 40e6
  model = load_model()
  assert model.vocabulary == get_vocabulary("demo")
