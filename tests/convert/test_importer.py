import argparse
import dataclasses
import itertools
import json
import pickle
import shutil
import signal
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from aromni_jax import model_dir, storage
from aromni_jax.codecs import batching
from aromni_jax.convert import decoders, exporter, logits, sources
from aromni_jax.convert.importer import Sources, convert
from aromni_jax.model import load_model
from aromni_jax.models import params as codec_params
from aromni_jax.models import sharding
from aromni_jax.models.decoder import Decoder
from aromni_jax.recipes import RELEASED
from tests import released
from tests.released import torch

pytestmark = pytest.mark.torch


@pytest.fixture
def copy(root, tmp_path):
  shutil.copytree(root, tmp_path / "source")
  return tmp_path / "source"


def test_the_model_directory_holds_all_parts(root, model):
  loaded = load_model(model)
  assert loaded.recipe is RELEASED and loaded.vocabulary.name == "aromni_7b"
  assert loaded.decoder.config == released.TINY
  assert loaded.image_codec.config.grid == 32 and loaded.image_codec.config.has_decoder
  assert loaded.speech_codec.config.num_codes == 4096
  found = decoders.find_decoder(root)
  ours = nnx.to_pure_dict(nnx.state(loaded.decoder))
  jax.tree.map(np.testing.assert_array_equal, released.read_all(found), ours)
  pixels = np.zeros((1, 64, 64, 3), np.float32)
  assert batching.encode_images(loaded.image_codec, pixels, 1).shape == (1, 1024)


def test_the_certificate_accounts_for_every_tensor(root, model):
  certificate = json.loads((model / "certificate.json").read_text())
  files = {"tokenizer/vqgan.ckpt", "wavtokenizer_small.ckpt", "models/7b/consolidated.pth"}
  names = {n for f in files for n in sources.read_file(root / f)}
  skipped = certificate["skipped"]
  assert skipped["loss.logvar"] == "not part of encoding and decoding"
  assert skipped["discriminator.*"] == "discriminators and losses, 1 tensors"
  names = names - {"discriminator.conv.weight"} | {"discriminator.*"}
  assert set(certificate["mapped"]) | set(skipped) == names
  assert not set(certificate["mapped"]) & set(skipped)
  assert certificate["mapped"]["layers.2.attention.wq.weight"] == "layers.attention.q.kernel[2]"
  assert certificate["layout"] == "native" and certificate["vocabulary"]["special"]["eom"] == 12831
  assert files | {"models/7b/params.json"} <= set(certificate["files"])
  hashed = certificate["files"]["models/7b/consolidated.pth"]["sha256"]
  assert hashed == sources.file_hash(root / "models/7b/consolidated.pth")
  prompt = np.array(certificate["logits"]["prompt"], np.int32)
  expected = logits.torch_logits(decoders.find_decoder(root), prompt)
  stored = certificate["logits"]["positions"]
  assert [p["id"] for p in stored] == expected.argmax(-1).tolist()
  np.testing.assert_allclose([p["logit"] for p in stored], expected.max(-1), atol=1e-3)


def test_every_layout_comes_back_to_the_bit(root, model, tmp_path):
  before = decoders.find_decoder(root).tensors
  for layout in ("native", "ar_omni", "hf"):
    exporter.export(model, tmp_path / layout, layout)
    convert(Sources(tmp_path / layout), tmp_path / f"again_{layout}")
    exporter.export(tmp_path / f"again_{layout}", tmp_path / f"native_{layout}", "native")
    after = decoders.find_decoder(tmp_path / f"native_{layout}").tensors
    assert {n: t.read().tobytes() for n, t in after.items()} == {
      n: t.read().tobytes() for n, t in before.items()
    }
  vq = sources.read_file(root / "tokenizer/vqgan.ckpt")
  for layout in ("native", "ar_omni"):
    back = sources.read_file(tmp_path / layout / "tokenizer/vqgan.ckpt")
    assert set(back) == set(vq) - {"loss.logvar"}
    assert all(back[n].read().tobytes() == vq[n].read().tobytes() for n in back)
    assert not model_dir.read_info(tmp_path / "again_hf")["image_codec"]["config"]["has_decoder"]
  table = sources.read_bare_tensor(tmp_path / "ar_omni/perception.ckpt")
  codebook = vq["quantize.embedding.weight"].read()
  np.testing.assert_array_equal(table, codebook.astype(ml_dtypes.bfloat16))
  state = torch.load(tmp_path / "native/models/7b/consolidated.pth", weights_only=True)
  assert state["rope.freqs"] is None  # the one key that the official loader wants besides


