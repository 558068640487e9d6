"""Commands in README and docs name jobs, flags, modules, files and make targets that exist."""

import functools
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from aromni_jax.configs import demo
from aromni_jax.launch import run

from aromni_jax.cli import JOBS

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "launch/demo.sh", ROOT / "launch/weights.sh"]
TEXT = "\n".join(p.read_text() for p in PAGES).replace("\\\n", " ")


@functools.cache
def flags_of(module):
  done = subprocess.run(
    [sys.executable, "-m", module, "--helpfull"], cwd=ROOT, capture_output=True, text=True
  )
  return set(re.findall(r"--\[?(?:no\])?(\w+)", done.stdout))


@pytest.mark.parametrize("job", JOBS)
def test_flags_of_jobs_exist(job):
  lines = re.findall(rf"aromni(?:_jax\.| ){job} ([^\n`|]*)", TEXT)
  used = {flag for line in lines for flag in re.findall(r"--(\w+)", line)}
  assert used, f"no page shows aromni {job}"
  assert used <= flags_of(f"aromni_jax.{job}")


PIPELINES = ("build_pictotalk", "tokenize", "train_text", "import_aromni", "export_aromni")


@pytest.mark.parametrize("module", PIPELINES)
def test_flags_of_pipelines_exist(module):
  lines = re.findall(rf"data_pipelines\.{module} ([^\n`|]*)", TEXT)
  used = {flag for line in lines for flag in re.findall(r"--(\w+)", line)}
  assert used and used <= flags_of(f"data_pipelines.{module}")


def launches():
  """Yields the launch of every page: its own arguments and its training line."""
  for line in re.findall(r"^ +\S*python -m launch\.run (.*)$", TEXT, re.M):
    own, _, training = line.partition(" -- ")
    yield shlex.split(own), shlex.split(training)


def test_launches_name_targets_and_flags_that_exist():
  seen = set()
  for own, training in launches():
    options = run.make_parser(dict(a[2:].split("=", 1) for a in own if "=" in a)["target"])
    target = options.parse_args(own).target  # ends the test if an option does not exist
    seen.add(target)
    used = {a[2:].split("=")[0] for a in training} - {"config"}
    assert {a for a in used if not a.startswith("config.")} <= flags_of("aromni_jax.train")
  assert seen == set(run.TARGETS)


@pytest.mark.parametrize("own, training", launches(), ids=lambda x: x[0])
def test_launches_render(own, training):
  """Each is a launch that would be made: nothing about it is refused."""
  assert run.plan([*own, "--", *training])[1].script()


def test_every_option_of_the_launcher_is_on_its_page():
  page = (ROOT / "docs/launch.md").read_text()
  described = set(re.findall(r"--([a-z][a-z-]*)", page))
  # Where xpk and SLURM have words of their own, --help has ours.
  left_to_help = {"account", "priority", "name", "out"}
  options = {option.name for module in run.TARGETS.values() for option in module.OPTIONS}
  assert options - left_to_help <= described


def test_named_jobs_targets_and_files_exist():
  assert set(re.findall(r"^ +aromni (\w+) ", TEXT, re.M)) <= set(JOBS)
  targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
  assert set(re.findall(r"(?:^ +|`)make ([a-z0-9-]+)", TEXT, re.M)) <= targets
  for argument in re.findall(r"configs/demo\.py:(\w+)", TEXT):
    assert argument in demo.ARGUMENTS
  for path in re.findall(r"`((?:aromni_jax|configs|launch|docs|codecs|data)/[\w/.]+)`", TEXT):
    assert (ROOT / path).exists() or (ROOT / "aromni_jax" / path).exists(), path


def test_readme_python_runs():
  (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
  scope = {}
  exec(code, scope)  # the README's own lines
  assert scope["response"].image.shape == (64, 64, 3)
