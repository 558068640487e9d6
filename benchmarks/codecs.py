"""Seconds that the codecs of released size take on the CPU, ours and PyTorch's, on equal weights.

  python -m benchmarks.codecs

A picture of 512x512 pixels and four seconds of 24 kHz sound, each encoded and decoded, batch 1,
fp32. The picture's encoder beside ours is that of `transformers`, the rest
`benchmarks/torch_codecs.py`. Weights are random, those of the parity fixtures. Ours is compiled;
both run once before they are measured; runs alternate between them, the figures are medians.
"""

import json
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
from absl import app, flags
from flax import nnx
from transformers.models.chameleon import modeling_chameleon

from aromni_jax.codecs import image_vq, speech_codec
from aromni_jax.convert import image_vq_names, speech_codec_names
from benchmarks import peer, torch_codecs
from tests import parity

_RUNS = flags.DEFINE_integer("runs", 5, "Measured runs of each.")
_SECONDS = 4


def image_functions() -> dict[str, tuple[Callable, Callable]]:
  """Returns encoding and decoding of a picture as (ours, PyTorch's), results as arrays."""
  tensors, _ = parity.load("vqgan_full_io")
  weights = parity.weights(tensors)
  ours = image_vq.from_params(image_vq.ImageVQConfig(), image_vq_names.from_torch(weights))
  w = {k: torch.from_numpy(v) for k, v in weights.items()}
  config = modeling_chameleon.ChameleonVQVAEConfig(
    embed_dim=256, num_embeddings=8192, latent_channels=256, resolution=512, base_channels=128
  )
  theirs = modeling_chameleon.ChameleonVQVAE(config).eval()
  theirs.load_state_dict({k: v for k, v in w.items() if "decoder" not in k})
  pixels = tensors["in.pixels_64"].repeat(8, axis=2).repeat(8, axis=3)
  rows, codes = pixels.transpose(0, 2, 3, 1), tensors["out.codes"]
  encode, decode = nnx.jit(lambda c, x: c.encode(x)), nnx.jit(lambda c, k: c.decode(k))
  tokens = codes.astype(np.int32)
  return {
    "image_encode": (
      lambda: encode(ours, rows),
      lambda: theirs.encode(torch.from_numpy(pixels)).image_tokens.reshape(1, -1),
    ),
    "image_decode": (
      lambda: decode(ours, tokens),
      lambda: torch_codecs.decode_picture(w, torch.from_numpy(codes)).permute(0, 2, 3, 1),
    ),
  }


def speech_functions() -> dict[str, tuple[Callable, Callable]]:
  """Returns encoding and decoding of sound as (ours, PyTorch's), results as arrays."""
  tensors, _ = parity.load("wavtok_full_io")
  weights = parity.weights(tensors)
  config = speech_codec.SpeechCodecConfig()
  ours = speech_codec.from_params(config, speech_codec_names.from_torch(weights))
  w = torch_codecs.fold_weight_norms({k: torch.from_numpy(v) for k, v in weights.items()})
  lstm = torch_codecs.make_lstm(w)
  wav = np.tile(tensors["a.in.wav"], (1, _SECONDS))
  codes = np.tile(tensors["a.out.codes"][0], (1, _SECONDS))
  encode, decode = nnx.jit(lambda c, x: c.encode(x)), nnx.jit(lambda c, k: c.decode(k))
  tokens = codes.astype(np.int32)
  return {
    "speech_encode": (
      lambda: encode(ours, wav),
      lambda: torch_codecs.encode_speech(w, lstm, torch.from_numpy(wav)),
    ),
    "speech_decode": (
      lambda: decode(ours, tokens),
      lambda: torch_codecs.decode_speech(w, torch.from_numpy(codes)),
    ),
  }


def measure(name: str, ours: Callable, theirs: Callable) -> dict[str, float]:
  """Returns seconds of both, their ratio, and how equal the results are."""
  results, seconds = {}, {"ours": [], "peer": []}
  for i in range(_RUNS.value + 1):
    for who, run in (("ours", ours), ("peer", theirs)):
      began = time.perf_counter()
      results[who] = np.asarray(jax.block_until_ready(run()))
      if i:
        seconds[who].append(time.perf_counter() - began)
  medians = {k: float(np.median(v)) for k, v in seconds.items()}
  if name.endswith("encode"):
    same = {f"{name}_equal_codes": float(np.mean(results["ours"] == results["peer"]))}
  else:
    worst = np.abs(results["ours"] - results["peer"]).max()
    same = {f"{name}_max_difference": float(f"{worst:.1e}")}
  return {
    f"{name}_ours_seconds": round(medians["ours"], 3),
    f"{name}_peer_seconds": round(medians["peer"], 3),
    f"{name}_speedup": round(medians["peer"] / medians["ours"], 2),
  } | same


def main(argv: list[str]) -> None:
  del argv
  result = {"benchmark": "codecs"}
  with torch.inference_mode():
    for functions in (image_functions, speech_functions):
      for name, (ours, theirs) in functions().items():
        result |= measure(name, ours, theirs)
  print(json.dumps(result | {"runs": _RUNS.value} | peer.versions()))


if __name__ == "__main__":
  app.run(main)
