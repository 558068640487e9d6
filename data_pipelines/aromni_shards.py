"""AR-Omni's training files -> token shards, and back; `import_aromni` and `export_aromni` are the
jobs."""

import itertools
import json
import os
import pathlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging

from aromni_jax.data import token_shards
from aromni_jax.data_pipelines import aromni_formats, sample_parts
from aromni_jax.sample import Sample
from aromni_jax.vocabulary import Vocabulary

_EVERY = 10.0  # seconds between lines of progress
_SETTINGS = "settings.json"  # in the folder of parts, what they were made with
_SHOWN = 3  # rejected lines of a file that are shown; the report has all


def import_files(
  source: str | os.PathLike,
  out: str | os.PathLike,
  vocabulary: Vocabulary,
  metadata: Mapping[str, Any],
  *,
  max_length: int | None = None,
  validation_fraction: float = 0.01,
  max_bad_fraction: float = 0.01,
) -> dict[str, Any]:
  """Writes token shards and returns their manifest.

  Args:
    source: a folder of .jsonl or .parquet files, or one file.
    out: folder to write.
    vocabulary: id space of the files.
    metadata: further entries of the manifest, such as fingerprints.
    max_length: JSONL samples must be shorter, parquet samples not longer; the released limits if
      None.
    validation_fraction: share of the samples that become the split "validation", chosen by a hash
      of their name, and at least one; 0 makes no such split.
    max_bad_fraction: share of the lines that may be wrong. Samples that are too long are not wrong:
      the released code leaves them out, too.

  Raises:
    FileExistsError: if `out` exists.
    ValueError: for too many wrong lines, no sample at all, or parts of another import.
    FileNotFoundError, ImportError: see `aromni_formats`.
  """
  for name, share in (
    ("validation_fraction", validation_fraction),
    ("max_bad_fraction", max_bad_fraction),
  ):
    if not 0 <= share <= 1:
      raise ValueError(f"--{name} is {share}; it must be a share, 0 <= x <= 1")
  directory = pathlib.Path(out).absolute()
  work = directory.with_name(directory.name + ".parts")
  if directory.exists() and (work / _SETTINGS).is_file():  # killed while cleaning up
    _remove(work)
    return token_shards.read_manifest(directory)
  if directory.exists():
    raise FileExistsError(f"--out={out} exists; remove it or name another folder")
  files = aromni_formats.find_files(source)
  kind = files[0].suffix
  max_length = aromni_formats.MAX_LENGTH[kind] if max_length is None else max_length
  _claim(work, {"vocabulary_fingerprint": vocabulary.fingerprint(), "max_length": max_length})
  parts = [_finish_part(work, file, vocabulary, max_length) for file in files]
  infos = [sample_parts.read_info(part) for part in parts]
  report = _join_reports(work, parts)
  rejected = sum((Counter(info["rejected"]) for info in infos), Counter())
  notes = sum((Counter(info["notes"]) for info in infos), Counter())
  if count := notes[aromni_formats.WITH_EOS]:
    logging.warning(
      "%d responses include eos. As in AR-Omni their length is taken as it is, though it counts no "
      "eos in the sequence: ids before the response count as response, too.",
      count,
    )
  _check_rejected(rejected, sum(info["lines"] for info in infos), max_bad_fraction, report)
  manifest = token_shards.write(
    directory,
    _splits(parts, validation_fraction, source),
    vocabulary,
    {
      **metadata,
      "recipe": "released",
      "source": f"AR-Omni {kind}",
      "max_length": max_length,
      "input_files": {i["source"]["file"]: {k: i[k] for k in ("lines", "samples")} for i in infos},
      "rejected": dict(sorted(rejected.items())),
      "notes": dict(sorted(notes.items())),
    },
    files={sample_parts.REJECTED: report},
  )
  _remove(work)
  return manifest


def _claim(work: pathlib.Path, settings: dict[str, Any]) -> None:
  """Makes the folder of parts, or checks that the parts in it were made with these settings."""
  work.mkdir(parents=True, exist_ok=True)
  file, partial = work / _SETTINGS, work / "settings.partial"
  if file.is_file():
    begun = json.loads(file.read_text())
    if begun != settings:
      raise ValueError(
        f"{work} holds parts of an import with {begun}, but now it is {settings}; give the same "
        "flags to go on, or remove that folder to begin again"
      )
    return
  if set(work.iterdir()) - {partial}:
    raise FileExistsError(f"{work} exists and holds no import's parts; rename it or change --out")
  partial.write_text(json.dumps(settings))
  partial.rename(file)


def _remove(work: pathlib.Path) -> None:
  """Removes the folder of parts; what says that it is one goes last."""
  shutil.rmtree(work / "files", ignore_errors=True)
  (work / sample_parts.REJECTED).unlink(missing_ok=True)
  shutil.rmtree(work)


def _finish_part(
  work: pathlib.Path, file: pathlib.Path, vocabulary: Vocabulary, max_length: int
) -> pathlib.Path:
  part = work / "files" / file.name
  if sample_parts.is_finished(part, file):
    logging.info("%s was read before.", file.name)
    return part
  began = shown = time.monotonic()

  def progress(lines: int, rejected: Counter) -> None:
    nonlocal shown
    now = time.monotonic()
    if now - shown >= _EVERY:
      shown = now
      speed = lines / (now - began)
      logging.info(
        "%s: %d lines, %d rejected, %.0f lines/s", file.name, lines, rejected.total(), speed
      )

  notes = Counter()
  lines = aromni_formats.read_file(file, vocabulary, max_length, notes)
  sample_parts.write(part, file, lines, progress=progress, notes=notes)
  info = sample_parts.read_info(part)
  logging.info("%s: %d lines, %d samples", file.name, info["lines"], info["samples"])
  return part


