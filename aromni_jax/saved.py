"""JSON files that say their version: what stands in one is read on by every later version.

`version` counts what a file may hold. Files from before it was written are version 1.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

_KINDS = {dict: "an object", str: "a text", int: "a whole number", list: "a list"}


def read(file: str | pathlib.Path, known: int) -> dict[str, Any]:
  """Returns the object in a JSON file.

  Args:
    file: must exist.
    known: the newest version that the caller can read.

  Raises:
    ValueError: naming the file, if it is no JSON object or of a newer version.
  """
  try:
    data = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))
  except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
    raise ValueError(f"{file} is not JSON: {e}") from e
  if not isinstance(data, dict):
    raise ValueError(f"{file} holds {_shown(data)}; expected a JSON object")
  with naming(file):
    check_version(data, known)
  return data


def check_version(data: Mapping[str, Any], known: int) -> None:
  """Raises ValueError if an object is of a version above `known`."""
  version = get(data, "version", int) if "version" in data else 1
  if not 1 <= version <= known:
    raise ValueError(
      f"version is {version}, and this aromni_jax knows versions up to {known}: made by a newer "
      "aromni_jax, upgrade to read it"
    )


def get(data: Mapping[str, Any], key: str, kind: type) -> Any:
  """Returns the value of a key. Raises ValueError if it is missing or not of a kind of `_KINDS`."""
  if key not in data:
    raise ValueError(f"{key} is missing; the file is damaged, or of another program")
  value = data[key]
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    raise ValueError(f"{key} is {_shown(value)}; expected {_KINDS[kind]}")
  return value


@contextlib.contextmanager
def naming(file: str | pathlib.Path) -> Iterator[None]:
  """Puts the name of a file before the message of a ValueError."""
  try:
    yield
  except ValueError as e:
    raise ValueError(f"{file}: {e}") from e


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) < 60 else f"{text[:60]} ..."
