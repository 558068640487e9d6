"""A model directory -> the files that AR-Omni's inference (A) or training (B), or mainline Hugging
Face (C) reads. Tensors go through memory a few at a time."""

import json
import mmap
import pathlib
import shutil
from collections.abc import Callable, Iterator

import jax
import ml_dtypes
import numpy as np
import yaml
from absl import logging
from flax import nnx
from safetensors.numpy import save_file

from aromni_jax import model_dir
from aromni_jax.codecs import image_vq
from aromni_jax.convert import decoder_names, image_vq_names, sources
from aromni_jax.convert.decoders import VQ_PREFIX
from aromni_jax.convert.importer import check_empty, check_room, progress, whole
from aromni_jax.convert.logits import hf_config
from aromni_jax.models import params as codec_params
from aromni_jax.models.config import DecoderConfig
from aromni_jax.storage import StoredArrays

_SHARD_BYTES = 1 << 29  # of a safetensors file; it is in memory twice while it is written
_TENSOR = tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]


def export(model: str | pathlib.Path, out: str | pathlib.Path, layout: str) -> None:
  """Writes the folder `out` in a released layout.

  A: the "model root" of AR-Omni's inference, `models/7b` and `tokenizer`. B and C: a Hugging Face
  folder of safetensors; both have the image encoder among the decoder's tensors, and B has
  `perception.ckpt`. The pixel decoder, which Hugging Face does not have, goes to
  `tokenizer/vqgan.ckpt` in A and B.

  Args:
    model: a model directory with the tokenizer of a released model.
    out: must not exist, or be empty. It appears once it is whole.
    layout: "A", "B" or "C".

  Raises:
    FileNotFoundError: if the model or its decoder does not exist.
    ValueError: if the model has no released form: another vocabulary, or per-head norms for A or B.
    OSError: if the disk has too little room.
    ImportError: for A or B without PyTorch.
  """
  model, out = pathlib.Path(model), pathlib.Path(out)
  check_empty(out)
  info = model_dir.read_info(model)
  if not (model / "tokenizer.json").is_file():
    raise ValueError(
      f"{model} has no tokenizer.json: it was not made from a released model, and has no released "
      "layout"
    )
  config = model_dir.decoder_config(model)
  if config.per_head_norm and layout != "C":
    raise ValueError(
      f"the q/k norms of {model} differ between heads, and layout {layout} has one for all heads; "
      "export with --format=C"
    )
  if layout != "C":
    sources.require_torch()  # its pickles need it: better missed now than after the tensors
  arrays = StoredArrays(model / "decoder")
  codec = model_dir.load_codec(model, "image_codec") if "image_codec" in info else None
  tensors = list(_decoder_tensors(arrays, config, layout))
  if layout != "A":
    tensors += _vq_tensors(model, codec)
  total = sum(_nbytes(tensor) for tensor in tensors)
  check_room(out, total)
  logging.info("Writing layout %s, %.2f GB.", layout, total / 1e9)
  with whole(out) as partial:
    if layout == "A":
      _write_native(partial, tensors, config, progress(total))
    else:
      _write_hugging_face(partial, tensors, config, layout, model, codec, progress(total))
    if layout != "C":
      _write_pickles(partial, model, codec, layout)
    _write_tokenizer(partial, model, layout)


def _decoder_tensors(arrays: StoredArrays, config: DecoderConfig, layout: str) -> Iterator[_TENSOR]:
  for path, names in decoder_names.names(layout, config.num_layers).items():
    stacked = path.startswith("layers.")
    for i, name in enumerate(names):

      def read(path=path, index=i if stacked else slice(None)) -> np.ndarray:
        return np.ascontiguousarray(
          decoder_names.to_released(arrays.read(path, index), path, layout, config)
        )

      yield name, decoder_names.shape(path, layout, config), arrays.dtypes[path], read


def _vq_tensors(model: pathlib.Path, codec: image_vq.ImageVQ | None) -> list[_TENSOR]:
  """The image codec's tensors that Hugging Face keeps: all whose name has no `decoder`."""
  if codec is None:
    return []
  dtype = next(iter(StoredArrays(model / "image_codec").dtypes.values()))
  tensors = image_vq_names.to_torch(_numpy(codec))
  return [
    (VQ_PREFIX + n, t.shape, dtype, lambda t=t: np.ascontiguousarray(t.astype(dtype)))
    for n, t in tensors.items()
    if "decoder" not in n
  ]


def _nbytes(tensor: _TENSOR) -> int:
  return int(np.prod(tensor[1])) * tensor[2].itemsize


def _numpy(codec: nnx.Module) -> dict:
  return jax.tree.map(np.array, codec_params.to_params(codec))


