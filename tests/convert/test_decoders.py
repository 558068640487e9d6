import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from aromni_jax.convert import decoders, logits, sources, writers
from aromni_jax.convert.layouts import LAYOUTS, get_layout
from aromni_jax.models import params as codec_params
from aromni_jax.models.decoder import Decoder
from tests import parity, released
from tests.released import TINY, torch


def load(source, layout=None):
  """Our decoder in float32, of files."""
  found = decoders.find_decoder(source, layout)
  config = dataclasses.replace(found.config, dtype="float32", param_dtype="float32")
  params = jax.tree.map(lambda x: np.asarray(x, np.float32), released.read_all(found))
  return codec_params.from_params(lambda rngs: Decoder(config, rngs=rngs), params, "decoder")


@nnx.jit
def forward(decoder, tokens):
  hidden = decoder(tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
  return hidden, decoder.logits(hidden)


@pytest.mark.parametrize("swin", [False, True])
@pytest.mark.parametrize("layout", ["native", "hf"])
def test_layouts_compute_what_the_reference_does(tmp_path, layout, swin):
  tensors, meta = parity.load("chameleon_native_vs_hf")
  prefix = {"native": "native.", "hf": "hf."}[layout]
  weights = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
  file = {"native": "consolidated.safetensors", "hf": "model.safetensors"}[layout]
  save_file(weights, tmp_path / file)
  config = {"model_type": "chameleon", "swin_norm": swin}
  name = {"native": "params.json", "hf": "config.json"}[layout]
  (tmp_path / name).write_text(json.dumps(config))
  hidden, out = forward(load(tmp_path), tensors["in.input_ids"])
  kind = "swin" if swin else "std"
  np.testing.assert_allclose(out, tensors[f"out.{kind}.logits"], atol=1e-5)
  np.testing.assert_allclose(hidden, tensors[f"out.{kind}.last_hidden"], atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_comes_back_to_the_bit(layout):
  for name, tensor in released.decoder_tensors(layout.name).items():
    (path,) = [p for p, ns in layout.names(3).items() if name in ns]
    assert tensor.shape == layout.shape(path, TINY)
    ours = layout.from_released(tensor, path, TINY)
    assert layout.to_released(ours, path, TINY).tobytes() == tensor.tobytes(), name


def test_a_layout_is_one_entry(tmp_path, monkeypatch):
  """Names, files and norms of a layout that no other place knows."""
  tensors = {p: n.replace("model.", "net.stack_") for p, n in LAYOUTS["hf"].tensors.items()}
  mine = dataclasses.replace(
    LAYOUTS["hf"], name="mine", alias="D", tensors=tensors, files=("mine.safetensors",)
  )
  monkeypatch.setitem(LAYOUTS, "mine", mine)
  (tmp_path / "mine").mkdir()
  save_file(released.decoder_tensors("mine"), tmp_path / "mine/mine.safetensors")
  released.write_hugging_face(tmp_path / "hf", "hf")
  found = decoders.find_decoder(tmp_path / "mine", "D", swin_norm=False)
  assert found.layout is mine and found.tensors.keys() == released.decoder_tensors("mine").keys()
  expected = released.read_all(decoders.find_decoder(tmp_path / "hf"))
  jax.tree.map(np.testing.assert_array_equal, expected, released.read_all(found))


def test_older_names_of_layouts_are_read(tmp_path):
  assert {a: get_layout(a).name for a in "ABC"} == {"A": "native", "B": "ar_omni", "C": "hf"}
  with pytest.raises(ValueError, match="layout 'D' does not exist; expected one of native, ar_om"):
    get_layout("D")
  released.write_hugging_face(tmp_path, "ar_omni")
  assert decoders.find_decoder(tmp_path, "B").layout is LAYOUTS["ar_omni"]
  with pytest.raises(ValueError, match="has layout ar_omni, not hf as --layout says"):
    decoders.find_decoder(tmp_path, "C")


@pytest.mark.torch
def test_layouts_are_recognised_and_agree(tmp_path):
  released.write_native(tmp_path / "native")
  released.write_hugging_face(tmp_path / "ar_omni", "ar_omni")
  released.write_hugging_face(tmp_path / "hf", "hf")
  found = {name: decoders.find_decoder(tmp_path / name) for name in LAYOUTS}
  assert {name: f.layout for name, f in found.items()} == LAYOUTS
  assert found["native"].config == found["ar_omni"].config == found["hf"].config
  params = [released.read_all(f) for f in found.values()]
  jax.tree.map(np.testing.assert_array_equal, *params[:2])
  jax.tree.map(np.testing.assert_array_equal, *params[1:])


@pytest.mark.torch
def test_pytorch_bin_and_fused_native_tensors_are_read(tmp_path):
  tensors = released.write_hugging_face(tmp_path / "ar_omni", "ar_omni")
  (tmp_path / "bin").mkdir()
  torch.save(released.to_torch(tensors), tmp_path / "bin/pytorch_model.bin")
  native = released.decoder_tensors("native")
  for i in range(3):
    for fused, parts in (
      ("attention.wqkv", ("wq", "wk", "wv")),
      ("feed_forward.w13", ("w1", "w3")),
    ):
      names = [f"layers.{i}.{fused.split('.')[0]}.{part}.weight" for part in parts]
      native[f"layers.{i}.{fused}.weight"] = np.concatenate([native.pop(n) for n in names])
  (tmp_path / "fused").mkdir()
  torch.save(released.to_torch(native), tmp_path / "fused/consolidated.pth")
  expected = released.read_all(decoders.find_decoder(tmp_path / "ar_omni"))
  for folder in ("bin", "fused"):
    found = released.read_all(decoders.find_decoder(tmp_path / folder, swin_norm=False))
    jax.tree.map(np.testing.assert_array_equal, expected, found)


@pytest.mark.torch
def test_safetensors_come_before_pickles_of_the_same_decoder(tmp_path):
  tensors = released.write_hugging_face(tmp_path, "ar_omni")
  torch.save(released.to_torch(tensors), tmp_path / "pytorch_model.bin")
  assert all(
    t.file.suffix == ".safetensors" for t in decoders.find_decoder(tmp_path).tensors.values()
  )


def test_heads_whose_norms_differ_stay_apart(tmp_path):
  tensors = released.decoder_tensors("hf")
  name = "model.layers.1.self_attn.q_norm.weight"
  tensors[name] = tensors[name] * np.arange(1, 5, dtype=ml_dtypes.bfloat16)[:, None]
  save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(
    ValueError, match="do not show where the norms stand; say it with --swin_norm"
  ):
    decoders.find_decoder(tmp_path)
  found = decoders.find_decoder(tmp_path, swin_norm=False)
  assert found.config.per_head_norm
  norm = released.read_all(found)["layers"]["attention"]["q_norm"]["scale"]
  np.testing.assert_array_equal(norm[1], tensors[name])
  with pytest.raises(
    ValueError, match="q_norm.scale differs between heads, and layout ar_omni has one"
  ):
    LAYOUTS["ar_omni"].to_released(norm[1], "layers.attention.q_norm.scale", found.config)


@pytest.mark.torch
@pytest.mark.parametrize("seed", range(4))
def test_logits_equal_transformers_on_random_configurations(tmp_path, seed):
  from transformers import ChameleonConfig, ChameleonForConditionalGeneration

  rng = np.random.default_rng(seed)
  heads, group, half = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.integers(2, 9))
  config = dataclasses.replace(
    TINY,
    vocab_size=int(rng.integers(50, 200)),
    embed_dim=heads * group * half * 2,
    mlp_dim=int(rng.integers(8, 90)),
    num_layers=int(rng.integers(1, 4)),
    num_heads=heads * group,
    num_kv_heads=heads,
    head_dim=half * 2,
    rope_theta=float(rng.choice([1e4, 5e5])),
    norm_placement=str(rng.choice(["pre", "swin"])),
  )
  theirs = writers.hf_config(config) | {"vocabulary_map": {"<image>": 3}}
  theirs["rope_parameters"] = {"rope_type": "default", "rope_theta": theirs.pop("rope_theta")}
  vq = {"base_channels": 32, "num_res_blocks": 1, "channel_multiplier": [1], "resolution": 32}
  vq |= {"embed_dim": 8, "latent_channels": 8, "num_embeddings": 16}
  torch.manual_seed(seed)
  model = ChameleonForConditionalGeneration(ChameleonConfig(**theirs, vq_config=vq)).eval()
  with torch.no_grad():
    for name, p in model.named_parameters():
      if "norm" in name:
        shape = p.shape[-1:] if "self_attn" in name else p.shape  # the same for all heads
        p.copy_(torch.randn(shape) * 0.2 + ("weight" in name))
  model.save_pretrained(tmp_path)
  found = decoders.find_decoder(tmp_path)
  assert found.layout is LAYOUTS["hf"] and not found.config.per_head_norm and found.vq
  tokens = rng.integers(0, config.vocab_size, (2, 11))
  with torch.no_grad():
    expected = model(torch.from_numpy(tokens)).logits.numpy()
  _, ours = forward(load(tmp_path), jnp.asarray(tokens))
  np.testing.assert_allclose(ours, expected, atol=1e-4)
  alone = logits.torch_logits(found, tokens[0].astype(np.int32))
  np.testing.assert_allclose(alone, expected[0], atol=1e-4)


def edit_index(folder, change):
  file = folder / "model.safetensors.index.json"
  index = json.loads(file.read_text())
  change(index)
  file.write_text(json.dumps(index))


def edit_shard(folder, change, file="model-00001-of-00002.safetensors"):
  tensors = load_file(folder / file)
  change(tensors)
  save_file(tensors, folder / file)
  edit_index(folder, lambda i: i["weight_map"].update(dict.fromkeys(tensors, file)))


def test_damaged_files_are_named(tmp_path):
  released.write_hugging_face(tmp_path, "ar_omni")
  shard = tmp_path / "model-00002-of-00002.safetensors"
  whole = shard.read_bytes()
  shard.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(
    ValueError, match="00002-of-00002.safetensors is not a whole safetensors file"
  ):
    decoders.find_decoder(tmp_path)
  shard.unlink()
  with pytest.raises(FileNotFoundError, match="00002-of-00002.safetensors is missing; model.safe"):
    decoders.find_decoder(tmp_path)
  (tmp_path / "model.safetensors.index.json").write_text("{")
  with pytest.raises(ValueError, match="model.safetensors.index.json is not JSON"):
    decoders.find_decoder(tmp_path)
  with pytest.raises(FileNotFoundError, match="has no decoder; expected one of consolidated.safet"):
    decoders.find_decoder(tmp_path / "..")
  with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
    decoders.find_decoder(tmp_path / "nowhere")


@pytest.mark.torch
def test_damaged_and_unsafe_pickles_are_refused_unread(tmp_path):
  file = tmp_path / "consolidated.pth"
  released.write_native(tmp_path)
  file.write_bytes(file.read_bytes()[:4000])
  with pytest.raises(ValueError, match="consolidated.pth is not a whole PyTorch checkpoint"):
    decoders.find_decoder(tmp_path)

  class Evil:
    def __reduce__(self):
      return (open, (str(tmp_path / "ran"), "w"))

  torch.save({"tok_embeddings.weight": Evil()}, file)
  with pytest.raises(
    ValueError, match="consolidated.pth names _?io.open, which is no weight; nothing in"
  ):
    decoders.find_decoder(tmp_path)
  assert not (tmp_path / "ran").exists()
  torch.save([1, 2], file)
  with pytest.raises(ValueError, match="holds a list; expected a dict of tensors"):
    decoders.find_decoder(tmp_path)


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda t: t.pop("model.norm.weight"), "does not hold what model.safetensors.index.json says"),
    (lambda t: t.update(more=np.zeros(2, np.float32)), r"without a place \['more'\] \(1\)"),
    (
      lambda t: t.update({"model.norm.weight": np.zeros(3, ml_dtypes.bfloat16)}),
      r"model.norm.weight has shape \(3,\); expected \(32,\)",
    ),
    (
      lambda t: t.update({"tok_embeddings.weight": np.zeros(2, np.float32)}),
      "mixes the names of the layouts native, ar_omni, hf",
    ),
  ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
  released.write_hugging_face(tmp_path, "ar_omni")
  file = "model-00002-of-00002.safetensors"
  if "model.norm.weight" not in load_file(tmp_path / file):
    file = "model-00001-of-00002.safetensors"
  edit_shard(tmp_path, change, file)
  with pytest.raises(ValueError, match=message):
    decoders.find_decoder(tmp_path)


