"""Finished parts of an import: one folder per input file, so that a killed import goes on.

A part appears only once it is whole. `part.json` says what it was made of and counts lines,
samples, notes and reasons; `rejected.jsonl` has a line for every line that is no sample;
`00000.npz`, `00001.npz` ... hold the samples, a few thousand in each, so memory never holds a file.
"""

import hashlib
import itertools
import json
import pathlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from aromni_jax.data_pipelines.aromni_formats import BadLine
from aromni_jax.sample import Sample
from aromni_jax.tasks import get_task, task_name

REJECTED = "rejected.jsonl"
_INFO = "part.json"
_CHUNK = 4096  # samples


def identity(path: pathlib.Path) -> dict[str, Any]:
  """Returns what tells whether an input file is still the one that a part was made of."""
  stat = path.stat()
  return {"file": path.name, "bytes": stat.st_size, "modified": stat.st_mtime_ns}


def is_finished(part: pathlib.Path, source: pathlib.Path) -> bool:
  """Returns whether a part is whole and was made of this input file as it is now."""
  return (part / _INFO).is_file() and read_info(part)["source"] == identity(source)


def read_info(part: pathlib.Path) -> dict[str, Any]:
  """Returns part.json: "source", "lines", "samples"; "rejected" and "notes" -> count."""
  return json.loads((part / _INFO).read_text())


def write(
  part: pathlib.Path,
  source: pathlib.Path,
  lines: Iterable[tuple[int, Sample | BadLine]],
  progress: Callable[[int, Counter], None],
  notes: Counter,
) -> None:
  """Writes a part.

  Args:
    part: folder; an older one is replaced.
    source: the input file.
    lines: what the file holds, line by line.
    progress: called with the lines so far and the rejected ones by reason after every line.
    notes: what `lines` has counted when it ends.
  """
  partial = part.with_name(part.name + ".partial")
  for old in (partial, part):
    shutil.rmtree(old, ignore_errors=True)
  partial.mkdir(parents=True)
  made_of, rejected, number = identity(source), Counter(), 0
  chunk: list[tuple[int, Sample]] = []
  numbers = itertools.count()
  with (partial / REJECTED).open("w") as report:
    for number, item in lines:
      if isinstance(item, BadLine):
        rejected[item.reason] += 1
        where = f"{source.name}:{number}"
        entry = {"where": where, "reason": item.reason, "message": str(item)}
        report.write(json.dumps(entry) + "\n")
      else:
        chunk.append((number, item))
        if len(chunk) == _CHUNK:
          _save(partial / f"{next(numbers):05d}.npz", source.name, chunk)
          chunk = []
      progress(number, rejected)
  if chunk:
    _save(partial / f"{next(numbers):05d}.npz", source.name, chunk)
  counts = {"lines": number, "samples": number - rejected.total(), "rejected": dict(rejected)}
  counts["notes"] = {note: count for note, count in notes.items() if count}
  (partial / _INFO).write_text(json.dumps({"source": made_of, **counts}))
  partial.rename(part)


def name_hashes(part: pathlib.Path) -> np.ndarray:
  """Returns uint64[n], a hash of the name of every sample: its id, or file:line without one."""
  chunks = [np.load(file)["name_hash"] for file in sorted(part.glob("*.npz"))]
  return np.concatenate([np.zeros(0, np.uint64), *chunks])


def read(
  part: pathlib.Path, wanted: Callable[[np.ndarray], np.ndarray], repeated: np.ndarray
) -> Iterator[Sample]:
  """Yields samples of a part, in the order of the input file; keys are ids, or file:line.

  Args:
    part: folder.
    wanted: name hashes uint64[n] -> bool[n], which samples.
    repeated: uint64[k], hashes of the ids that several samples have; these get file:line.
  """
  source = read_info(part)["source"]["file"]
  for file in sorted(part.glob("*.npz")):
    chunk = np.load(file)
    hashes = chunk["name_hash"]
    chosen = wanted(hashes)
    if not chosen.any():
      continue
    yield from _samples(chunk, source, chosen, np.isin(hashes, repeated))


def _save(path: pathlib.Path, source: str, chunk: list[tuple[int, Sample]]) -> None:
  samples = [sample for _, sample in chunk]
  none = np.zeros((0, 2), np.int32)
  spans = [none if s.response_spans is None else s.response_spans for s in samples]
  names = [sample.key or f"{source}:{line}" for line, sample in chunk]
  np.savez(
    path,
    tokens=np.concatenate([s.tokens for s in samples]),
    length=np.array([len(s.tokens) for s in samples]),
    task=np.array([get_task(s.task).id for s in samples]),
    response_start=np.array([s.response_start for s in samples]),
    spans=np.concatenate(spans),
    span_count=np.array([len(s) for s in spans]),
    line=np.array([line for line, _ in chunk]),
    ids=np.frombuffer(json.dumps([s.key for s in samples]).encode(), np.uint8),
    name_hash=np.array([_hash(name) for name in names], np.uint64),
  )


def _samples(chunk, source: str, chosen: np.ndarray, nameless: np.ndarray) -> Iterator[Sample]:
  chunk = {name: chunk[name] for name in chunk.files}  # each access to the file reads it again
  ids = json.loads(chunk["ids"].tobytes())
  tokens = np.split(chunk["tokens"], np.cumsum(chunk["length"])[:-1])
  spans = np.split(chunk["spans"], np.cumsum(chunk["span_count"])[:-1])
  for i in np.flatnonzero(chosen):
    yield Sample(
      tokens[i],
      task_name(int(chunk["task"][i])),
      int(chunk["response_start"][i]),
      f"{source}:{chunk['line'][i]}" if nameless[i] or not ids[i] else ids[i],
      spans[i] if len(spans[i]) else None,
    )


def _hash(name: str) -> int:
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
