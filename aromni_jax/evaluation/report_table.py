"""The figures of an evaluation as a table in Markdown, as the README has it."""

from collections.abc import Mapping
from typing import Any

from aromni_jax.tasks import get_task

# Figures of drawn pictures, and of texts and spoken words: key -> what it is called.
_SCENE = {"count": "count", "object": "object", "colour": "colour"}
_TEXT = {"wer": "WER", "exact": "exact"}


def table(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns a row per task and part, a column per evaluation, chance and the codecs' ceilings.

  Args:
    evaluations: name -> contents of a file that `aromni evaluate` wrote; chance and ceilings are
      those of the first one.

  Raises:
    ValueError: if there is none.
  """
  if not evaluations:
    raise ValueError("a table needs --evaluations=NAME=FILE, which aromni evaluate writes")
  first = next(iter(evaluations.values()))
  header = ["task", *evaluations, "chance", "codec ceiling"]
  lines = [header, ["---"] * len(header)]
  for row, entry in first["rows"].items():
    shown = _SCENE if "object" in entry else _TEXT
    figures = [_named(data["rows"].get(row), shown) for data in evaluations.values()]
    chance, ceiling = _plain(entry["chance"], shown), _ceiling(row, first["ceilings"], shown)
    lines.append([row.replace("_", " ").replace("/", ", "), *figures, chance, ceiling])
  return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _named(scores: Mapping[str, float] | None, shown: Mapping[str, str]) -> str:
  if scores is None:
    return "–"
  return ", ".join(f"{name} {scores[key]:.3f}" for key, name in shown.items())


def _plain(scores: Mapping[str, float], shown: Mapping[str, str]) -> str:
  return ", ".join(f"{scores[key]:.3f}" for key in shown)


def _ceiling(row: str, ceilings: Mapping[str, Mapping[str, float]], shown: Mapping) -> str:
  """What the referees say of reconstructions: of pictures, or of all voices; none of text."""
  task, _, part = row.partition("/")
  part = part if part in get_task(task).parts else get_task(task).outputs[0]
  found = [v for k, v in ceilings.items() if k.startswith(part) and k.endswith("codec")]
  if not found:
    return ""
  return _plain({key: sum(v[key] for v in found) / len(found) for key in shown}, shown)
