"""Makes one self-contained HTML page of trainings and evaluations.

  aromni report --out=report.html --evaluations="from nothing=runs/demo/evaluation.json" \\
    --evaluations=shipped=runs/shipped.json --runs="from nothing=runs/demo"
  aromni report --out=figures.md --evaluations=shipped=shipped.json    the README's table
"""

import json
import pathlib

from absl import flags, logging

from aromni_jax import logs

_EVALUATIONS = flags.DEFINE_multi_string(
  "evaluations", [], "name=FILE that aromni evaluate wrote; may be repeated."
)
_RUNS = flags.DEFINE_multi_string("runs", [], "name=WORKDIR of aromni train; may be repeated.")
_OUT = flags.DEFINE_string("out", None, "HTML file to write; with .md the table of figures alone.")


def main(argv: list[str]) -> None:
  del argv
  from aromni_jax.evaluation import report_page, report_table

  files = report_page.names_and_paths(_EVALUATIONS.value)
  evaluations = {name: json.loads(path.read_text()) for name, path in files.items()}
  folders = {name: path.parent for name, path in files.items()}
  out = pathlib.Path(_OUT.value)
  if out.suffix == ".md":
    text = report_table.table(evaluations)
  else:
    text = report_page.page(evaluations, folders, report_page.names_and_paths(_RUNS.value))
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(text)
  logging.info("Wrote %s, %.1f MB.", out, len(text) / 1e6)


def run() -> None:
  logs.run(main, required=["out"])


if __name__ == "__main__":
  run()
