"""Finds the image and the speech codec among released files and makes ours of them.

Configurations are read from the shapes of the tensors; `vqgan.yaml` must agree where it lies beside
the checkpoint.
"""

import math
import pathlib
import re
from collections import Counter
from typing import Any

import numpy as np
import yaml

from aromni_jax.codecs import image_vq, speech_codec
from aromni_jax.convert import image_vq_names, sources, speech_codec_names
from aromni_jax.convert.sources import Tensors
from aromni_jax.models import params as codec_params
from aromni_jax.vocabulary import Vocabulary

_VQ_PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
_SPEECH_PARTS = ("feature_extractor.", "backbone.", "head.")
_ENCODER = "feature_extractor.encodec.encoder.model."
_CODEBOOK = "feature_extractor.encodec.quantizer.vq.layers.0._codebook.embed"


def image_codec(
  tensors: Tensors, where: str, vocabulary: Vocabulary
) -> tuple[image_vq.ImageVQ, dict[str, str]]:
  """Returns the image codec of VQGAN tensors, and name -> why a tensor is not part of it.

  Args:
    tensors: names of `vqgan.ckpt`, or of `model.vqmodel.` without that prefix.
    where: what messages call the file.
    vocabulary: has as many image codes, and says how many a picture has.

  Raises:
    ValueError: if it is not a VQGAN, lacks tensors, or has another number of codes.
  """
  skipped = {n: "not part of encoding and decoding" for n in tensors if not n.startswith(_VQ_PARTS)}
  tensors = {n: t for n, t in tensors.items() if n not in skipped}
  config = _image_config(tensors, where, math.isqrt(vocabulary.image_length))
  if config.n_embed != len(vocabulary.image):
    raise ValueError(
      f"{where} has {config.n_embed} image codes; the vocabulary has {len(vocabulary.image)}"
    )
  params = image_vq_names.from_torch(_arrays(tensors))
  make = lambda rngs: image_vq.ImageVQ(config, rngs=rngs)  # noqa: E731
  return codec_params.from_params(make, params, f"image codec in {where}"), skipped


