"""Folders as AR-Omni, Anole and Chameleon are released in, with random weights."""

import json

import jax
import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import save_file

from aromni_jax.convert import decoders
from aromni_jax.convert.layouts import LAYOUTS, get_layout
from aromni_jax.models.config import DecoderConfig
from aromni_jax.models.params import put
from tests import parity


class _Torch:
  """PyTorch, imported when it is first used: only some tests have it."""

  def __getattr__(self, name):
    import torch

    return getattr(torch, name)


torch = _Torch()

TINY = DecoderConfig(
  vocab_size=65536,
  embed_dim=32,
  mlp_dim=48,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  dtype="bfloat16",
  param_dtype="bfloat16",
)


def names_of_ids() -> list[str]:
  """The released names of all ids, with made-up text pieces."""
  digits = str.maketrans("0123456789", "ABCDEFGHIJ")
  names = ["<s>", "<pad>", "</s>", "<unk>"]
  names += [f"IMGIMG{str(code).translate(digits)}Z" for code in range(8192)]
  names += ["<eoss>", "<racm3:break>"] + [f"<sentinel:{i}>" for i in range(512)]
  names += [f"<reserved{i:05d}>" for i in range(len(names) - 4, 16384)]
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  names += letters
  pairs = (a + b for a in letters for b in letters)
  return names + [next(pairs) for _ in range(65536 - len(names))]


def write_tokenizer(path, edit=lambda names: names):
  """Writes a tokenizer JSON; `edit` changes the list of names."""
  names = edit(names_of_ids())
  pairs = [n for n in names if len(n) == 2 and not n.startswith("<")]
  model = tokenizers.models.BPE(
    vocab={n: i for i, n in enumerate(names)}, merges=[(p[0], p[1]) for p in pairs]
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  path.parent.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(path))


def decoder_tensors(layout, config=TINY, dtype=ml_dtypes.bfloat16, seed=0):
  """A random state dict; the same function in every layout for the same seed."""
  rng = np.random.default_rng(seed)
  out = {}
  layout, made_as = get_layout(layout), LAYOUTS["ar_omni"]
  for path, names in layout.names(config.num_layers).items():
    for name in names:
      shape = made_as.shape(path, config)
      scale, offset = (0.1, "scale" in path) if len(shape) == 1 else (shape[-1] ** -0.5, 0)
      tensor = (offset + scale * rng.normal(size=shape)).astype(dtype)
      ours = made_as.from_released(tensor, path, config)
      tensor = layout.to_released(ours, path, config)
      out[name] = np.ascontiguousarray(tensor)
  return out


def write_hugging_face(folder, layout, config=TINY, shards=2, extra=None, **declared):
  """Writes safetensors with an index and config.json; returns the tensors."""
  tensors = decoder_tensors(layout, config) | (extra or {})
  folder.mkdir(parents=True, exist_ok=True)
  names, place = sorted(tensors), {}
  for i in range(shards):
    file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
    part = {n: tensors[n] for n in names[i::shards]}
    save_file(part, folder / file, metadata={"format": "pt"})
    place |= dict.fromkeys(part, file)
  index = {"metadata": {}, "weight_map": place}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  about = {
    "model_type": "chameleon",
    "hidden_size": config.embed_dim,
    "intermediate_size": config.mlp_dim,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "vocab_size": config.vocab_size,
    "rms_norm_eps": config.norm_eps,
    "rope_theta": config.rope_theta,
    "swin_norm": config.norm_placement == "swin",
  }
  (folder / "config.json").write_text(json.dumps(about | declared))
  return tensors


def write_native(folder, config=TINY, **declared):
  """Writes consolidated.pth and params.json; returns the tensors."""
  tensors = decoder_tensors("native", config)
  folder.mkdir(parents=True, exist_ok=True)
  torch.save(to_torch(tensors) | {"rope.freqs": None}, folder / "consolidated.pth")
  about = {"dim": config.embed_dim, "n_layers": config.num_layers, "n_heads": config.num_heads}
  about |= {"swin_norm": config.norm_placement == "swin", "norm_eps": config.norm_eps}
  (folder / "params.json").write_text(json.dumps({"model": about | declared}))
  return tensors


