"""Commands in README and docs are what a user can type: through the installed console script.

Every line of a page that starts a program is executed by a test or parsed to its end, in a fresh
environment and an empty folder (tests/parse_line.py). A program that no test knows is an error.
"""

import dataclasses
import functools
import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from aromni_jax.cli import JOBS
from aromni_jax.launch import run

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSER = pathlib.Path(__file__).with_name("parse_line.py")

# Programs of others: what they take is not ours to test.
OTHERS = ("gcloud", "xpk", "ssh-add", "xprof", "pre-commit", "apt-get", "git", "cd", "gcsfuse")
# What stands for words that a reader fills in.
LEFT_OUT = {"train": ("--config=demo:tiny", "--workdir=runs/mine")}


@dataclasses.dataclass(frozen=True)
class Command:
  """A command of a page: its words, without a path before the program."""

  page: str
  words: tuple[str, ...]

  @property
  def program(self):
    return self.words[0]

  def __str__(self):
    return f"{self.page}: {shlex.join(self.words)}"


def lines_of(text):
  """Yields what a page says is typed: shell lines of blocks, and commands in the text."""
  text = re.sub(r"```python\n.*?```", "", text, flags=re.S).replace("\\\n", " ")
  known = r"(?:\S*/)?(?:aromni|python3?(?:\.\d+)? -m|pip install|make)\b|launch/\w+\.sh"
  for line in re.findall(r"^ {4,}(\S.*)$", text, re.M):
    program = line.split()[0].rpartition("/")[2]
    if re.match(known, line) or program in OTHERS:
      yield line
  for block in re.findall(r"```(?:bash|sh|shell)\n(.*?)```", text, re.S):
    yield from filter(None, map(str.strip, block.splitlines()))
  for span in re.findall(rf"`((?:{known})[^`]*)`", text):
    yield span.replace("\n", " ")


@functools.cache
def commands():
  """Returns the commands of all pages."""
  out = []
  for page in PAGES:
    for line in lines_of(page.read_text()):
      words, ended = [], shlex.split(line, comments=True)
      for word in [*ended, "&&"]:
        if word != "&&":
          words.append(word)
          continue
        words[0] = words[0].rpartition("/")[2] if "launch/" not in words[0] else words[0]
        out.append(Command(page.name, tuple(words)))
        words = []
  return tuple(dict.fromkeys(out))


def of(*programs):
  return [c for c in commands() if c.program in programs]


def filled(command):
  """The words of a job's command, `...` filled in; None if it is only named."""
  words = [w for w in command.words if w != "..."]
  if len(words) < (4 if is_python(command) else 3) or "<" in " ".join(words):
    return None
  if len(words) < len(command.words):
    words[2:2] = LEFT_OUT[words[1]]
  return words


def is_python(command):
  return re.fullmatch(r"python3?(\.\d+)?", command.program) is not None