def _write_native(
  folder: pathlib.Path,
  tensors: list[_TENSOR],
  config: DecoderConfig,
  on_piece: Callable[[int], None],
) -> None:
  """Writes `models/7b`: a file of the right size first, then each tensor into its place."""
  import torch
  from torch._subclasses.fake_tensor import FakeTensorMode

  folder = folder / "models/7b"
  folder.mkdir(parents=True)
  file = folder / "consolidated.pth"
  with FakeTensorMode():
    state = {n: torch.empty(shape, dtype=_torch_dtype(dtype)) for n, shape, dtype, _ in tensors}
  # The official loader wants this key to be there, and uses nothing of it.
  state["rope.freqs"] = None
  with torch.serialization.skip_data(materialize_fake_tensors=True):
    torch.save(state, file)  # with the checksums of zeros, which torch.load does not look at
  with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
    places = torch.load(file, mmap=True, weights_only=True)
  for name, _, _, read in tensors:
    array = read()
    places[name].copy_(_to_torch(array))
    on_piece(array.nbytes)
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
  _write_json(folder / "params.json", {"model": params})
  _write_json(folder / "consolidate_params.json", {"model": params, "model_parallel_size": 1})


def _write_hugging_face(
  folder: pathlib.Path,
  tensors: list[_TENSOR],
  config: DecoderConfig,
  layout: str,
  model: pathlib.Path,
  codec: image_vq.ImageVQ | None,
  on_piece: Callable[[int], None],
) -> None:
  shards: list[list[_TENSOR]] = [[]]
  room = _SHARD_BYTES
  for tensor in tensors:
    if _nbytes(tensor) > room and shards[-1]:
      shards.append([])
      room = _SHARD_BYTES
    shards[-1].append(tensor)
    room -= _nbytes(tensor)
  place: dict[str, str] = {}
  for number, shard in enumerate(shards, 1):
    name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    arrays = {n: read() for n, _, _, read in shard}
    save_file(arrays, folder / name, metadata={"format": "pt"})
    place |= dict.fromkeys(arrays, name)
    on_piece(sum(a.nbytes for a in arrays.values()))
  total = sum(_nbytes(tensor) for tensor in tensors)
  index = {"metadata": {"total_size": total}, "weight_map": place}
  _write_json(folder / "model.safetensors.index.json", index)
  fork = layout == "B"
  ids = json.loads(_hugging_face_tokenizer(model))["model"]["vocab"]
  about = {
    "architectures": ["ChameleonForCausalLM" if fork else "ChameleonForConditionalGeneration"],
    "model_type": "chameleon",
    "torch_dtype": str(tensors[0][2]),
    **hf_config(config),
    "vocabulary_map": ids,
    "bos_token_id": 1,  # as released, though the tokenizer's bos is 0
    "eos_token_id": 2,
  }
  if codec is not None:
    about["vq_config"] = _vq_config(codec.config)
  _write_json(folder / "config.json", about)


def _vq_config(c: image_vq.ImageVQConfig) -> dict:
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


def _write_pickles(
  folder: pathlib.Path, model: pathlib.Path, codec: image_vq.ImageVQ | None, layout: str
) -> None:
  """Writes the whole VQGAN with its yaml and, for training, the table of the perceptual loss."""
  if codec is None:
    return
  import torch

  c = codec.config
  if c.has_decoder:
    (folder / "tokenizer").mkdir()
    state = {
      n: _to_torch(np.ascontiguousarray(t))
      for n, t in image_vq_names.to_torch(_numpy(codec)).items()
    }
    torch.save({"state_dict": state}, folder / "tokenizer/vqgan.ckpt")
    shape = {"double_z": False, "z_channels": c.z_channels, "resolution": c.resolution}
    shape |= {"in_channels": c.in_channels, "out_ch": c.in_channels, "ch": c.ch}
    shape |= {"ch_mult": list(c.ch_mult), "num_res_blocks": c.num_res_blocks}
    shape |= {"attn_resolutions": [], "dropout": 0.0}
    params = {"embed_dim": c.embed_dim, "n_embed": c.n_embed, "ddconfig": shape}
    target = {"target": "torch.nn.Identity"}
    text = yaml.safe_dump({"model": {"params": params | {"lossconfig": target}}})
    (folder / "tokenizer/vqgan.yaml").write_text(text)
  if layout == "B":
    table = model_dir.perceptual_table(model, codec).astype(ml_dtypes.bfloat16)
    torch.save(_to_torch(table), folder / "perception.ckpt")


def _write_tokenizer(folder: pathlib.Path, model: pathlib.Path, layout: str) -> None:
  """The tokenizer where AR-Omni's loader and Hugging Face look for it."""
  (folder / "tokenizer.json").write_text(_hugging_face_tokenizer(model))
  about = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "add_bos_token": False,
    "clean_up_tokenization_spaces": False,
  }
  _write_json(folder / "tokenizer_config.json", about)
  if layout == "A":
    (folder / "tokenizer").mkdir(exist_ok=True)
    shutil.copy(model / "tokenizer.json", folder / "tokenizer/text_tokenizer.json")


def _hugging_face_tokenizer(model: pathlib.Path) -> str:
  """The tokenizer with the name that Hugging Face gives to the place of a picture."""
  return (model / "tokenizer.json").read_text().replace('"<reserved08707>"', '"<image>"')


def _torch_dtype(dtype: np.dtype):
  import torch

  return getattr(torch, np.dtype(dtype).name)


def _to_torch(array: np.ndarray):
  import torch

  if array.dtype == ml_dtypes.bfloat16:
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
  return torch.from_numpy(array)


def _write_json(file: pathlib.Path, data: dict) -> None:
  file.write_text(json.dumps(data, indent=1) + "\n")
