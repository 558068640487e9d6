"""The files that AR-Omni trains on, one line or row at a time.

Pre-training is JSONL: `discrete_code` (the whole sequence of ids), `task`, and perhaps `response`
(a list of which only the length counts; null or none at all is an empty one) and `id`. The
instruction data are parquet: `input_ids`, `labels` (-100 where nothing is predicted) and perhaps
`id`.
"""

import functools
import json
import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from aromni_jax.sample import Sample
from aromni_jax.tasks import TASKS
from aromni_jax.vocabulary import Vocabulary

# Names that the released pre-training code knows.
OFFICIAL_TASKS = tuple(name for name, task in TASKS.items() if task.released)
IGNORED = -100  # label of an id that is not predicted
# The released loaders keep JSONL samples that are shorter, and parquet samples that are not longer.
MAX_LENGTH = {".jsonl": 1300, ".parquet": 2048}
TOO_LONG = "too_long"  # the one reason that the released loaders expect
WITH_EOS = "response_with_eos"  # a note on lines that are samples
_FIELDS = ("discrete_code", "task", "response")
_ROWS = 256  # of a parquet file in memory at once


class BadLine(ValueError):
  """Why a line is no sample.

  Attributes:
    reason: one word, to count by.
  """

  def __init__(self, reason: str, message: str):
    super().__init__(message)
    self.reason = reason


def find_files(source: str | pathlib.Path) -> list[pathlib.Path]:
  """Returns the files of a folder in the order of their names, or the one file that is named.

  Raises:
    FileNotFoundError: if there is no such file or folder, or the folder has none.
    ValueError: for a file of another kind, or a folder with both kinds.
  """
  source = pathlib.Path(source)
  if not source.exists():
    raise FileNotFoundError(f"--source={source} does not exist")
  files = sorted(source.iterdir()) if source.is_dir() else [source]
  files = [f for f in files if f.suffix in MAX_LENGTH and not f.is_dir()]
  if not files:
    raise FileNotFoundError(f"--source={source} holds no .jsonl or .parquet file")
  if len({f.suffix for f in files}) > 1:
    raise ValueError(f"--source={source} holds .jsonl and .parquet files; import them one by one")
  return files


def read_file(
  path: pathlib.Path, vocabulary: Vocabulary, max_length: int, notes: Counter
) -> Iterator[tuple[int, Sample | BadLine]]:
  """Yields every line or row by its number, from 1: a sample, or why it is none.

  A sample's key is its `id`, or empty if it has none. Memory holds a line, or a few rows.

  Args:
    path: a .jsonl or .parquet file.
    vocabulary: id space of the file.
    max_length: see `MAX_LENGTH`.
    notes: counts what is odd about samples, see `parse_line`.

  Raises:
    ValueError: for a file that is no parquet file or lacks its columns.
    ImportError: if parquet is asked for without pyarrow.
  """
  read, parse = {
    ".jsonl": (_lines, functools.partial(parse_line, notes=notes)),
    ".parquet": (_rows, parse_row),
  }[path.suffix]
  for number, raw in enumerate(read(path), 1):
    try:
      yield number, parse(raw, vocabulary, max_length)
    except BadLine as bad:
      yield number, bad


def parse_line(line: bytes, vocabulary: Vocabulary, max_length: int, *, notes: Counter) -> Sample:
  """Returns the sample of a JSONL line; its response begins where `tail_start` says.

  A `response` that includes eos counts as `WITH_EOS` in `notes`. Its length is taken as it is, as
  in AR-Omni, so ids before it count as response, too.

  Raises:
    BadLine: if the line is not as described above, or not shorter than `max_length`.
  """
  try:
    record = json.loads(line.decode())
  except (ValueError, RecursionError) as e:
    raise BadLine("not_json", f"not JSON ({e}); expected one object per line") from e
  if not isinstance(record, dict):
    raise BadLine("wrong_type", f"the line is a {type(record).__name__}; expected an object")
  for field in _FIELDS[:2]:
    if field not in record:
      raise BadLine("missing_field", f"no field {field}; expected {' and '.join(_FIELDS[:2])}")
  codes, task, response = (record.get(field) for field in _FIELDS)
  response = response or []
  if not isinstance(codes, list) or not set(map(type, codes)) <= {int}:
    raise BadLine("wrong_type", "discrete_code must be a list of integers")
  if not isinstance(task, str) or not isinstance(response, list):
    raise BadLine("wrong_type", "task must be a string and response a list")
  if task not in OFFICIAL_TASKS:
    names = ", ".join(OFFICIAL_TASKS)
    raise BadLine("unknown_task", f"task {task!r} does not exist; expected one of {names}")
  if len(codes) >= max_length:
    raise BadLine(TOO_LONG, f"discrete_code has {len(codes)} ids; expected less than {max_length}")
  tokens = _check_ids("discrete_code", codes, vocabulary)
  start = tail_start(tokens, len(response), vocabulary.eos)
  sample = Sample(tokens, task, start, _key(record.get("id")))
  notes[WITH_EOS] += vocabulary.eos in response
  return sample