def parse(environment, folder, lines):
  """Returns what is wrong with lines, by line."""
  command = [str(environment.python), str(PARSER)]
  done = subprocess.run(
    command,
    input=json.dumps(lines),
    env=environment.env,
    cwd=folder,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  found = zip(lines, json.loads(done.stdout), strict=True)
  return {shlex.join(line): failure for line, failure in found if failure}


def test_every_program_is_known():
  known = {"aromni", "pip", "make", *OTHERS}
  unknown = [str(c) for c in commands() if c.program not in known and not is_python(c)]
  assert not [c for c in unknown if "launch/" not in c]
  assert len(commands()) > 40


def test_every_job_is_shown_and_exists():
  shown = {c.words[1] for c in of("aromni") if len(c.words) > 1} - {"<job>"}
  assert shown - {"--help"} == set(JOBS)


def test_every_line_of_a_job_parses_to_its_end(installed, tmp_path):
  ours = [c for c in commands() if is_python(c) and "aromni_jax." in c.words[2]]
  lines = [filled(c) for c in (*of("aromni"), *ours)]
  assert parse(installed, tmp_path, [x for x in lines if x]) == {}


WRONG = {
  "aromni trian --config=demo:tiny --workdir=x": "'trian' does not exist",
  "aromni train --config=demo:tiny": "--workdir",
  "aromni train --config=demo:tiny --workdir=x --config.num_step=3": "num_step",
  "aromni train --config=demo:tiny --workdir=x --config.batch_size=ten": "batch_size",
  "aromni train --config=demo:tiny --workdir=x --config.optimizer.name=adm": "adm",
  "aromni train --config=demo:tinny --workdir=x": "tinny",
  "aromni train --config=dema --workdir=x": "dema",
  "aromni generate --task=text_to_spech --text=x": "text_to_spech",
  "aromni generate --task=text_to_speech --txt=x": "txt",
  "aromni report --out=x.html more": "unexpected arguments",
  "aromni report --evaluations=a=b": "--out",
  "aromni launch --target=local --proceses=2 -- --config=demo:tiny --workdir=x": "--proceses",
  "aromni launch --target=local -- --config=demo:tiny --workdir=x --txt=x": "txt",
}


def test_wrong_lines_are_found(installed, tmp_path):
  found = parse(installed, tmp_path, list(map(shlex.split, WRONG)))
  assert found.keys() == WRONG.keys()
  assert {line for line, message in WRONG.items() if message not in found[line]} == set()


def test_lines_for_the_checkout_parse_there():
  """`python -m` of what no wheel has: benchmarks, and the tests themselves."""
  lines = [c.words for c in commands() if is_python(c) and "aromni_jax." not in c.words[2]]
  for python, flag, module, *rest in lines:
    assert flag == "-m"
    if module == "pytest":
      assert all((ROOT / path).exists() for path in rest if not path.startswith("-"))
    elif module != "venv":
      assert module.startswith("benchmarks."), f"{python} -m {module}: a wheel has no such module"
      command = [sys.executable, str(PARSER), "-m", module, *rest]
      done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
      assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"


def test_make_targets_exist():
  lines = of("make")
  assert lines
  for command in lines:
    done = subprocess.run(
      ["make", "-n", *command.words[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"


def test_extras_that_are_installed_exist(installed, tmp_path):
  code = "import importlib.metadata as m; print(m.metadata('aromni_jax').get_all('Provides-Extra'))"
  have = installed.run(str(installed.python), "-c", code, cwd=tmp_path).stdout
  asked = {x for c in of("pip") for w in c.words for x in re.findall(r"\[(.+)\]", w)}
  assert asked and all(f"'{x}'" in have for names in asked for x in names.split(","))
  ours = [w for c in of("pip") for w in c.words[2:] if not w.startswith("-")]
  assert {re.sub(r"\[.*", "", w) for w in ours} <= {"aromni_jax", ".", *OTHERS}


@pytest.mark.parametrize("script", ["weights.sh", "demo.sh demo", "demo.sh new_objects"])
def test_scripts_call_jobs_with_flags_that_exist(installed, tmp_path, script):
  """The scripts themselves run, with a parser in place of Python; `make demo-tiny` runs one."""
  python = tmp_path / "python"
  python.write_text(
    f'#!/bin/sh\necho "$@" >> {tmp_path}/lines\nexec {installed.python} {PARSER} "$@"\n'
  )
  python.chmod(0o755)
  env = installed.env | {"PYTHON": str(python), "DATA": f"{tmp_path}/d", "RUNS": f"{tmp_path}/r"}
  name, *arguments = script.split()
  command = ["bash", str(ROOT / "launch" / name), *arguments]
  done = subprocess.run(command, capture_output=True, text=True, env=env)
  assert done.returncode == 0, done.stdout + done.stderr
  assert len((tmp_path / "lines").read_text().splitlines()) >= 6


def test_launches_of_every_target_are_shown():
  text = "\n".join(str(c) for c in commands())
  assert set(re.findall(r"--target=(\w+)", text)) == set(run.TARGETS)


def test_every_option_of_the_launcher_is_on_its_page():
  page = (ROOT / "docs/launch.md").read_text()
  described = set(re.findall(r"--([a-z][a-z-]*)", page))
  # Where xpk and SLURM have words of their own, --help has ours.
  left_to_help = {"account", "priority", "name", "out"}
  options = {option.name for target in run.TARGETS.values() for option in target.options}
  assert options - left_to_help <= described


def test_named_files_exist():
  text = "\n".join(page.read_text() for page in PAGES)
  for path in re.findall(r"`((?:aromni_jax|configs|launch|docs|codecs|data|tests)/[\w/.]+)`", text):
    assert (ROOT / path).exists() or (ROOT / "aromni_jax" / path).exists(), path


def test_readme_python_runs(installed, tmp_path):
  (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
  code += "\nprint(response.image.shape, response.image.dtype)"
  done = installed.run(str(installed.python), "-c", code, cwd=tmp_path)
  assert done.stdout.split("\n")[-2] == "(64, 64, 3) uint8", done.stderr
