"""Released files -> a model directory, tensor by tensor, with a certificate beside it."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import logging

from aromni_jax import __version__, model_dir, storage
from aromni_jax.codecs import image_vq
from aromni_jax.convert import codecs, decoders, sources
from aromni_jax.convert import logits as logits_lib
from aromni_jax.convert.decoders import VQ_PREFIX, ReleasedDecoder
from aromni_jax.convert.sources import Tensors
from aromni_jax.convert.tokenizer import read_vocabulary
from aromni_jax.recipes import RELEASED, Recipe
from aromni_jax.vocabulary import Vocabulary

CERTIFICATE = "certificate.json"
_TOKENIZERS = ("tokenizer/text_tokenizer.json", "text_tokenizer.json", "tokenizer.json")
_VQGANS = ("tokenizer/vqgan.ckpt", "vqgan.ckpt")
_WAVTOKENIZERS = ("WavTokenizer*.ckpt", "wavtokenizer*.ckpt")
_PERCEPTIONS = ("perception.ckpt",)


@dataclasses.dataclass(frozen=True)
class Sources:
  """Where the released files are; what is None is looked for in `folder`.

  Attributes:
    folder: of the decoder. vqgan, wavtokenizer, tokenizer, perception: single files.
    layout: name of the decoder's layout to take where the folder has two.
    swin_norm: norm placement where no configuration file states it.
  """

  folder: pathlib.Path
  vqgan: pathlib.Path | None = None
  wavtokenizer: pathlib.Path | None = None
  tokenizer: pathlib.Path | None = None
  perception: pathlib.Path | None = None
  layout: str | None = None
  swin_norm: bool | None = None


def convert(given: Sources, out: str | pathlib.Path, *, recipe: Recipe = RELEASED) -> dict:
  """Writes the model directory `out` and returns its certificate.

  Everything is checked before the first byte is written. The directory appears once it is whole;
  until then the files are in `OUT.partial`, which is removed if anything fails.

  Args:
    given: released files.
    out: must not exist, or be empty.
    recipe: prompts and rules of decoding.

  Raises:
    FileNotFoundError, ValueError, ImportError: for wrong input, see `decoders`, `codecs`,
      `tokenizer`.
    OSError: if the disk has too little room.
  """
  out = pathlib.Path(out)
  check_empty(out)
  tokenizer = given.tokenizer or _look_for(given.folder, _TOKENIZERS)
  if tokenizer is None:
    raise FileNotFoundError(
      f"{given.folder} has no tokenizer; expected one of {', '.join(_TOKENIZERS)}, or name it with "
      "--tokenizer"
    )
  vocabulary = read_vocabulary(tokenizer)
  decoder = decoders.find_decoder(given.folder, given.layout, given.swin_norm)
  if decoder.config.vocab_size != vocabulary.size:
    raise ValueError(
      f"the decoder has {decoder.config.vocab_size} ids, {tokenizer} has {vocabulary.size}"
    )
  params, mapping = decoders.leaves(decoder)
  total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  check_room(out, total)
  certificate = {
    "aromni_jax": __version__,
    "layout": decoder.layout.name,
    "recipe": recipe.name,
    "decoder": dataclasses.asdict(decoder.config),
    "vocabulary": {
      "ids": vocabulary.size,
      "text": [vocabulary.text.start, vocabulary.text.stop],
      "image": [vocabulary.image.start, vocabulary.image.stop],
      "speech": [vocabulary.speech.start, vocabulary.speech.stop],
      "special": vocabulary.special_ids,
    },
    "mapped": mapping,
    "skipped": dict(decoder.skipped),
  }
  files = {*decoder.files, tokenizer, *(t.file for t in decoder.tensors.values())}
  with whole(out) as partial:
    model_dir.create(partial, vocabulary, recipe)
    shutil.copy(tokenizer, partial / "tokenizer.json")
    files |= _convert_codecs(given, decoder, vocabulary, partial, certificate)
    logging.info(
      "Converting a decoder of layout %s, %d tensors, %.2f GB.",
      *(decoder.layout.name, len(mapping), total / 1e9),
    )
    storage.save_streamed(partial / "decoder", params, progress(total))
    model_dir.note_decoder(partial, decoder.config)
    logging.info("Computing logits of a fixed prompt, layer by layer.")
    prompt = logits_lib.fixed_prompt(vocabulary.size)
    result = logits_lib.stored_logits(partial, prompt)
    if not np.isfinite(result).all():
      raise ValueError("the logits of the fixed prompt are not finite; the weights are damaged")
    certificate["logits"] = {"prompt": prompt.tolist(), "positions": logits_lib.digest(result)}
    logging.info("Hashing %d source files.", len(files))
    certificate["files"] = {
      _shown(f, given.folder): {"bytes": f.stat().st_size, "sha256": sources.file_hash(f)}
      for f in sorted(files)
    }
    (partial / CERTIFICATE).write_text(json.dumps(certificate, indent=1) + "\n")
  return certificate


def _convert_codecs(
  given: Sources,
  decoder: ReleasedDecoder,
  vocabulary: Vocabulary,
  partial: pathlib.Path,
  certificate: dict,
) -> set[pathlib.Path]:
  """Writes the codecs that the files have, notes them, and returns the files."""
  files: set[pathlib.Path] = set()
  image: image_vq.ImageVQ | None = None
  file = given.vqgan or _look_for(given.folder, _VQGANS)
  tensors, where, prefix = decoder.vq, "the decoder's files (model.vqmodel)", VQ_PREFIX
  if file is not None:
    tensors, where, prefix = sources.read_file(file), str(file), ""
    files.add(file)
    _check_same_vq(decoder.vq, tensors, file)
  if tensors:
    image, skipped = codecs.image_codec(tensors, where, vocabulary)
    _save_codec(partial, "image_codec", image, tensors, skipped, prefix, certificate)
    yaml = file.with_suffix(".yaml") if file else None
    if yaml is not None and yaml.is_file():
      codecs.check_vqgan_yaml(yaml, image.config)
      files.add(yaml)
    if not image.config.has_decoder:
      logging.warning(
        "The image codec has no pixel decoder: pictures can be read, not drawn. Hugging Face "
        "leaves it out; convert with --vqgan=vqgan.ckpt."
      )
  else:
    logging.warning("No image codec found; give it with --vqgan to use pictures.")
  if decoder.vq and file is not None:
    reason = f"{file.name} holds the whole image codec"
    certificate["skipped"] |= {VQ_PREFIX + n: reason for n in decoder.vq}
  file = given.wavtokenizer or _look_for(given.folder, _WAVTOKENIZERS)
  if file is not None:
    tensors = sources.read_file(file)
    codec, skipped = codecs.speech(tensors, str(file), vocabulary)
    _save_codec(partial, "speech_codec", codec, tensors, skipped, "", certificate)
    files.add(file)
  else:
    logging.warning("No speech codec found; give it with --wavtokenizer to use speech.")
  file = given.perception or _look_for(given.folder, _PERCEPTIONS)
  if file is not None:
    table = codecs.perception_table(file, image)
    if table is not None:
      storage.save_params(partial / "perception", {"table": table})
    certificate["perception"] = "the codebook" if table is None else "another table, kept"
    files.add(file)
  return files


def _check_same_vq(ours: Tensors, theirs: Tensors, file: pathlib.Path) -> None:
  """Raises ValueError if the image encoder among the decoder's files is not that of `file`."""
  for name in ours.keys() & theirs.keys():
    a, b = ours[name].read(), theirs[name].read()
    if a.shape != b.shape or (a != b.astype(a.dtype)).any():
      raise ValueError(
        f"{file} is not the image codec that the decoder was trained with: {name} differs from "
        f"{VQ_PREFIX}{name} in {ours[name].file}"
      )