def to_torch(tensors):
  return {
    n: torch.from_numpy(t.view(np.int16)).view(torch.bfloat16)
    if t.dtype == ml_dtypes.bfloat16
    else torch.from_numpy(t)
    for n, t in tensors.items()
  }


def vqgan_tensors(decoder=True, seed=0):
  """A small VQGAN of the released number of codes: 32x32 codes of a 64x64 picture."""
  rng = np.random.default_rng(seed)
  out = {}

  def conv(name, c_out, c_in, size):
    out[f"{name}.weight"] = rng.normal(0, 0.1, (c_out, c_in, size, size)).astype(np.float32)
    out[f"{name}.bias"] = rng.normal(0, 0.1, c_out).astype(np.float32)

  def norm(name, width):
    out[f"{name}.weight"] = np.ones(width, np.float32)
    out[f"{name}.bias"] = np.zeros(width, np.float32)

  def res(name, width):
    for i in (1, 2):
      norm(f"{name}.norm{i}", width)
      conv(f"{name}.conv{i}", width, width, 3)

  def middle(name, width):
    res(f"{name}.block_1", width)
    norm(f"{name}.attn_1.norm", width)
    for part in ("q", "k", "v", "proj_out"):
      conv(f"{name}.attn_1.{part}", width, width, 1)
    res(f"{name}.block_2", width)

  def half(name, levels, blocks, c_in, c_out, resample):
    conv(f"{name}.conv_in", 32, c_in, 3)
    middle(f"{name}.mid", 32)
    for level in (0, 1):
      for block in range(blocks):
        res(f"{name}.{levels}.{level}.block.{block}", 32)
    conv(f"{name}.{levels}.{'0.downsample' if resample else '1.upsample'}.conv", 32, 32, 3)
    norm(f"{name}.norm_out", 32)
    conv(f"{name}.conv_out", c_out, 32, 3)

  half("encoder", "down", 1, 3, 8, True)
  if decoder:
    half("decoder", "up", 2, 8, 3, False)
  out["quantize.embedding.weight"] = rng.normal(size=(8192, 4)).astype(np.float32)
  conv("quant_conv", 4, 8, 1)
  conv("post_quant_conv", 8, 4, 1)
  return out


def write_wavtokenizer(file, codes=4096):
  """Writes the reference's small WavTokenizer, with more codes, as a Lightning checkpoint."""
  weights = parity.weights(parity.load("wavtok_tiny")[0])
  book = "feature_extractor.encodec.quantizer.vq.layers.0._codebook."
  rng = np.random.default_rng(0)
  weights[book + "embed"] = rng.normal(size=(codes, 32)).astype(np.float32)
  weights |= {"discriminator.conv.weight": np.zeros(2, np.float32)}
  torch.save({"state_dict": to_torch(weights), "epoch": 3}, file)


def write_root(root):
  """Writes the folder that AR-Omni's inference reads, and a WavTokenizer beside it."""
  write_native(root / "models/7b")
  write_tokenizer(root / "tokenizer/text_tokenizer.json")
  vq = vqgan_tensors() | {"loss.logvar": np.zeros(1, np.float32)}
  torch.save({"state_dict": to_torch(vq)}, root / "tokenizer/vqgan.ckpt")
  write_wavtokenizer(root / "wavtokenizer_small.ckpt")


def stacked(tensors, layout, config):
  """Our nested dicts of a state dict."""
  params = {}
  layout = get_layout(layout)
  for path, names in layout.names(config.num_layers).items():
    parts = [layout.from_released(tensors[n], path, config) for n in names]
    put(params, path.split("."), np.stack(parts) if path.startswith("layers.") else parts[0])
  return params


def read_all(found):
  """Our nested dicts of a decoder in files, through what a conversion writes."""
  params, _ = decoders.leaves(found)
  return jax.tree.map(lambda leaf: np.concatenate([piece() for piece in leaf.pieces]), params)
