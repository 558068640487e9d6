"""The arrows of the house: which rooms a room may reach, walked import by import.

Imports inside functions count, too: what a run may load is what it reaches.
"""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BESIDE = ("configs", "data_pipelines", "launch")  # stand beside the package, live inside it

# Room -> rooms that it never reaches, directly or through others.
NEVER = {
  "aromni_jax.training": ("decoding", "serving", "evaluation", "planning", "pictotalk", "convert"),
  "aromni_jax.data": ("training", "decoding", "serving", "evaluation", "planning", "pictotalk"),
  "aromni_jax.models": ("training", "decoding", "serving", "evaluation", "planning", "data"),
  "aromni_jax.codecs": ("training", "decoding", "serving", "evaluation", "planning", "pictotalk"),
  "aromni_jax.cluster": ("training", "decoding", "serving", "evaluation", "planning", "models"),
  "aromni_jax.decoding": ("training", "serving", "evaluation", "planning", "pictotalk", "data"),
  "aromni_jax.serving": ("training", "evaluation", "planning", "pictotalk", "convert"),
  "aromni_jax.configs": ("training", "decoding", "serving", "evaluation", "planning", "models"),
  "aromni_jax.convert": ("training", "decoding", "serving", "evaluation", "planning", "pictotalk"),
}
# The training loop: files and lines that somebody reads who wants to know all of it.
LOOP = "aromni_jax.training.loop"
MOST_FILES, MOST_LINES = 31, 5900


def file_of(module):
  """The file of a module of ours, or None."""
  parts = module.split(".")
  if parts[0] != "aromni_jax":
    return None
  inside = parts[1:] if len(parts) > 1 and parts[1] in BESIDE else parts
  path = ROOT.joinpath(*inside)
  for file in (path.with_suffix(".py"), path / "__init__.py"):
    if file.is_file():
      return file
  return None


def imports(file):
  """Names that a file imports, but for those that only a type checker reads."""
  nodes, todo = [], [ast.parse(file.read_text())]
  while todo:
    node = todo.pop()
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
      continue
    nodes.append(node)
    todo += ast.iter_child_nodes(node)
  for node in nodes:
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def reached(*modules):
  """Module -> file of all that modules reach, themselves included."""
  out, todo = {}, list(modules)
  while todo:
    module = todo.pop()
    file = file_of(module)
    if file and module not in out:
      out[module] = file
      todo += imports(file)
  return {m: f for m, f in out.items() if f.name != "__init__.py"}


def modules_of(room):
  folder = file_of(room).parent
  return [f"{room}.{file.stem}" for file in folder.glob("*.py") if file.stem[0] != "_"]


@pytest.mark.parametrize("room", NEVER)
def test_arrows_run_down_only(room):
  found = reached(*modules_of(room))
  wrong = [m for m in found for other in NEVER[room] if m.startswith(f"aromni_jax.{other}")]
  assert not wrong, f"{room} reaches {wrong}"


def test_the_walk_sees_arrows():
  assert "aromni_jax.decoding.engine" in reached("aromni_jax.evaluation.hooks")  # in a function
  assert "aromni_jax.training.loop" in reached("aromni_jax.train")


def test_the_loop_can_be_read():
  files = set(reached(LOOP).values())
  lines = sum(len(file.read_text().splitlines()) for file in files)
  assert len(files) <= MOST_FILES and lines <= MOST_LINES, (len(files), lines)


def test_no_job_is_reached_by_a_room():
  jobs = {f"aromni_jax.{f.stem}" for f in (ROOT / "aromni_jax").glob("*.py") if _is_job(f)}
  assert {"aromni_jax.train", "aromni_jax.generate", "aromni_jax.plan"} <= jobs
  rooms = [module for room in NEVER for module in modules_of(room)]
  assert not jobs & set(reached(*rooms))


def _is_job(file):
  return "app.run(" in file.read_text() or "logs.run(" in file.read_text()
