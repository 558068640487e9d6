"""Token shards: tokenised samples as a TFDS data set in ArrayRecord files, with a manifest.

`DIR/manifest.json` says what the tokens mean (vocabulary, fingerprints of the codecs, recipe) and
counts them; `DIR/<split>.npz` holds the length and task of every record, so that packing needs no
reading; `DIR/token_samples/<version>/` is the data set itself. Version 1.1.0 added the spans of
several responses; 1.0.0, where every sample has one, is still read.
"""

import json
import os
import pathlib
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from aromni_jax import compat, saved
from aromni_jax.sample import Sample
from aromni_jax.tasks import get_task, task_name
from aromni_jax.vocabulary import Vocabulary

_MANIFEST = "manifest.json"
MANIFEST_VERSION = 1  # manifests that do not say it are of version 1
_VERSION = "1.1.0"
_READABLE = (_VERSION, "1.0.0")


class TokenSamples(tfds.core.GeneratorBasedBuilder):
  """Writes samples that are handed over; `write` is the entry."""

  VERSION = tfds.core.Version(_VERSION)

  def __init__(self, splits: Mapping[str, Iterable[Sample]], **options):
    self._splits = splits
    super().__init__(file_format="array_record", **options)

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      "tokens": tfds.features.Tensor(
        shape=(None,), dtype=np.int32, encoding=tfds.features.Encoding.BYTES
      ),
      "task": np.int32,
      "response_start": np.int32,
      # start, stop, start, stop ...; empty for the one response that runs to the end.
      "response_spans": tfds.features.Tensor(
        shape=(None,), dtype=np.int32, encoding=tfds.features.Encoding.BYTES
      ),
      "key": tfds.features.Text(),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _example_writer(self) -> tfds.core.ExampleWriter:
    return compat.deterministic_writer(self.info.file_format)

  def _split_generators(self, dl_manager):
    del dl_manager
    return {n: self._generate_examples(n, samples) for n, samples in self._splits.items()}

  def _generate_examples(self, split, samples):
    sample, one = None, np.zeros(0, np.int32)
    for sample in samples:
      spans = sample.response_spans
      yield (
        f"{sample.task}/{sample.key}",
        {
          "tokens": sample.tokens,
          "task": get_task(sample.task).id,
          "response_start": sample.response_start,
          "response_spans": one if spans is None else np.asarray(spans, np.int32).ravel(),
          "key": sample.key,
        },
      )
    if sample is None:
      raise ValueError(f"split {split!r} of {self.data_dir} is empty; no token shards were written")


def write(
  directory: str | os.PathLike,
  splits: Mapping[str, Iterable[Sample]],
  vocabulary: Vocabulary,
  metadata: Mapping[str, Any],
  files: Mapping[str, pathlib.Path] | None = None,
) -> dict[str, Any]:
  """Writes a data set; the directory appears only once it is whole. Equal samples give equal
  bytes.

  Args:
    directory: must not exist yet.
    splits: name -> samples; keys are unique within a task.
    vocabulary: id space of the tokens.
    metadata: further entries of the manifest (codec fingerprints, recipe ...).
    files: name -> file that is copied beside the manifest.

  Returns:
    The manifest.

  Raises:
    FileExistsError: if the directory exists.
    ValueError: for an empty split.
  """
  directory = pathlib.Path(directory).absolute()
  if directory.exists():
    raise FileExistsError(f"{directory} exists; remove it or name another folder")
  partial = directory.with_name(directory.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)
  TokenSamples(splits, data_dir=str(partial)).download_and_prepare()
  shutil.rmtree(partial / "downloads", ignore_errors=True)
  manifest = {
    "version": MANIFEST_VERSION,
    "vocabulary": vocabulary.to_dict(),
    "vocabulary_fingerprint": vocabulary.fingerprint(),
    **metadata,
    "splits": {},
  }
  for name in splits:
    lengths, tasks = _index(_open(partial, name), name)
    np.savez(partial / f"{name}.npz", length=lengths, task=tasks)
    counts = Counter(tasks.tolist())
    manifest["splits"][name] = {
      "samples": len(lengths),
      "tokens": int(lengths.sum()),
      "longest": int(lengths.max()),
      "samples_of_task": {task_name(t): counts[t] for t in sorted(counts)},
      "tokens_of_task": {task_name(t): int(lengths[tasks == t].sum()) for t in sorted(counts)},
    }
  for name, file in (files or {}).items():
    shutil.copyfile(file, partial / name)
  (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1))
  partial.rename(directory)
  return manifest


