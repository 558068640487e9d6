"""Writers of released weights: Meta's `models/7b`, and a Hugging Face folder of safetensors.

Tensors go through memory a few at a time. What else stands in a released folder, `exporter` writes.
"""

import dataclasses
import json
import mmap
import pathlib
from collections.abc import Callable

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from aromni_jax.codecs.image_vq import ImageVQConfig
from aromni_jax.models.config import DecoderConfig

_SHARD_BYTES = 1 << 29  # of a safetensors file; it is in memory twice while it is written


@dataclasses.dataclass(frozen=True)
class Outgoing:
  """A tensor to write: name, shape and dtype of the released layout, and what makes it."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Weights:
  """What a layout writes into its weights and configuration files.

  Attributes:
    tensors: in the order of the files.
    config: shape of the decoder.
    ids: every name of the tokenizer -> its id.
    image: shape of the image codec, or None without one.
    on_piece: is called with the bytes of what was written.
  """

  tensors: list[Outgoing]
  config: DecoderConfig
  ids: dict[str, int]
  image: ImageVQConfig | None
  on_piece: Callable[[int], None]


def write_native(folder: pathlib.Path, weights: Weights) -> None:
  """Writes `models/7b`: a file of the right size first, then each tensor into its place."""
  import torch
  from torch._subclasses.fake_tensor import FakeTensorMode

  config = weights.config
  folder = folder / "models/7b"
  folder.mkdir(parents=True)
  file = folder / "consolidated.pth"
  with FakeTensorMode():
    state = {t.name: torch.empty(t.shape, dtype=_torch_dtype(t.dtype)) for t in weights.tensors}
  # The official loader wants this key to be there, and uses nothing of it.
  state["rope.freqs"] = None
  with torch.serialization.skip_data(materialize_fake_tensors=True):
    torch.save(state, file)  # with the checksums of zeros, which torch.load does not look at
  with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
    places = torch.load(file, mmap=True, weights_only=True)
  for tensor in weights.tensors:
    places[tensor.name].copy_(to_torch(tensor.read()))
    weights.on_piece(tensor.nbytes)
  params = {
    "dim": config.embed_dim,
    "n_layers": config.num_layers,
    "n_heads": config.num_heads,
    "n_kv_heads": config.num_kv_heads,
    "ffn_dim": config.mlp_dim,
    "multiple_of": 256,
    "vocab_size": config.vocab_size,
    "norm_eps": config.norm_eps,
    "rope_theta": config.rope_theta,
    "qk_normalization": True,
    "swin_norm": config.norm_placement == "swin",
  }
  write_json(folder / "params.json", {"model": params})
  write_json(folder / "consolidate_params.json", {"model": params, "model_parallel_size": 1})


def write_hugging_face(folder: pathlib.Path, weights: Weights, *, architecture: str) -> None:
  """Writes safetensors with their index, and `config.json` for a class of `transformers`."""
  shards: list[list[Outgoing]] = [[]]
  room = _SHARD_BYTES
  for tensor in weights.tensors:
    if tensor.nbytes > room and shards[-1]:
      shards.append([])
      room = _SHARD_BYTES
    shards[-1].append(tensor)
    room -= tensor.nbytes
  place: dict[str, str] = {}
  for number, shard in enumerate(shards, 1):
    name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    save_file({t.name: t.read() for t in shard}, folder / name, metadata={"format": "pt"})
    place |= dict.fromkeys((t.name for t in shard), name)
    weights.on_piece(sum(t.nbytes for t in shard))
  total = sum(t.nbytes for t in weights.tensors)
  index = {"metadata": {"total_size": total}, "weight_map": place}
  write_json(folder / "model.safetensors.index.json", index)
  about = {
    "architectures": [architecture],
    "model_type": "chameleon",
    "torch_dtype": str(weights.tensors[0].dtype),
    **hf_config(weights.config),
    "vocabulary_map": weights.ids,
    "bos_token_id": 1,  # as released, though the tokenizer's bos is 0
    "eos_token_id": 2,
  }
  if weights.image is not None:
    about["vq_config"] = _vq_config(weights.image)
  write_json(folder / "config.json", about)


def hf_config(config: DecoderConfig) -> dict:
  """Returns the decoder's part of a Hugging Face `config.json`."""
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.embed_dim,
    "intermediate_size": config.mlp_dim,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "max_position_embeddings": 4096,
    "rms_norm_eps": config.norm_eps,
    "rope_theta": config.rope_theta,
    "swin_norm": config.norm_placement == "swin",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "vocabulary_map": {"<image>": 8711},
  }


def _vq_config(c: ImageVQConfig) -> dict:
  return {
    "embed_dim": c.embed_dim,
    "num_embeddings": c.n_embed,
    "double_latent": False,
    "latent_channels": c.z_channels,
    "resolution": c.resolution,
    "in_channels": c.in_channels,
    "base_channels": c.ch,
    "channel_multiplier": list(c.ch_mult),
    "num_res_blocks": c.num_res_blocks,
    "attn_resolutions": None,
    "dropout": 0.0,
    "attn_type": "vanilla",
  }


def _torch_dtype(dtype: np.dtype):
  import torch

  return getattr(torch, np.dtype(dtype).name)


def to_torch(array: np.ndarray):
  """Returns the array as a tensor of PyTorch, which shares its memory."""
  import torch

  if array.dtype == ml_dtypes.bfloat16:
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
  return torch.from_numpy(array)


def write_json(file: pathlib.Path, data: dict) -> None:
  file.write_text(json.dumps(data, indent=1) + "\n")
