"""What a model can be measured on. A new suite is a module with a `SUITE`, and a line here."""

import dataclasses
import importlib
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from aromni_jax.model import Model


@dataclasses.dataclass(frozen=True)
class Suite:
  """Cases, referees, ceilings and columns.

  Attributes:
    presets, splits: of its data.
    load: (data_dir, preset, split, limit) -> items; at most `limit`, always the same ones, if it
      is not 0. Raises FileNotFoundError, saying how the data are made, if they are not there.
    evaluate: (model, items, preset=, seed=) -> figures {"rows": ..., "ceilings": ...}, and what was
      answered.
    examples: (folder, model, items, answered, count) -> an index of the examples that it wrote.
    describe: model -> what the figures depend on besides data and seed.
    table: figures' rows -> aligned text.
  """

  presets: Sequence[str]
  splits: Sequence[str]
  load: Callable[[str, str, str, int], Sequence[Any]]
  evaluate: Callable[..., tuple[dict[str, Any], Any]]
  examples: Callable[[pathlib.Path, "Model", Sequence[Any], Any, int], list[dict[str, Any]]]
  describe: Callable[["Model"], dict[str, Any]]
  table: Callable[[Any], str]


# Name -> module, which is loaded when the suite is asked for.
SUITES = {"pictotalk": "aromni_jax.pictotalk.suite"}


def get_suite(name: str, preset: str, split: str) -> Suite:
  """Returns a suite. Raises ValueError for a name, preset or split that does not exist."""
  if name not in SUITES:
    raise ValueError(f"--suite={name} does not exist; expected one of {', '.join(SUITES)}")
  suite = importlib.import_module(SUITES[name]).SUITE
  for flag, value, choices in (("config", preset, suite.presets), ("split", split, suite.splits)):
    if value not in choices:
      raise ValueError(f"--{flag}={value} does not exist in {name}; it has {', '.join(choices)}")
  return suite
