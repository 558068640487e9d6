"""A model directory -> the files that AR-Omni's inference or training, or mainline Hugging Face
reads. Tensors go through memory a few at a time."""

import json
import pathlib
import shutil
from collections.abc import Iterator

import jax
import ml_dtypes
import numpy as np
import yaml
from absl import logging
from flax import nnx

from aromni_jax import model_dir
from aromni_jax.codecs import image_vq
from aromni_jax.convert import image_vq_names, sources
from aromni_jax.convert.decoders import VQ_PREFIX
from aromni_jax.convert.importer import check_empty, check_room, progress, whole
from aromni_jax.convert.layouts import Layout, get_layout
from aromni_jax.convert.writers import Outgoing, Weights, to_torch, write_json
from aromni_jax.models import params as codec_params
from aromni_jax.models.config import DecoderConfig
from aromni_jax.storage import StoredArrays


def export(model: str | pathlib.Path, out: str | pathlib.Path, layout: str) -> None:
  """Writes the folder `out` in a released layout.

  native: the "model root" of AR-Omni's inference, `models/7b` and `tokenizer`. ar_omni and hf: a
  Hugging Face folder of safetensors; both have the image encoder among the decoder's tensors, and
  ar_omni has `perception.ckpt`. The pixel decoder, which Hugging Face does not have, goes to
  `tokenizer/vqgan.ckpt` in native and ar_omni.

  Args:
    model: a model directory with the tokenizer of a released model.
    out: must not exist, or be empty. It appears once it is whole.
    layout: name or alias of one of `layouts.LAYOUTS`.

  Raises:
    FileNotFoundError: if the model or its decoder does not exist.
    ValueError: if there is no such layout, or the model has no form in it: another vocabulary, or
      q/k norms that differ between heads where the layout has one.
    OSError: if the disk has too little room.
    ImportError: without PyTorch, for a layout with pickles.
  """
  layout = get_layout(layout)
  model, out = pathlib.Path(model), pathlib.Path(out)
  check_empty(out)
  info = model_dir.read_info(model)
  if not (model / "tokenizer.json").is_file():
    raise ValueError(
      f"{model} has no tokenizer.json: it was not made from a released model, and has no released "
      "layout"
    )
  config = model_dir.decoder_config(model)
  layout.check_heads(config, f"the q/k norms of {model} differ")
  if layout.needs_torch:
    sources.require_torch()  # better missed now than after the tensors
  arrays = StoredArrays(model / "decoder")
  codec = model_dir.load_codec(model, "image_codec") if "image_codec" in info else None
  tensors = list(_decoder_tensors(arrays, config, layout))
  if layout.vq_encoder and codec is not None:
    tensors += _vq_tensors(model, codec)
  total = sum(tensor.nbytes for tensor in tensors)
  check_room(out, total)
  logging.info("Writing layout %s, %.2f GB.", layout.name, total / 1e9)
  tokenizer = _hugging_face_tokenizer(model)
  weights = Weights(
    tensors,
    config,
    ids=json.loads(tokenizer)["model"]["vocab"],
    image=codec.config if codec is not None else None,
    on_piece=progress(total),
  )
  with whole(out) as partial:
    layout.write(partial, weights)
    if layout.vqgan and codec is not None and codec.config.has_decoder:
      _write_vqgan(partial / "tokenizer", codec)
    if layout.perception and codec is not None:
      _write_perception(partial / "perception.ckpt", model)
    _write_tokenizer(partial, tokenizer)
    if layout.text_tokenizer:
      (partial / "tokenizer").mkdir(exist_ok=True)
      shutil.copy(model / "tokenizer.json", partial / "tokenizer/text_tokenizer.json")


def _decoder_tensors(
  arrays: StoredArrays, config: DecoderConfig, layout: Layout
) -> Iterator[Outgoing]:
  for path, names in layout.names(config.num_layers).items():
    stacked = path.startswith("layers.")
    for i, name in enumerate(names):

      def read(path=path, index=i if stacked else slice(None)) -> np.ndarray:
        return np.ascontiguousarray(layout.to_released(arrays.read(path, index), path, config))

      yield Outgoing(name, layout.shape(path, config), arrays.dtypes[path], read)


def _vq_tensors(model: pathlib.Path, codec: image_vq.ImageVQ) -> list[Outgoing]:
  """The image codec's tensors that Hugging Face keeps: all whose name has no `decoder`."""
  dtype = next(iter(StoredArrays(model / "image_codec").dtypes.values()))
  tensors = image_vq_names.to_torch(_numpy(codec))
  return [
    Outgoing(VQ_PREFIX + n, t.shape, dtype, lambda t=t: np.ascontiguousarray(t.astype(dtype)))
    for n, t in tensors.items()
    if "decoder" not in n
  ]


def _numpy(codec: nnx.Module) -> dict:
  return jax.tree.map(np.array, codec_params.to_params(codec))


def _write_vqgan(folder: pathlib.Path, codec: image_vq.ImageVQ) -> None:
  """Writes the whole VQGAN with its yaml."""
  import torch

  folder.mkdir()
  state = {
    n: to_torch(np.ascontiguousarray(t)) for n, t in image_vq_names.to_torch(_numpy(codec)).items()
  }
  torch.save({"state_dict": state}, folder / "vqgan.ckpt")
  c = codec.config
  shape = {"double_z": False, "z_channels": c.z_channels, "resolution": c.resolution}
  shape |= {"in_channels": c.in_channels, "out_ch": c.in_channels, "ch": c.ch}
  shape |= {"ch_mult": list(c.ch_mult), "num_res_blocks": c.num_res_blocks}
  shape |= {"attn_resolutions": [], "dropout": 0.0}
  params = {"embed_dim": c.embed_dim, "n_embed": c.n_embed, "ddconfig": shape}
  target = {"target": "torch.nn.Identity"}
  text = yaml.safe_dump({"model": {"params": params | {"lossconfig": target}}})
  (folder / "vqgan.yaml").write_text(text)


def _write_perception(file: pathlib.Path, model: pathlib.Path) -> None:
  """Writes the table of the perceptual loss, for training."""
  import torch

  torch.save(to_torch(model_dir.perceptual_table(model).astype(ml_dtypes.bfloat16)), file)


def _write_tokenizer(folder: pathlib.Path, tokenizer: str) -> None:
  """Writes the tokenizer where Hugging Face looks for it."""
  (folder / "tokenizer.json").write_text(tokenizer)
  about = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "add_bos_token": False,
    "clean_up_tokenization_spaces": False,
  }
  write_json(folder / "tokenizer_config.json", about)


def _hugging_face_tokenizer(model: pathlib.Path) -> str:
  """The tokenizer with the name that Hugging Face gives to the place of a picture."""
  return (model / "tokenizer.json").read_text().replace('"<reserved08707>"', '"<image>"')