def _shown(file: pathlib.Path, folder: pathlib.Path) -> str:
  return str(file.relative_to(folder)) if file.is_relative_to(folder) else file.name


def _save_codec(partial, name, codec, tensors, skipped, prefix, certificate) -> None:
  used = [t for n, t in tensors.items() if n not in skipped]
  dtype = "bfloat16" if all(t.dtype.name == "bfloat16" for t in used) else "float32"
  model_dir.save_codec(partial, name, codec, dtype)
  folded = [n for n in skipped if n.endswith(".*")]
  hidden = tuple(n.removesuffix("*") for n in folded)
  certificate["mapped"] |= {
    prefix + n: name for n in tensors if n not in skipped and not (hidden and n.startswith(hidden))
  }
  certificate["skipped"] |= {prefix + n: why for n, why in skipped.items()}


def _look_for(folder: pathlib.Path, patterns: tuple[str, ...]) -> pathlib.Path | None:
  """The file of the first pattern that has one. Raises ValueError where it has several."""
  for pattern in patterns:
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
      names = ", ".join(f.name for f in found)
      raise ValueError(f"{folder} has {names}; name the one to use on the command line")
    if found:
      return found[0]
  return None


@contextlib.contextmanager
def whole(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives the folder `OUT.partial` to fill; it becomes `out`, new or empty, or is removed if
  anything fails."""
  partial = out.with_name(out.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    yield partial
    if out.exists():
      out.rmdir()  # empty, or this fails
    partial.rename(out)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def check_empty(out: pathlib.Path) -> None:
  """Raises ValueError if `out` is not a new or empty folder."""
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise ValueError(f"--out {out} is not empty; name a new folder")


def check_room(out: pathlib.Path, needed: int) -> None:
  """Raises OSError if the disk of `out` has fewer free bytes than needed."""
  parent = out.absolute().parent
  while not parent.exists():
    parent = parent.parent
  free = shutil.disk_usage(parent).free
  if free < needed:
    raise OSError(
      f"the disk of --out {out} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed"
    )


def progress(total: int) -> Callable[[int], None]:
  """Returns what is called with written bytes and logs every few seconds how far it is."""
  start, done = time.monotonic(), 0

  def on_piece(size: int) -> None:
    nonlocal done
    done += size
    seconds = time.monotonic() - start
    logging.log_every_n_seconds(
      logging.INFO,
      "%.2f of %.2f GB (%.0f %%), %.0f s left",
      5,
      *(done / 1e9, total / 1e9, 100 * done / total, seconds * (total - done) / done),
    )

  return on_piece