def test_transformers_loads_what_is_exported(model, tmp_path):
  from transformers import AutoTokenizer, ChameleonForConditionalGeneration

  exporter.export(model, tmp_path / "hf", "hf")
  theirs = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32)
  tokens = logits.fixed_prompt(65536)
  with torch.no_grad():
    expected = theirs(torch.from_numpy(tokens)[None].long()).logits[0].numpy()
  ours = logits.stored_logits(model, tokens)
  text = np.arange(16388, 65536)  # it masks the ids of pictures
  np.testing.assert_allclose(ours[:, text], expected[:, text], atol=1e-4)
  tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
  assert tokenizer.encode("a", add_special_tokens=False)
  assert (
    tokenizer.convert_tokens_to_ids("<image>") == theirs.config.vocabulary_map["<image>"] == 8711
  )


def test_a_decoder_is_read_onto_a_mesh(model):
  config = model_dir.decoder_config(model)
  abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
  _, state = nnx.split(abstract)
  places = sharding.state_shardings(state, sharding.make_mesh(1, 4, 2))
  state = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=s), state, places
  )
  loaded = model_dir.load_decoder_state(model, state)
  kernel = loaded["layers"]["mlp"]["up"]["kernel"].get_value()
  assert kernel.dtype == np.float32
  assert {s.data.shape for s in kernel.addressable_shards} == {(3, 8, 24)}
  alone = nnx.state(model_dir.load_decoder(model))
  jax.tree.map(np.testing.assert_array_equal, loaded, alone)


def test_a_model_without_codecs_says_so(root, tmp_path):
  released.write_hugging_face(tmp_path / "ar_omni", "ar_omni")
  tokenizer = root / "tokenizer/text_tokenizer.json"
  convert(Sources(tmp_path / "ar_omni", tokenizer=tokenizer), tmp_path / "out")
  loaded = load_model(tmp_path / "out")
  assert loaded.image_codec is None and loaded.speech_codec is None
  with pytest.raises(
    ValueError, match="has no speech_codec. Convert with --wavtokenizer=FILE.ckpt"
  ):
    loaded.needed("speech_codec")


def test_the_image_codec_of_hugging_face_files_only_reads(root, tmp_path):
  vq = released.vqgan_tensors(decoder=False)
  extra = {"model.vqmodel." + n: t.astype(ml_dtypes.bfloat16) for n, t in vq.items()}
  before = released.write_hugging_face(tmp_path / "ar_omni", "ar_omni", extra=extra)
  shutil.copy(root / "tokenizer/text_tokenizer.json", tmp_path / "ar_omni/tokenizer.json")
  certificate = convert(Sources(tmp_path / "ar_omni"), tmp_path / "out")
  assert certificate["mapped"]["model.vqmodel.quant_conv.weight"] == "image_codec"
  codec = model_dir.load_codec(tmp_path / "out", "image_codec")
  with pytest.raises(ValueError, match="no pixel decoder"):
    codec.decode(np.zeros((1, 1024), np.int32))
  exporter.export(tmp_path / "out", tmp_path / "back", "ar_omni")
  back = sources.read_sharded(tmp_path / "back/model.safetensors.index.json")
  assert set(back) == set(before)
  assert all(t.read().tobytes() == before[n].tobytes() for n, t in back.items())


def test_the_pixel_decoder_of_anole_s_files_is_found(root, tmp_path):
  extra = {"model.vqmodel." + n: t for n, t in released.vqgan_tensors().items()}
  released.write_hugging_face(tmp_path / "ar_omni", "ar_omni", extra=extra)
  tokenizer = root / "tokenizer/text_tokenizer.json"
  certificate = convert(Sources(tmp_path / "ar_omni", tokenizer=tokenizer), tmp_path / "out")
  assert certificate["mapped"]["model.vqmodel.decoder.conv_in.weight"] == "image_codec"
  codec = model_dir.load_codec(tmp_path / "out", "image_codec")
  assert codec.decode(np.zeros((1, 1024), np.int32)).shape == (1, 64, 64, 3)


def test_another_perceptual_table_is_kept(copy, model, tmp_path):
  assert not (model / "perception").exists()
  codebook = sources.read_file(copy / "tokenizer/vqgan.ckpt")["quantize.embedding.weight"].read()
  table = torch.from_numpy(codebook).bfloat16()
  torch.save(table, copy / "perception.ckpt")
  assert convert(Sources(copy), tmp_path / "same")["perception"] == "the codebook"
  assert not (tmp_path / "same/perception").exists()
  torch.save(table + 1, copy / "perception.ckpt")
  convert(Sources(copy), tmp_path / "other")
  kept = model_dir.perceptual_table(tmp_path / "other")
  np.testing.assert_array_equal(kept, (table + 1).float().numpy())
  torch.save(table[:7], copy / "perception.ckpt")
  with pytest.raises(ValueError, match=r"has shape \(7, 4\); expected one row for 8192 codes"):
    convert(Sources(copy), tmp_path / "short")


