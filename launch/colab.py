"""A Colab notebook: install, then the training line on one TPU or GPU."""

import json
import shlex

from aromni_jax.launch import shell
from aromni_jax.launch.job import File, Job, Option, Rendered, Target

_OPTIONS = (
  Option("repository", "What git clones: a URL, or a path in the mounted Drive.", required=True),
)

_INSTALL = """\
%%bash
set -euo pipefail
[ -d aromni_jax ] || git clone --quiet --depth 1 {repository} aromni_jax
cd aromni_jax
pip install --quiet -e '.[{extra}]'
"""
_DRIVE = """\
from google.colab import drive

drive.mount("/content/drive")
"""
# A cell of %%bash and not a line after "!", in which Colab would replace $ and braces.
_TRAIN = """\
%%bash
set -euo pipefail
cd aromni_jax
{exports}{command} 2>&1
"""


def render(job: Job) -> Rendered:
  """Returns the notebook; it runs no command.

  Raises:
    ValueError: for more than one chip.
  """
  topology = job.topology
  if topology.num_chips != 1:
    raise ValueError(
      f"--topology={topology.name} has {topology.num_chips} chips, a Colab one; expected e.g. "
      "v5e:1x1, v6e:1x1 or a100:1"
    )
  platform = topology.chip.platform
  install = _INSTALL.format(repository=shlex.quote(job.options.repository), extra=platform)
  train = _TRAIN.format(
    exports=shell.exports(platform, job.topology.chip.name),
    command=shell.training("python", job.arguments, coordinator=None),
  )
  heading = (
    f"# {job.name}\n\nChoose a runtime with one {topology.chip.name} (Runtime, Change runtime "
    "type), then run all cells. If the runtime ends, run all cells again: the training goes on "
    "from the newest checkpoint of its --workdir."
  )
  cells = [_cell("markdown", heading)]
  if job.workdir.startswith("/content/drive/"):
    cells.append(_cell("code", _DRIVE))
  cells += [_cell("code", install), _cell("code", train)]
  for number, cell in enumerate(cells):
    cell["id"] = f"cell-{number}"
  notebook = {
    "cells": cells,
    "metadata": {
      "accelerator": platform.upper(),
      "kernelspec": {"display_name": "Python 3", "name": "python3"},
    },
    "nbformat": 4,
    "nbformat_minor": 5,
  }
  text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
  return Rendered(files=(File(f"{job.folder}/{job.name}.ipynb", text),))


def _cell(kind: str, source: str) -> dict:
  cell = {"cell_type": kind, "metadata": {}, "source": source.rstrip("\n").splitlines(True)}
  return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


TARGET = Target(
  about="a Colab notebook for one TPU or GPU",
  options=_OPTIONS,
  render=render,
)