def _index(source, split: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the lengths int32[n] and task ids int8[n] of all records."""
  lengths, tasks = np.zeros(len(source), np.int32), np.zeros(len(source), np.int8)
  for number, record in enumerate(source):
    lengths[number], tasks[number] = len(record["tokens"]), record["task"]
    logging.log_every_n_seconds(
      logging.INFO, "%s: %d of %d samples indexed", 10, split, number, len(source)
    )
  return lengths, tasks


def _read_index(file: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """Returns what `_index` gave, from its file."""
  try:
    with np.load(file) as index:
      return index["length"], index["task"]
  except FileNotFoundError as e:
    raise FileNotFoundError(f"{file} is missing; tokenise again") from e
  except Exception as e:  # of zip and NumPy: of many kinds
    raise ValueError(f"{file} is damaged, tokenise again ({e})") from e


class TokenShards:
  """One split, by record number.

  Attributes:
    manifest: contents of manifest.json.
    lengths: int32[n], tokens of every record.
    tasks: int8[n], task ids.

  Args:
    directory: what `write` made.
    split: its name.
    vocabulary: the id space that the model uses.
    codecs: name -> fingerprint of codecs that must agree with the manifest's.

  Raises:
    FileNotFoundError: if there is no manifest or no such split.
    ValueError: if the shards were made with another vocabulary or codec, or are damaged.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    split: str,
    vocabulary: Vocabulary,
    codecs: Mapping[str, str] | None = None,
  ):
    self.directory, self.split = pathlib.Path(directory), split
    self.manifest = read_manifest(directory)
    if split not in self.manifest["splits"]:
      raise FileNotFoundError(
        f"{directory} has no split {split!r}; it has {', '.join(self.manifest['splits'])}"
      )
    wanted = {"vocabulary": vocabulary.fingerprint(), **(codecs or {})}
    for name, fingerprint in wanted.items():
      found = self.manifest.get(f"{name}_fingerprint")
      if found is None:
        raise ValueError(
          f"{directory} does not say which {name} its tokens are of, but the model has "
          f"{fingerprint}; shards that were imported without a model cannot be checked: import "
          "them again with --model (aromni import_aromni)"
        )
      if found != fingerprint:
        raise ValueError(
          f"{directory} was made with {name} {found}, but the model has {fingerprint}; "
          "tokenise again with this model's files (aromni tokenize)"
        )
    self.lengths, self.tasks = _read_index(self.directory / f"{split}.npz")
    try:
      self._source = _open(self.directory, split)
    except Exception as e:
      raise ValueError(f"the ArrayRecord files of {directory} cannot be opened: {e}") from e
    if len(self._source) != len(self.lengths):
      raise ValueError(
        f"{directory}: split {split!r} holds {len(self._source)} records, its index "
        f"{len(self.lengths)}; the files are damaged or mixed, tokenise again"
      )

  def __len__(self) -> int:
    return len(self.lengths)

  def __getitem__(self, index: int) -> Sample:
    try:
      record = self._source[int(index)]
    except Exception as e:
      raise ValueError(
        f"record {index} of split {self.split!r} in {self.directory} cannot be read; "
        f"the ArrayRecord file is damaged, tokenise again ({e})"
      ) from e
    tokens = np.asarray(record["tokens"], np.int32)
    if len(tokens) != self.lengths[index]:
      raise ValueError(
        f"record {index} of split {self.split!r} in {self.directory} has {len(tokens)} tokens, its "
        f"index says {self.lengths[index]}; the files are damaged or mixed, tokenise again"
      )
    spans = np.asarray(record.get("response_spans", ()), np.int32).reshape(-1, 2)
    return Sample(
      tokens,
      task_name(int(record["task"])),
      int(record["response_start"]),
      record["key"].decode(),
      spans if len(spans) else None,
    )

  def __iter__(self) -> Iterator[Sample]:
    return (self[i] for i in range(len(self)))


def read_manifest(directory: str | os.PathLike) -> dict[str, Any]:
  """Returns the manifest.

  Raises:
    FileNotFoundError: without one, saying how shards are made.
    ValueError: naming the file, if it is damaged or of a newer version.
  """
  path = pathlib.Path(directory) / _MANIFEST
  if not path.is_file():
    raise FileNotFoundError(
      f"{directory} holds no token shards (no {_MANIFEST}); make them with aromni tokenize"
    )
  manifest = saved.read(path, MANIFEST_VERSION)
  with saved.naming(path):
    saved.get(manifest, "splits", dict)
  return manifest


def _open(directory: pathlib.Path, split: str):
  root = directory / "token_samples"
  version = next((v for v in _READABLE if (root / v).is_dir()), None)
  if version is None:
    raise FileNotFoundError(f"{root} has none of the versions {', '.join(_READABLE)}")
  return tfds.builder_from_directory(str(root / version)).as_data_source(split)