def _join_reports(work: pathlib.Path, parts: list[pathlib.Path]) -> pathlib.Path:
  """Returns the file of all rejected lines; the first of every input file are shown."""
  report = work / sample_parts.REJECTED
  with report.open("w") as out:
    for part in parts:
      with (part / sample_parts.REJECTED).open() as lines:
        for number, line in enumerate(lines):
          out.write(line)
          if number < _SHOWN:
            entry = json.loads(line)
            logging.warning("%s: %s: %s", entry["where"], entry["reason"], entry["message"])
  return report


def _check_rejected(
  rejected: Counter, lines: int, max_bad_fraction: float, report: pathlib.Path
) -> None:
  bad = rejected.total() - rejected[aromni_formats.TOO_LONG]
  reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(rejected.items()))
  if bad > max_bad_fraction * lines:
    raise ValueError(
      f"{bad} of {lines} lines are wrong ({reasons}), more than --max_bad_fraction="
      f"{max_bad_fraction} allows; nothing was written. {report} names each of them. Correct them, "
      "or raise --max_bad_fraction to leave them out"
    )
  if rejected.total() == lines:
    raise ValueError(f"none of {lines} lines is a sample ({reasons or 'the files are empty'})")


def _splits(
  parts: list[pathlib.Path], validation_fraction: float, source: str | os.PathLike
) -> dict[str, Iterator[Sample]]:
  names = np.concatenate([sample_parts.name_hashes(part) for part in parts])
  values, counts = np.unique(names, return_counts=True)
  repeated = values[counts > 1]
  if len(repeated):
    logging.warning(
      "%d ids stand on several lines of %s; these samples are named by file and line.",
      *(len(repeated), source),
    )
  limit = 0
  if validation_fraction:
    limit = max(round(validation_fraction * 2**64), int(values[0]) + 1)
  chosen = {"train": lambda hashes: ~_below(hashes, limit)}
  if limit:
    chosen["validation"] = lambda hashes: _below(hashes, limit)
  return {split: _read(parts, split, wanted, repeated) for split, wanted in chosen.items()}


def _below(hashes: np.ndarray, limit: int) -> np.ndarray:
  """Returns which of the uint64 hashes are below a limit of up to 2**64."""
  return hashes <= np.uint64(limit - 1) if limit else np.zeros(len(hashes), bool)


def _read(
  parts: list[pathlib.Path],
  split: str,
  wanted: Callable[[np.ndarray], np.ndarray],
  repeated: np.ndarray,
) -> Iterator[Sample]:
  written = 0
  for part in parts:
    for sample in sample_parts.read(part, wanted, repeated):
      yield sample
      written += 1
      logging.log_every_n_seconds(logging.INFO, "%s: %d samples written", _EVERY, split, written)


def export_split(
  shards: str | os.PathLike,
  split: str,
  out: str | os.PathLike,
  *,
  samples_per_file: int = 10_000,
  skip_others: bool = False,
) -> Counter:
  """Writes a split in files `<split>-00000.jsonl` ...; the folder appears only once it is whole.

  Args:
    shards: folder of token shards.
    split: its name.
    out: folder to write.
    samples_per_file: lines of a file.
    skip_others: leaves out what AR-Omni's JSONL cannot say, instead of raising.

  Returns:
    Counts: "written", "skipped", and "too_long", the written ones that AR-Omni's loader drops.

  Raises:
    FileExistsError: if `out` exists.
    ValueError: for a sample that cannot be written, or if none can.
  """
  if samples_per_file < 1:
    raise ValueError(f"--samples_per_file is {samples_per_file}; it must be at least 1")
  directory = pathlib.Path(out).absolute()
  if directory.exists():
    raise FileExistsError(f"--out={out} exists; remove it or name another folder")
  vocabulary = Vocabulary.from_dict(token_shards.read_manifest(shards)["vocabulary"])
  source = token_shards.TokenShards(shards, split, vocabulary)
  partial = directory.with_name(directory.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  counts = Counter()
  lines = _lines(source, vocabulary, skip_others, counts)
  for number, first in enumerate(lines):
    with (partial / f"{split}-{number:05d}.jsonl").open("w") as file:
      for line in itertools.chain([first], itertools.islice(lines, samples_per_file - 1)):
        file.write(line + "\n")
  if not counts["written"]:
    raise ValueError(f"{shards} ({split}) has no sample that AR-Omni's JSONL can hold")
  partial.rename(directory)
  return counts


def _lines(
  source: token_shards.TokenShards, vocabulary: Vocabulary, skip_others: bool, counts: Counter
) -> Iterator[str]:
  for sample in source:
    try:
      line = aromni_formats.to_line(sample, vocabulary)
    except ValueError as e:
      if not skip_others:
        raise ValueError(f"{source.directory} ({source.split}): {e}; --skip_others") from e
      counts["skipped"] += 1
      continue
    counts["written"] += 1
    counts["too_long"] += len(sample.tokens) >= aromni_formats.MAX_LENGTH[".jsonl"]
    yield line
    logging.log_every_n_seconds(
      logging.INFO, "%d of %d samples", _EVERY, counts.total() - counts["too_long"], len(source)
    )
