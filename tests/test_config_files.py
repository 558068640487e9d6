"""Configurations by name and by path, and one line for each that cannot be loaded."""

import os
import pathlib
import sys

import pytest
from absl import flags

from aromni_jax import config_files

ROOT = pathlib.Path(__file__).parents[1]
OWN = "from aromni_jax.configs import base\n\ndef get_config():\n  return base.get_config()\n"
ARGUED = """
from aromni_jax.configs import demo

def get_config(argument):
  if argument not in ("small", "large"):
    raise ValueError(f"mine:{argument} does not exist")
  return demo.get_config("tiny" if argument == "small" else "default")
"""


def parse(*words):
  values = flags.FlagValues()
  config_files.define(values, ["train", *words])
  values(["train", *words])
  return values["config"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return tmp_path


def test_names_are_of_files_with_get_config():
  assert config_files.names() == ["base", "demo", "finetune_7b", "pretrain_7b"]


@pytest.mark.parametrize("where", [".", "configs", "elsewhere"])
def test_a_name_is_the_packages_from_anywhere(where, folder):
  (folder / where).mkdir(exist_ok=True)
  os.chdir(folder / where)
  flag = parse("--config=demo:tiny", "--config.model.num_layers=3")
  assert flag.value.model.num_layers == 3 and flag.value.num_steps == 20
  assert flag.config_filename == "demo:tiny"
  assert config_files.load("pretrain_7b:released,v5p:4x4x8").batch_size == 256


def test_the_checkouts_path_is_the_same_configuration(monkeypatch):
  monkeypatch.chdir(ROOT)
  for argument in ("", ":tiny"):
    path, name = (config_files.load(f"{x}{argument}") for x in ("configs/demo.py", "demo"))
    assert path.to_dict() == name.to_dict()


@pytest.mark.parametrize("absolute", [True, False])
def test_a_file_of_ones_own(absolute, folder):
  (folder / "mine.py").write_text(ARGUED)
  path = folder / "mine.py" if absolute else "./mine.py"
  flag = parse(f"--config={path}:small", "--config.data.shards=x", "--noconfig.init_from_base")
  assert flag.value.num_steps == 20 and flag.value.data.shards == "x"
  assert flag.value.is_locked


def test_a_file_beside_a_name_of_the_package_is_named_by_its_path(folder):
  (folder / "demo.py").write_text(OWN)
  assert config_files.load("demo.py").num_steps == 1000
  assert config_files.load("demo").num_steps == 100_000


def test_files_of_the_checkouts_time_are_read(folder, monkeypatch):
  """All said `from configs import base` when configurations stood in the checkout alone."""
  for name in [n for n in sys.modules if n.partition(".")[0] == "configs"]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setattr(sys, "path", [p for p in sys.path if pathlib.Path(p or ".") != ROOT])
  (folder / "old.py").write_text(OWN.replace("aromni_jax.configs", "configs"))
  assert config_files.load("old.py").num_steps == 1000
  monkeypatch.delitem(sys.modules, "configs")


FILES = {
  "own.py": OWN,
  "argued.py": ARGUED,
  "syntax.py": "def get_config(:\n  pass\n",
  "inside.py": "import sys\nimport nothing_of_the_kind\n",
  "empty.py": "x = 1\n",
  "none.py": "def get_config():\n  pass\n",
  "bug.py": "def get_config():\n  values = {}\n  return values['a']\n",
  "binary.py": b"\xff\xfe\x00",
}
WRONG = {
  "name": (["dmo"], r"dmo does not exist; did you mean demo\? A file .* by its path"),
  "far name": (["zzz"], "zzz does not exist; the package has base, demo, finetune_7b, pretrain_7b"),
  "path": (["no/such.py:tiny"], "no/such.py does not exist; "),
  "path of a name": (["configs/demo.py"], r"configs/demo.py does not exist; did you mean demo\?"),
  "folder": (["."], "[.] does not exist"),
  "module without get_config": (["pods"], "pods does not exist"),
  "argument": (["demo:big"], "^demo:big does not exist; expected one of default, shipped, new_"),
  "own argument": (["argued.py:big"], "^argued.py:big: mine:big does not exist"),
  "no argument": (["argued.py"], "argued.py: its get_config needs an argument, argued.py:ARGUMENT"),
  "an argument": (["own.py:x"], "own.py:x: its get_config takes no argument"),
  "syntax": (["syntax.py"], "syntax.py: line 1: invalid syntax|syntax.py: line 1: "),
  "import": (["inside.py"], "inside.py: line 2: ModuleNotFoundError: No module named 'nothing_of"),
  "empty": (["empty.py"], "empty.py has no function get_config"),
  "none": (["none.py"], "none.py: get_config returned NoneType, expected ConfigDict"),
  "bug": (["bug.py"], "bug.py: line 3: KeyError: 'a'"),
  "binary": (["binary.py"], "binary.py: "),
  "field": (
    ["demo", "--config.model.num_layer=2"],
    r"--config.model.num_layer does not exist in demo; did you mean config.model.num_layers\?",
  ),
  "far field": (["demo", "--config.mesh.zz=2"], "config.mesh has data, fsdp, tensor"),
  "field of a value": (["demo", "--config.seed.x=2"], "config.seed has no fields"),
  "type": (["demo", "--config.model.num_layers=two"], "flag --config.model.num_layers=two: inval"),
  "section": (["demo", "--config.model=2"], "flag --config.model=2: Failed to parse '2'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_loaded_is_one_line(case, folder):
  for name, text in FILES.items():
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
  (name, *words), message = WRONG[case]
  with pytest.raises(flags.Error, match=message) as error:
    parse(f"--config={name}", *words)
  assert "\n" not in str(error.value) and "Traceback" not in str(error.value)
