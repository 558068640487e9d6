"""What a newcomer does first, with the wheel in a fresh environment and in an empty folder."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from aromni_jax import __version__
from aromni_jax.cli import JOBS
from aromni_jax.launch.shell import SOURCES
from tests.installed import ROOT

OWN = "from {} import base\n\ndef get_config():\n  return base.get_config()\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder in which there is nothing of the checkout."""
  return tmp_path_factory.mktemp("empty")


def succeed(done):
  assert done.returncode == 0, done.stderr
  assert "Traceback" not in done.stderr
  return done.stdout


def test_help_and_version(installed, folder):
  text = succeed(installed.aromni("--help", cwd=folder))
  assert all(f"\n  {job} " in text for job in JOBS)
  assert succeed(installed.aromni(cwd=folder)) == text
  version = succeed(installed.aromni("--version", cwd=folder))
  assert version.startswith(f"aromni_jax {__version__} (jax ")


@pytest.mark.parametrize("job", JOBS)
def test_every_job_has_help(job, installed, folder):
  text = succeed(installed.aromni(job, "--help", cwd=folder))
  assert f"aromni {job} --" in text and "\n  --" in text


def test_all_flags_are_told(installed, folder):
  text = succeed(installed.aromni("train", "--helpfull", cwd=folder))
  assert "--config:" in text and "--verbosity" in text


def test_answers_with_the_shipped_model_and_keeps_what_it_compiled(installed, folder):
  env = {"AROMNI_CACHE": "", "XDG_CACHE_HOME": str(folder / "cache")}

  def answer(out):
    line = ["--task=text_to_speech", "--text=two dogs on blue", f"--out={out}"]
    succeed(installed.aromni("generate", *line, cwd=folder, env=env))
    kept = {file.name for file in (folder / "cache/aromni_jax").rglob("*-cache")}
    return (folder / out).read_bytes(), kept

  first, kept = answer("first.wav")
  assert any(name.startswith("jit__advance_fn") for name in kept)
  assert answer("second.wav") == (first, kept), "the second call compiled something"


def test_trains_by_name(installed, folder, shards):
  line = ["--config=demo:tiny", "--workdir=runs/mine", f"--config.data.shards={shards}"]
  succeed(installed.aromni("train", *line, "--config.num_steps=2", cwd=folder))
  assert json.loads((folder / "runs/mine/model/model.json").read_text())["decoder"]


def test_plans_and_launches_by_name(installed, folder):
  plan = ("plan", "--config=pretrain_7b", "--topology=v5e:16x16")
  assert "v5e:16x16" in succeed(installed.aromni(*plan, cwd=folder))
  own = ("--target=tpu_vm", "--topology=v5p:4x4x8", "--dry-run", "--project=p", "--zone=z")
  line = ("--config=pretrain_7b:v5p:4x4x8", "--workdir=gs://b/first", "--config.base=gs://b/anole")
  line = (*line, "--config.data.shards=gs://b/tokens")
  script = succeed(installed.aromni("launch", *own, "--", *line, cwd=folder))
  assert "-m aromni_jax.train --config=pretrain_7b:v5p:4x4x8 --workdir=/mnt/b/first" in script
  own = ("--target=local", "--processes=2", "--devices=1", "--dry-run")
  line = ("--config=demo:tiny", "--workdir=runs/tiny")
  script = succeed(installed.aromni("launch", *own, "--", *line, cwd=folder))
  assert "-m aromni_jax.launch.processes --processes=2" in script


@pytest.mark.parametrize("package", ["aromni_jax.configs", "configs"])
def test_takes_a_file_of_ones_own(package, installed, folder):
  """Files of the time when there was only a checkout say `from configs import base`."""
  file = folder / f"{package}.py"
  file.write_text(OWN.format(package))
  topology = ("--topology=v5e:16x16", "--config.batch_size=256")
  for name in (file.name, str(file)):
    assert "v5e" in succeed(installed.aromni("plan", f"--config={name}", *topology, cwd=folder))


WRONG = {
  "no such name": (["train", "--config=dmo"], r"dmo does not exist; did you mean demo\?"),
  "path of a checkout": (["train", "--config=configs/demo.py:tiny"], r"did you mean demo\?"),
  "argument": (["plan", "--config=demo:big"], "demo:big does not exist; expected one of default, "),
  "syntax": (["train", "--config=broken.py"], "broken.py: line 1: "),
  "import": (["plan", "--config=needy.py"], "needy.py: line 1: ModuleNotFoundError: No module na"),
  "field": (["train", "--config=demo", "--config.model.num_layer=2"], "did you mean config.model."),
  "type": (["plan", "--config=demo", "--config.batch_size=a"], "flag --config.batch_size=a: inv"),
  "launch": (["launch", "--target=local", "--", "--config=dmo"], r"dmo does not .* mean demo\?"),
  "job": (["generat"], r"job 'generat' does not exist; did you mean generate\?"),
  "flag": (["generate", "--texts=a"], "Unknown command line flag 'texts'. Did you mean: text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_says_in_one_line_what_is_wrong_before_anything_is_loaded(case, installed, folder):
  (folder / "broken.py").write_text("def get_config(:\n")
  (folder / "needy.py").write_text("import nothing_of_the_kind\n")
  argv, message = WRONG[case]
  python = (str(installed.python), "-X", "importtime", "-m", "aromni_jax.cli")
  done = installed.run(*python, *argv, cwd=folder)
  imports = "\n".join(x for x in done.stderr.splitlines() if x.startswith("import time:"))
  said = [x for x in done.stderr.splitlines() if not x.startswith("import time:")]
  assert done.returncode == 1 and len(said) == 1, done.stderr
  assert said[0].startswith("error: ") and re.search(message, said[0])
  assert re.search(r"\| +absl\.flags$", imports, re.M) or case == "job"
  assert not re.search(r"\| +(jax|flax)$", imports, re.M)


def test_what_workers_get_can_be_installed(tmp_path):
  for name in SOURCES:
    copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
    copy(ROOT / name, tmp_path / name)
  command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib=built"]
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "built/aromni_jax/configs/pretrain_7b.py").is_file()


def test_a_booking_needs_a_checkout(installed, folder):
  """Workers install the package from it; nothing is booked without one."""
  programs = folder / "programs"
  programs.mkdir()
  (programs / "gcloud").write_text("#!/bin/sh\ntouch booked\n")
  (programs / "gcloud").chmod(0o755)
  own = ("--target=tpu_vm", "--topology=v5e:16x16", "--project=p", "--zone=z")
  line = ("--config=pretrain_7b", "--workdir=gs://b/first", "--config.base=gs://b/anole")
  line = (*line, "--config.data.shards=gs://b/tokens")
  env = {"PATH": f"{programs}:{installed.env['PATH']}"}
  done = installed.aromni("launch", *own, "--", *line, cwd=folder, env=env)
  assert done.returncode == 1 and "workers install the package from its checkout" in done.stderr
  assert not (folder / "booked").exists() and not (folder / "runs/launch").exists()