def parse_row(row: dict[str, Any], vocabulary: Vocabulary, max_length: int) -> Sample:
  """Returns the dialogue of a parquet row; its responses are the runs of labels.

  Raises:
    BadLine: if the row is not as described above, or longer than `max_length`.
  """
  for field in ("input_ids", "labels"):
    if row[field] is None:
      raise BadLine("missing_field", f"{field} is null")
    if None in row[field]:
      raise BadLine("wrong_type", f"{field} holds a null; expected integers")
  if len(row["input_ids"]) > max_length:
    raise BadLine(
      TOO_LONG, f"input_ids has {len(row['input_ids'])} ids; expected {max_length} at most"
    )
  tokens = _check_ids("input_ids", row["input_ids"], vocabulary)
  labels = np.array(row["labels"], np.int64)
  if len(labels) != len(tokens):
    raise BadLine("labels_length", f"{len(labels)} labels of {len(tokens)} input_ids")
  predicted = labels != IGNORED
  wrong = np.flatnonzero(predicted & (labels != tokens))
  if len(wrong):
    at = wrong[0]
    raise BadLine(
      "labels_differ",
      f"labels[{at}] is {labels[at]}; expected {IGNORED} or input_ids[{at}], {tokens[at]}",
    )
  if not predicted[1:].any():  # nothing stands before the first id to predict it from
    raise BadLine("no_labels", f"every label is {IGNORED}; expected a response")
  spans = runs(predicted)
  whole = len(spans) == 1 and spans[0, 1] == len(tokens)
  key = _key(row.get("id"))
  return Sample(tokens, "dialogue", int(spans[0, 0]), key, None if whole else spans)


def tail_start(tokens: np.ndarray, length: int, eos: int) -> int:
  """Returns where a response of so many ids begins among int32[n] ids.

  As in AR-Omni, a response is the last `length` ids that are predicted (all but the first one) and
  are not eos, whatever follows or lacks at the end. One of no ids begins behind the last id.

  Raises:
    BadLine: if there are not so many.
  """
  counted = np.flatnonzero(tokens[1:] != eos) + 1
  if length > len(counted):
    raise BadLine(
      "response_too_long", f"response has {length} ids; the sequence has {len(counted)} but eos"
    )
  return int(counted[-length]) if length else len(tokens)


def runs(mask: np.ndarray) -> np.ndarray:
  """Returns int32[k, 2], [start, stop) of the runs of True in bool[n]."""
  edges = np.diff(np.concatenate([[0], mask.astype(np.int8), [0]]))
  return np.flatnonzero(edges).astype(np.int32).reshape(-1, 2)


def to_line(sample: Sample, vocabulary: Vocabulary) -> str:
  """Returns the JSONL line of a sample, which `parse_line` reads as the same sample; a response of
  eos alone it reads as an empty one.

  Raises:
    ValueError: for a task that AR-Omni has no name for, or responses of several spans or not at the
      end.
  """
  if sample.task not in OFFICIAL_TASKS:
    raise ValueError(
      f"sample {sample.key!r} has task {sample.task}, for which AR-Omni's JSONL has no name; "
      f"it has {', '.join(OFFICIAL_TASKS)}"
    )
  if sample.response_spans is not None:
    raise ValueError(
      f"sample {sample.key!r} has responses {sample.response_spans.tolist()}; AR-Omni's JSONL has "
      "one response, at the end"
    )
  tokens = np.asarray(sample.tokens)
  response = tokens[max(sample.response_start, 1) :]
  response = response[response != vocabulary.eos]
  codes, response = tokens.tolist(), response.tolist()
  record = dict(zip(_FIELDS, (codes, sample.task, response), strict=True)) | {"id": sample.key}
  return json.dumps(record, ensure_ascii=False)


def _check_ids(field: str, ids: list[int], vocabulary: Vocabulary) -> np.ndarray:
  if not ids:
    raise BadLine("empty", f"{field} is empty")
  for name, extreme in (("smallest", min(ids)), ("largest", max(ids))):
    if not 0 <= extreme < vocabulary.size:
      raise BadLine(
        "out_of_vocabulary",
        f"the {name} id of {field} is {extreme}; vocabulary {vocabulary.name} has "
        f"0..{vocabulary.size - 1}",
      )
  return np.array(ids, np.int32)


def _key(value: Any) -> str:
  if value is None:
    return ""
  if isinstance(value, bool) or not isinstance(value, str | int):
    raise BadLine("wrong_type", f"id is {value!r}; expected a string or an integer")
  try:
    return str(value).encode().decode()
  except UnicodeEncodeError as e:
    raise BadLine("wrong_type", f"id {value!r} is no Unicode text: {e}") from e


def _lines(path: pathlib.Path) -> Iterator[bytes]:
  with path.open("rb") as file:
    yield from file


def _rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  try:
    import pyarrow as pa
    from pyarrow import parquet
  except ImportError as e:
    raise ImportError(
      f"{path}: parquet is read with pyarrow; install it: pip install 'aromni_jax[parquet]'"
    ) from e
  try:
    with parquet.ParquetFile(path) as file:
      schema = file.schema_arrow
      for name in ("input_ids", "labels"):
        kind = schema.field(name).type if name in schema.names else None
        lists = kind is not None and (pa.types.is_list(kind) or pa.types.is_large_list(kind))
        if not lists or not pa.types.is_integer(kind.value_type):
          raise ValueError(
            f"{path}: column {name} is {kind or 'missing'}; expected lists of integers"
          )
      columns = [c for c in ("input_ids", "labels", "id") if c in schema.names]
      for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
        yield from batch.to_pylist()
  except pa.ArrowException as e:
    raise ValueError(f"{path} cannot be read as parquet: {e}") from e