def _image_config(tensors: Tensors, where: str, grid: int) -> image_vq.ImageVQConfig:
  def shape(name: str) -> tuple[int, ...]:
    if name not in tensors:
      raise ValueError(f"{where} lacks {name}; expected the VQGAN of Chameleon")
    return tensors[name].shape

  levels = sorted({int(m[1]) for n in tensors if (m := re.match(r"encoder\.down\.(\d+)\.", n))})
  ch = shape("encoder.conv_in.weight")[0]
  blocks = {int(m[1]) for n in tensors if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", n))}
  widths = [shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in levels]
  n_embed, embed_dim = shape("quantize.embedding.weight")
  return image_vq.ImageVQConfig(
    resolution=grid * 2 ** (len(levels) - 1),
    in_channels=shape("encoder.conv_in.weight")[1],
    ch=ch,
    ch_mult=tuple(width // ch for width in widths),
    num_res_blocks=len(blocks),
    z_channels=shape("encoder.conv_out.weight")[0],
    embed_dim=embed_dim,
    n_embed=n_embed,
    has_decoder="decoder.conv_in.weight" in tensors,
  )


def check_vqgan_yaml(file: pathlib.Path, config: image_vq.ImageVQConfig) -> None:
  """Raises ValueError if `vqgan.yaml` says something else than the tensors."""
  try:
    stated: Any = yaml.safe_load(file.read_text())["model"]["params"]
    stated = {k: stated.get(k) for k in ("embed_dim", "n_embed")} | dict(stated["ddconfig"])
  except (yaml.YAMLError, KeyError, TypeError) as e:
    raise ValueError(f"{file} has no model.params.ddconfig; expected the VQGAN's yaml") from e
  wanted = {
    "embed_dim": config.embed_dim,
    "n_embed": config.n_embed,
    "z_channels": config.z_channels,
    "resolution": config.resolution,
    "in_channels": config.in_channels,
    "ch": config.ch,
    "ch_mult": list(config.ch_mult),
    "num_res_blocks": config.num_res_blocks,
    "double_z": False,
    "attn_resolutions": [],
  }
  for name, value in wanted.items():
    if stated.get(name, value) not in (value, None):
      raise ValueError(f"{file}: {name} is {stated[name]}; the tensors have {value}")


def speech(
  tensors: Tensors, where: str, vocabulary: Vocabulary
) -> tuple[speech_codec.SpeechCodec, dict[str, str]]:
  """Returns the speech codec of a WavTokenizer state dict, and what is not part of it and why.

  Weight norms are folded once, here.

  Raises:
    ValueError: if it is not a WavTokenizer, lacks tensors, or has another number of codes or rate
      than the vocabulary.
  """
  if _CODEBOOK not in tensors:
    some = ", ".join(sorted(tensors)[:3])
    raise ValueError(f"{where} is not a WavTokenizer: it lacks {_CODEBOOK} (it has {some} ...)")
  others = Counter(n.split(".")[0] for n in tensors if not n.startswith(_SPEECH_PARTS))
  skipped = {f"{n}.*": f"discriminators and losses, {k} tensors" for n, k in others.items()}
  tensors = {n: t for n, t in tensors.items() if n.startswith(_SPEECH_PARTS)}
  unused = {n for n in tensors if n.startswith(speech_codec_names.UNUSED)}
  skipped |= {n: "not part of encoding and decoding" for n in unused}
  try:
    params = speech_codec_names.from_torch(
      _arrays({n: t for n, t in tensors.items() if n not in unused})
    )
  except KeyError as e:  # halves of a weight norm or of a bias
    raise ValueError(f"{where} lacks {e}; the checkpoint is not whole") from e
  config = _speech_config(tensors, where)
  found = config.num_codes, config.sample_rate / config.hop
  wanted = len(vocabulary.speech), vocabulary.speech_rate
  if found != wanted:
    raise ValueError(
      f"{where} has {found[0]} codes, {found[1]:g} a second; the vocabulary has {wanted[0]}, "
      f"{wanted[1]} a second. Expected WavTokenizer small-600-24k-4096"
    )
  make = lambda rngs: speech_codec.SpeechCodec(config, rngs=rngs)  # noqa: E731
  return codec_params.from_params(make, params, f"speech codec in {where}"), skipped


def _speech_config(tensors: Tensors, where: str) -> speech_codec.SpeechCodecConfig:
  def shape(name: str) -> tuple[int, ...]:
    if name not in tensors:
      raise ValueError(f"{where} lacks {name}; expected WavTokenizer small-600-24k-4096")
    return tensors[name].shape

  downs = [
    (int(m[1]), t.shape[2])
    for n, t in tensors.items()
    if (m := re.fullmatch(re.escape(_ENCODER) + r"(\d+)\.conv\.conv\.weight_v", n))
  ]
  strides = tuple(size // 2 for _, size in sorted(downs)[1:-1])  # kernels are two strides long
  num_codes, embed_dim = shape(_CODEBOOK)
  blocks = {int(m[1]) for n in tensors if (m := re.match(r"backbone\.convnext\.(\d+)\.", n))}
  lstm = {n for n in tensors if re.search(r"\.lstm\.weight_ih_l\d+$", n)}
  return speech_codec.SpeechCodecConfig(
    hop=math.prod(strides),
    num_codes=num_codes,
    embed_dim=embed_dim,
    num_filters=shape(_ENCODER + "0.conv.conv.weight_v")[0],
    strides=strides,
    lstm_layers=len(lstm),
    dim=shape("backbone.embed.weight")[0],
    mlp_dim=shape("backbone.convnext.0.pwconv1.weight")[0],
    num_layers=len(blocks),
    num_conditions=shape("backbone.norm.scale.weight")[0],
    position_net="backbone.pos_net.0.norm1.weight" in tensors,
    n_fft=shape("head.out.weight")[0] - 2,
  )


def perception_table(file: pathlib.Path, codec: image_vq.ImageVQ | None) -> np.ndarray | None:
  """Returns AR-Omni's `perception.ckpt`, float32[codes, dimensions], or None if the codebook in
  bfloat16 is the same table, which is then used.

  Raises:
    ValueError: if the table has not one row per image code.
  """
  table = sources.read_bare_tensor(file)
  if codec is None:
    return table.astype(np.float32)
  codebook = np.asarray(codec.quantize.embedding[...])
  if table.ndim != 2 or len(table) != len(codebook):
    raise ValueError(f"{file} has shape {table.shape}; expected one row for {len(codebook)} codes")
  if table.shape == codebook.shape and (codebook.astype(table.dtype) == table).all():
    return None
  return table.astype(np.float32)


def _arrays(tensors: Tensors) -> dict[str, np.ndarray]:
  return {n: t.read() for n, t in tensors.items()}