def test_missing_tensors_are_named(tmp_path):
  tensors = released.decoder_tensors("ar_omni")
  del tensors["model.layers.1.mlp.up_proj.weight"]
  save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match=r"missing \['model.layers.1.mlp.up_proj.weight'\] \(1\)"):
    decoders.find_decoder(tmp_path, swin_norm=False)
  save_file({n: t for n, t in tensors.items() if "norm" not in n}, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match="not a Chameleon decoder: it has no q/k norms"):
    decoders.find_decoder(tmp_path)


@pytest.mark.torch
def test_contradictions_are_named(tmp_path):
  released.write_hugging_face(tmp_path / "ar_omni", "ar_omni", hidden_size=64)
  with pytest.raises(ValueError, match="have embed_dim 32, the configuration beside it says 64"):
    decoders.find_decoder(tmp_path / "ar_omni")
  released.write_hugging_face(tmp_path / "ar_omni", "ar_omni")
  with pytest.raises(ValueError, match="--swin_norm is True, but the configuration beside"):
    decoders.find_decoder(tmp_path / "ar_omni", swin_norm=True)
  with pytest.raises(ValueError, match="has layout ar_omni, not hf as --layout says"):
    decoders.find_decoder(tmp_path / "ar_omni", "hf")
  released.write_hugging_face(
    tmp_path / "ar_omni", "ar_omni", rope_scaling={"type": "linear", "factor": 4}
  )
  with pytest.raises(ValueError, match="rotary positions are linear; expected the default"):
    decoders.find_decoder(tmp_path / "ar_omni")
  released.write_hugging_face(tmp_path / "ar_omni", "ar_omni", hidden_act="gelu")
  with pytest.raises(ValueError, match="hidden_act is gelu; expected silu"):
    decoders.find_decoder(tmp_path / "ar_omni")
  released.write_hugging_face(tmp_path / "ar_omni", "ar_omni", model_type="llama")
  with pytest.raises(ValueError, match="model_type is llama; expected chameleon"):
    decoders.find_decoder(tmp_path / "ar_omni")
  released.write_hugging_face(tmp_path / "ar_omni", "ar_omni")
  released.write_native(tmp_path / "ar_omni/models/7b")
  with pytest.raises(ValueError, match="more than one decoder.*--layout=native"):
    decoders.find_decoder(tmp_path / "ar_omni")
  assert decoders.find_decoder(tmp_path / "ar_omni", "native").layout is LAYOUTS["native"]
  folder = tmp_path / "ar_omni/models/7b"
  (folder / "consolidate_params.json").write_text(json.dumps({"model": {"swin_norm": True}}))
  with pytest.raises(ValueError, match="swin_norm is True, but False in params.json"):
    decoders.find_decoder(tmp_path / "ar_omni", "native")
  (folder / "consolidated.pth").rename(folder / "consolidated.00.pth")
  with pytest.raises(ValueError, match="1 model-parallel parts"):
    decoders.find_decoder(tmp_path / "ar_omni/models/7b")


def test_tensors_are_read_when_they_are_asked_for(tmp_path):
  released.write_hugging_face(tmp_path, "ar_omni")
  found = decoders.find_decoder(tmp_path)
  for file in tmp_path.glob("*.safetensors"):
    file.unlink()
  with pytest.raises(FileNotFoundError):
    found.tensors["lm_head.weight"].read()


def test_integer_tensors_are_refused(tmp_path):
  save_file({"a": np.zeros(2, np.int64)}, tmp_path / "x.safetensors")
  with pytest.raises(ValueError, match="tensor a is I64; expected one of F32, F16, BF16"):
    sources.read_file(tmp_path / "x.safetensors")