def test_the_target_must_be_empty_and_have_room(root, model, tmp_path, monkeypatch):
  for run in (
    lambda: convert(Sources(root), model),
    lambda: exporter.export(model, model, "native"),
  ):
    with pytest.raises(ValueError, match="is not empty; name a new folder"):
      run()
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
  for run in (convert, exporter.export):
    arguments = (
      (Sources(root), tmp_path / "o") if run is convert else (model, tmp_path / "o", "native")
    )
    with pytest.raises(OSError, match=r"has 0.0 GB free, 0.0 GB are needed"):
      run(*arguments)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda f: (f / "tokenizer/text_tokenizer.json").unlink(), "has no tokenizer; expected one of"),
    (lambda f: torch.save({"a": torch.zeros(2)}, f / "wavtokenizer_small.ckpt"), "not a WavToken"),
    (
      lambda f: torch.save({"a": torch.zeros(2)}, f / "tokenizer/vqgan.ckpt"),
      "lacks encoder.conv_",
    ),
    (
      lambda f: shutil.copy(f / "wavtokenizer_small.ckpt", f / "wavtokenizer_2.ckpt"),
      "name the on",
    ),
    (
      lambda f: (f / "tokenizer/vqgan.yaml").write_text(
        "model: {params: {embed_dim: 4, n_embed: 8192, ddconfig: {ch: 128}}}"
      ),
      "vqgan.yaml: ch is 128; the tensors have 32",
    ),
    (lambda f: (f / "tokenizer/vqgan.yaml").write_text("a: 1"), "has no model.params.ddconfig"),
  ],
)
def test_wrong_files_leave_nothing(copy, tmp_path, change, message):
  change(copy)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    convert(Sources(copy), tmp_path / "out")
  assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_another_wavtokenizer_is_named(copy, tmp_path):
  released.write_wavtokenizer(copy / "wavtokenizer_small.ckpt", codes=64)
  with pytest.raises(ValueError, match="has 64 codes, 40 a second; the vocabulary has 4096, 40"):
    convert(Sources(copy), tmp_path / "out")


def test_lightning_objects_beside_the_weights_are_left_out(copy, tmp_path):
  file = copy / "wavtokenizer_small.ckpt"
  whole = torch.load(file, weights_only=True)
  whole["callbacks"] = {"best": np.float64(0.5)}
  whole["hyper_parameters"] = argparse.Namespace(rate=24000)
  torch.save(whole, file)
  with pytest.raises(pickle.UnpicklingError):
    torch.load(file, weights_only=True)
  tensors = sources.read_file(file)
  assert set(tensors) == {n for n, t in whole["state_dict"].items()}
  file.write_bytes(file.read_bytes()[:-3000])
  with pytest.raises(ValueError, match="wavtokenizer_small.ckpt"):
    sources.read_file(file)


def test_another_vqgan_than_the_decoder_s_is_refused(root, tmp_path):
  vq = {n: t for n, t in released.vqgan_tensors().items() if "decoder" not in n}
  extra = {"model.vqmodel." + n: t.astype(ml_dtypes.bfloat16) for n, t in vq.items()}
  released.write_hugging_face(tmp_path / "ar_omni", "ar_omni", extra=extra)
  files = {"tokenizer": root / "tokenizer/text_tokenizer.json"}
  files["vqgan"] = root / "tokenizer/vqgan.ckpt"
  certificate = convert(Sources(tmp_path / "ar_omni", **files), tmp_path / "out")
  assert certificate["skipped"]["model.vqmodel.quant_conv.weight"].startswith("vqgan.ckpt holds")
  other = released.to_torch(released.vqgan_tensors(seed=1))
  torch.save({"state_dict": other}, tmp_path / "other.ckpt")
  files["vqgan"] = tmp_path / "other.ckpt"
  with pytest.raises(ValueError, match="other.ckpt is not the image codec that the decoder was tr"):
    convert(Sources(tmp_path / "ar_omni", **files), tmp_path / "out2")


def edit_vqgan(folder, change):
  file = folder / "tokenizer/vqgan.ckpt"
  state = torch.load(file, weights_only=True)["state_dict"]
  change(state)
  torch.save({"state_dict": state}, file)


