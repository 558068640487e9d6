"""Converts released checkpoints to a model directory, and back.

  aromni convert --source=AR-Omni-Chat-v0.1 --wavtokenizer=WavTokenizer_small_600_24k_4096.ckpt \\
    --out=models/chat
  aromni convert --model=models/chat --format=native --out=chat_for_ar_omni

--source is a folder with a decoder in one of three released layouts: native, Meta's
consolidated.pth; ar_omni, the Hugging Face fork of AR-Omni and Anole; hf, mainline Hugging Face
(once named A, B and C, which are read on). The tokenizer JSON, the VQGAN and WavTokenizer are
looked for in it, or named. Files are read tensor by tensor, and what was found and computed is
written to certificate.json beside the model.
"""

import pathlib

import numpy as np
from absl import flags, logging

from aromni_jax import logs
from aromni_jax.convert import decoders, exporter, importer, logits
from aromni_jax.convert.layouts import LAYOUTS, get_layout
from aromni_jax.recipes import RECIPES, get_recipe

_LAYOUTS = [*LAYOUTS, *(layout.alias for layout in LAYOUTS.values())]
_SOURCE = flags.DEFINE_string("source", None, "Folder of released files to convert.")
_MODEL = flags.DEFINE_string("model", None, "Model directory to write in a released layout.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; new or empty.")
_FORMAT = flags.DEFINE_enum("format", None, _LAYOUTS, "Released layout to write --model in.")
_LAYOUT = flags.DEFINE_enum("layout", None, _LAYOUTS, "Decoder to take where --source has two.")
_VQGAN = flags.DEFINE_string("vqgan", None, "The image codec, vqgan.ckpt.")
_WAVTOKENIZER = flags.DEFINE_string("wavtokenizer", None, "The speech codec, a .ckpt.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "The tokenizer, a JSON.")
_PERCEPTION = flags.DEFINE_string("perception", None, "Table of the perceptual loss.")
_SWIN_NORM = flags.DEFINE_bool(
  "swin_norm", None, "Norms on the branches' outputs, where no file says it."
)
_RECIPE = flags.DEFINE_enum("recipe", "released", RECIPES, "Prompt family of the model.")
_VERIFY = flags.DEFINE_string(
  "verify_against", None, "Released folder whose logits in PyTorch transformers must agree."
)
flags.DEFINE_alias("verify-against", "verify_against")
_TOLERANCE = flags.DEFINE_float("tolerance", 1e-3, "Largest difference of logits of the check.")


def main(argv: list[str]) -> None:
  del argv
  if (_SOURCE.value is None) == (_MODEL.value is None):
    raise ValueError("name --source to convert released files, or --model to go back, not both")
  others = [_FORMAT] if _SOURCE.value else [_VQGAN, _WAVTOKENIZER, _TOKENIZER, _PERCEPTION]
  for flag in others:
    if flag.value:
      raise ValueError(
        f"--{flag.name} does not go with {'--source' if _SOURCE.value else '--model'}"
      )
  if _SOURCE.value:
    if _OUT.value is None:
      raise ValueError("--out is missing: the model directory to write")
    certificate = importer.convert(_sources(), _OUT.value, recipe=get_recipe(_RECIPE.value))
    logging.info(
      "Wrote %s: layout %s, %d tensors mapped, %d left out (see %s).",
      *(_OUT.value, certificate["layout"], len(certificate["mapped"])),
      *(len(certificate["skipped"]), importer.CERTIFICATE),
    )
  elif _FORMAT.value:
    if _OUT.value is None:
      raise ValueError("--out is missing: the folder to write")
    exporter.export(_MODEL.value, _OUT.value, _FORMAT.value)
    logging.info("Wrote %s in layout %s.", _OUT.value, get_layout(_FORMAT.value).name)
  elif not _VERIFY.value:
    names = ", ".join(LAYOUTS)
    raise ValueError(f"--format is missing: which released layout to write ({names})")
  if _VERIFY.value:
    _verify(_MODEL.value or _OUT.value, pathlib.Path(_VERIFY.value))


def _sources() -> importer.Sources:
  def file(flag) -> pathlib.Path | None:
    return pathlib.Path(flag.value) if flag.value else None

  return importer.Sources(
    folder=pathlib.Path(_SOURCE.value),
    vqgan=file(_VQGAN),
    wavtokenizer=file(_WAVTOKENIZER),
    tokenizer=file(_TOKENIZER),
    perception=file(_PERCEPTION),
    layout=_LAYOUT.value,
    swin_norm=_SWIN_NORM.value,
  )


def _verify(model: str, source: pathlib.Path) -> None:
  """Raises ValueError if the logits of model and source differ by more than --tolerance."""
  decoder = decoders.find_decoder(source, _LAYOUT.value, _SWIN_NORM.value)
  tokens = logits.fixed_prompt(decoder.config.vocab_size)
  logging.info("Computing logits of %s with transformers, layer by layer.", source)
  theirs = logits.torch_logits(decoder, tokens)
  ours = logits.stored_logits(model, tokens)
  difference = float(np.abs(ours - theirs).max())
  same = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
  logging.info(
    "Largest difference of logits %.2e (they go from %.2f to %.2f); likeliest ids equal: %.3f.",
    *(difference, theirs.min(), theirs.max(), same),
  )
  if not difference <= _TOLERANCE.value:
    raise ValueError(
      f"the logits of {model} differ from those of {source} by {difference:.2e}; --tolerance is "
      f"{_TOLERANCE.value:g}"
    )


def run() -> None:
  logs.run(main)


if __name__ == "__main__":
  run()