@pytest.mark.parametrize(
  "change, message",
  [
    (
      lambda s: s.update({"quantize.embedding.weight": torch.zeros(100, 4)}),
      "has 100 image codes; the vocabulary has 8192",
    ),
    (lambda s: s.pop("encoder.mid.block_1.conv1.bias"), r"missing \['encoder.mid.block_1.conv1.bi"),
    (lambda s: s.pop("decoder.conv_out.weight"), r"missing \['decoder.conv_out.kernel'\]"),
    (
      lambda s: s.update({"encoder.more.bias": torch.zeros(2)}),
      r"unexpected \['encoder.more.bias'",
    ),
  ],
)
def test_wrong_image_codecs_are_named(copy, tmp_path, change, message):
  edit_vqgan(copy, change)
  with pytest.raises(ValueError, match=message):
    convert(Sources(copy), tmp_path / "out")


def test_weights_that_are_not_numbers_are_refused(copy, tmp_path):
  file = copy / "models/7b/consolidated.pth"
  state = torch.load(file, weights_only=True)
  state["layers.1.feed_forward.w2.weight"][0, 0] = float("nan")
  torch.save(state, file)
  with pytest.raises(ValueError, match="logits of the fixed prompt are not finite"):
    convert(Sources(copy), tmp_path / "out")


def test_a_killed_conversion_leaves_nothing_that_looks_whole(root, tmp_path):
  out = tmp_path / "out"
  command = [sys.executable, "-m", "aromni_jax.convert", f"--source={root}", f"--out={out}"]
  process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
  partial = tmp_path / "out.partial"
  while not (partial / "image_codec").exists() and process.poll() is None:
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert partial.exists() and not out.exists()
  with pytest.raises(FileNotFoundError):
    load_model(out)
  done = subprocess.run([*command, f"--verify-against={root}"], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "likeliest ids equal: 1.000" in done.stderr and " %), " in done.stderr
  assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_check_against_a_source_can_fail(root, model, tmp_path):
  shutil.copytree(model, tmp_path / "m")
  stored = storage.load_params(tmp_path / "m/decoder")
  stored["layers"]["mlp"]["up"]["kernel"][1] *= 1.5
  storage.save_params(tmp_path / "m/decoder", stored, "bfloat16")
  command = [sys.executable, "-m", "aromni_jax.convert", f"--model={tmp_path / 'm'}"]
  done = subprocess.run([*command, f"--verify-against={root}"], capture_output=True, text=True)
  assert done.returncode == 1 and "error: the logits of" in done.stderr


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "name --source to convert released files, or --model to go back"),
    (["--source=a", "--model=b"], "not both"),
    (["--source=a"], "--out is missing"),
    (["--model=a"], "--format is missing: which released layout to write (native, ar_omni, hf)"),
    (["--model=nowhere", "--format=B", "--out=o"], "nowhere is not a model directory"),
    (["--model=a", "--format=ar_omni"], "--out is missing"),
    (["--model=nowhere", "--format=ar_omni", "--out=o"], "nowhere is not a model directory"),
    (["--source=nowhere", "--out=o", "--tokenizer=t.json"], "t.json does not exist"),
    (["--source=a", "--format=native", "--out=o"], "--format does not go with --source"),
    (["--model=a", "--format=native", "--out=o", "--vqgan=v"], "--vqgan does not go with --model"),
  ],
)
def test_wrong_flags_are_named(tmp_path, arguments, message):
  command = [sys.executable, "-m", "aromni_jax.convert", *arguments]
  done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
  assert done.returncode == 1 and message in done.stderr, done.stderr


def test_pieces_are_made_one_at_a_time(tmp_path, monkeypatch):
  monkeypatch.setattr(storage, "_CHUNK_BYTES", 64)
  log = []

  def piece(i):
    def make():
      log.append(i)
      return np.full((1, 8, 8), i, np.float32)

    return make

  leaf = storage.Streamed((5, 8, 8), np.dtype(np.float32), tuple(piece(i) for i in range(5)))
  small = storage.Streamed((4,), np.dtype(np.float32), (lambda: np.arange(4, dtype=np.float32),))
  storage.save_streamed(
    tmp_path / "p", {"a": {"b": leaf}, "c": small}, lambda n: n > 16 and log.append("written")
  )
  rounds = [list(run) for _, run in itertools.groupby(log, key=lambda x: x == "written")]
  assert [run for run in rounds if run[0] != "written"] == [[i] for i in range(5)]
  stored = storage.StoredArrays(tmp_path / "p")
  assert (stored.read("a.b", 3) == 3).all() and stored.shapes["a.b"] == (5, 8, 8)
  np.testing.assert_array_equal(stored.read("c"), np.arange(4))
  loaded = storage.load_params(tmp_path / "p")
  assert (loaded["a"]["b"][:, 0, 0] == np.arange(5)).all()
  assert codec_params.shapes(loaded) == stored.shapes
  assert dataclasses.replace(small, shape=(2, 2)).size == 4
