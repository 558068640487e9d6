"""What is rendered for each target, and what is refused before anything is booked."""

import difflib
import json
import os
import pathlib
import re
import subprocess

import pytest

from aromni_jax.cluster.hardware import parse_topology
from aromni_jax.launch import run, tpu
from aromni_jax.launch.job import Option, Rendered, Target

GOLDEN = pathlib.Path(__file__).parent / "golden"
CLOUD = ("--project=my-project", "--zone=us-west4-a")
REST = (
  *("--workdir=gs://bucket/runs/first", "--config.optimizer.learning_rate=1e-4"),
  *("--config.base=gs://bucket/anole", "--config.data.shards=gs://bucket/tokens"),
)
SHARED = tuple(word.replace("gs://bucket", "/shared") for word in REST)
LINE = ("--config=pretrain_7b", *REST)
HERE = ("--config=demo:tiny", "--workdir=runs/tiny")

CASES = {
  "tpu_vm": ("--target=tpu_vm", "--topology=v5e:16x16", *CLOUD, "--", *LINE),
  "tpu_vm_two_slices": (
    *("--target=tpu_vm", "--topology=2xv5p:4x4x8", "--spot", "--keep", "--restarts=0"),
    *("--name=two", "--out=elsewhere", *CLOUD, "--mounted", "--"),
    *("--config=pretrain_7b:released,v5p:4x4x8", *REST),
    *("--workdir=/mnt/shared/first", "--config.mesh.data=2"),
  ),
  "xpk": (
    *("--target=xpk", "--topology=v5p:4x4x8", *CLOUD, "--cluster=pod", "--storage=disk", "--"),
    *("--config=pretrain_7b:v5p:4x4x8", *REST),
  ),
  "xpk_two_slices": (
    *("--target=xpk", "--topology=2xv5e:16x16", *CLOUD, "--cluster=pod", "--storage=disk"),
    *("--priority=high", "--restarts=5", "--"),
    *("--config=pretrain_7b:2xv5e:16x16", *REST),
  ),
  "slurm": (
    *("--target=slurm", "--topology=h100:8", "--python=python", "--"),
    *("--config=pretrain_7b:h100:8", *SHARED),
  ),
  "slurm_two_nodes": (
    *("--target=slurm", "--topology=h100:16", "--partition=gpu", "--account=me"),
    *("--setup=module load cuda", "--python=.venv/bin/python", "--time=02:00:00", "--"),
    *("--config=finetune_7b:h100:8", *SHARED),
    *("--config.mesh.data=2", "--config.accumulate=4"),
  ),
  "local": (
    *("--target=local", "--processes=2", "--devices=2", "--python=python", "--name=two"),
    *("--", *HERE),
  ),
  "colab": (
    *("--target=colab", "--topology=v6e:1x1", "--repository=https://example.com/aromni_jax"),
    *("--", "--config=demo:shipped", "--workdir=/content/drive/MyDrive/demo"),
  ),
}


def render(argv):
  return run.plan(list(argv))[1]


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
  path = GOLDEN / f"{name}.txt"
  script = render(CASES[name]).script()
  if os.environ.get("UPDATE_GOLDEN"):
    path.write_text(script)
  expected = path.read_text() if path.exists() else ""
  difference = difflib.unified_diff(
    expected.splitlines(), script.splitlines(), f"{path.name}, as it is", "as rendered", lineterm=""
  )
  assert script == expected, "\n".join(
    [*difference, "if that is right: UPDATE_GOLDEN=1 python -m pytest tests/launch/test_render.py"]
  )


def test_no_golden_file_is_left_over():
  assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_scripts_parse(name):
  rendered = render(CASES[name])
  scripts = [file.text for file in rendered.files if file.path.endswith((".sh", ".sbatch"))]
  for script in [rendered.script(), *scripts]:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_notebook_is_a_notebook():
  (file,) = render(CASES["colab"]).files
  notebook = json.loads(file.text)
  assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
  for cell in notebook["cells"]:
    keys = {"id", "cell_type", "metadata", "source"}
    keys |= {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
    assert cell.keys() == keys
  assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"]) == 4


@pytest.mark.parametrize(
  "topology, accelerator, device",
  [
    ("v5e:16x16", "v5litepod-256", "v5litepod-256"),
    ("v5e:1x1", "v5litepod-1", "v5litepod-1"),
    ("v6e:16x16", "v6e-256", "v6e-256"),
    ("v4:2x2x1", "v4-8", "v4-2x2x1"),
    ("v4:4x4x8", "v4-256", "v4-4x4x8"),
    ("v5p:2x4x4", "v5p-64", "v5p-2x4x4"),
    ("v5p:4x4x8", "v5p-256", "v5p-4x4x8"),
    ("v5p:4x4x12", "v5p-384", "v5p-4x4x12"),
    ("v5p:4x8x8", "v5p-512", "v5p-4x8x8"),
    ("v5p:8x8x12", "v5p-1536", "v5p-8x8x12"),
    ("v5p:16x16x16", "v5p-8192", "v5p-16x16x16"),
  ],
)
def test_names_of_slices(topology, accelerator, device):
  """The names of Google Cloud's tables: v4 and v5p count two TensorCores per chip."""
  topology = parse_topology(topology)
  assert tpu.accelerator_type(topology) == accelerator
  assert tpu.device_type(topology) == device


def changed(name, *more, drop=()):
  argv = [a for a in CASES[name] if not a.startswith(tuple(drop))]
  at = argv.index("--")
  own = [a for a in more if not a.startswith("--config") and not a.startswith("--workdir")]
  return [*argv[:at], *own, *argv[at:], *(a for a in more if a not in own)]


WRONG = {
  "no line": (["--target=local"], "no training line; give it after --"),
  "no topology": (changed("tpu_vm", drop=["--topology"]), "tpu_vm needs --topology, e.g."),
  "topology": (changed("tpu_vm", "--topology=v5e:3x3"), "'v5e:3x3' does not exist"),
  "gpu on tpu_vm": (changed("tpu_vm", "--topology=h100:8"), "has no TPU, which --target=tpu_vm"),
  "tpu on slurm": (changed("slurm", "--topology=v5e:4x4"), "has no GPU, which --target=slurm"),
  "shape": (changed("tpu_vm", "--topology=v5p:4x4x16"), "256 v5p chips is 4x8x8; take that"),
  "many chips": (changed("colab", "--topology=v5e:2x2"), "has 4 chips, a Colab one"),
  "local topology": (changed("local", "--topology=v5e:4x4"), "is not for --target=local"),
  "name": (changed("tpu_vm", "--name=My_Run"), "--name=My_Run is no name for a job"),
  "mesh": (changed("tpu_vm", "--config.mesh.tensor=3"), "does not cover 256 devices"),
  "mesh here": (changed("local", "--config.mesh.tensor=3"), "does not cover 4 devices"),
  "mesh and rows here": (changed("local", "--config.batch_size=6"), "no multiple of 4: .*4 or 8"),
  "slices": (changed("xpk", "--topology=2xv5p:4x4x4"), "of the 2 slices .*--config.mesh.data=2"),
  "rows": (changed("tpu_vm", "--config.batch_size=480"), "no multiple of 256: .*take 256 or 512"),
  "micro-batches": (changed("tpu_vm", "--config.accumulate=4"), "1024: .* take 1024"),
  "memory": (
    changed("tpu_vm", "--topology=v5e:4x4"),
    "GiB on each chip of v5e:4x4, which has .*This fits: --config.model.remat_policy=",
  ),
  "processes": (
    changed("slurm", "--config.batch_size=12", "--config.mesh.tensor=4", "--config.accumulate=2"),
    "which 8 processes cannot share; take 8 or 16",
  ),
  "workdir": (changed("tpu_vm", "--workdir=runs/x"), "--workdir=runs/x is on this machine"),
  "shards": (changed("tpu_vm", "--config.data.shards=data/x"), "--config.data.shards=data/x is on"),
  "base": (
    changed("xpk", "--config.base=models/x", drop=["--storage"]),
    "--config.base=models/x is on this machine",
  ),
  "bucket on xpk": (changed("xpk", drop=["--storage"]), "gs://bucket must be mounted.*--storage="),
  "bucket on slurm": (changed("slurm", "--config.base=gs://b/x"), "gs://b must be mounted"),
  "unknown key": (changed("tpu_vm", "--config.model.num_layer=1"), "did you mean|Did you mean"),
  "unknown flag": (changed("tpu_vm", "--workdirs=x"), "Unknown command line flag 'workdirs'"),
  "bad value": (changed("tpu_vm", "--config.batch_size=many"), "many"),
  "argument": (
    changed("tpu_vm", "--config=pretrain_7b:x"),
    "pretrain_7b:x does not exist",
  ),
  "no config": (changed("tpu_vm", drop=["--config=", "--config."]), "has no --config"),
  "no workdir": (changed("tpu_vm", drop=["--workdir"]), "has no --workdir"),
  "ours": (["--target=local", "--", *HERE, "--coordinator=auto"], "has --coordinator, which the"),
  "stray": (["--target=local", "--", *HERE, "stray"], r"unexpected arguments \['stray'\]"),
  "line break": (["--target=local", "--", *HERE, "--config.base=a\nb"], "has a line break"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused_before_anything_is_booked(name, capsys, tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))  # nothing could be booked anyway
  argv, message = WRONG[name]
  assert run.main(argv) == 1
  error = capsys.readouterr().err
  assert error.startswith("error: ") and "Traceback" not in error
  assert re.search(message, error), error


def test_a_configuration_outside_of_the_checkout_is_refused(tmp_path, capsys):
  config = tmp_path / "mine.py"
  config.write_text("from configs import pretrain_7b\n\nget_config = pretrain_7b.get_config\n")
  argv = [f"--config={config}" if a.startswith("--config=") else a for a in CASES["xpk"]]
  assert run.main(argv) == 1
  assert "would not reach the workers" in capsys.readouterr().err


@pytest.mark.parametrize(
  "argv, message",
  [
    (["--target=moon"], "invalid choice: 'moon'"),
    (["--target=tpu_vm", "--", *LINE], "arguments are required: --project, --zone"),
    (["--target=slurm", "--zone=x", "--", *LINE], "--zone=x: no option of --target=slurm, which"),
    (["--target=local", "--processes=0", "--", *HERE], "'0' is no whole number of at least 1"),
    (["--target=local", "--restarts=-1", "--", *HERE], "'-1' is no whole number of at least 0"),
  ],
)
def test_options_are_checked(argv, message, capsys):
  with pytest.raises(SystemExit):
    run.main(argv)
  assert message in capsys.readouterr().err


def test_a_target_is_one_entry(monkeypatch, capsys):
  """What plan, help and errors need to know of a target stands in its entry."""
  moon = Target(
    about="a computer on the moon",
    options=(Option("lander", "Which one.", required=True), Option("cable", "It has one.", False)),
    render=lambda job: Rendered(commands=(("fly", job.options.lander, *job.arguments),)),
    topology=False,
    shared_by="cable",
    mount_hint="carry {bucket} there",
  )
  monkeypatch.setitem(run.TARGETS, "moon", moon)
  argv = ["--target=moon", "--lander=eagle", "--", *HERE, "--config.base=/disk/base"]
  assert run.main(argv) == 1
  assert "workers could not share it; expected gs://BUCKET/..., or" in capsys.readouterr().err
  (command,) = render(["--cable", *argv]).commands
  assert command[:2] == ("fly", "eagle") and "--config.base=/disk/base" in command
  assert run.main(["--cable", *argv, "--config.base=gs://b/x"]) == 1
  assert "gs://b must be mounted, since training reads and writes files: carry b" in (
    capsys.readouterr().err
  )
  assert run.main(["--topology=v5e:4x4", *argv]) == 1
  assert "--topology=v5e:4x4 is not for --target=moon" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    run.main(["--help"])
  assert "--target=moon: a computer on the moon" in capsys.readouterr().out


def test_help_lists_every_option(capsys):
  with pytest.raises(SystemExit):
    run.main(["--help"])
  text = capsys.readouterr().out
  for name, target in run.TARGETS.items():
    section = text[text.index(f"--target={name}:") :]
    assert all(f"--{option.name} " in section for option in target.options)


@pytest.mark.parametrize("name, tool", [("tpu_vm", "gcloud"), ("xpk", "xpk"), ("slurm", "sbatch")])
def test_a_missing_program_is_named_before_anything_is_written(
  name, tool, tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv("PATH", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  assert run.main(list(CASES[name])) == 1
  assert f"error: {tool} is not on PATH; " in capsys.readouterr().err
  assert not any(tmp_path.iterdir())


def test_colab_writes_its_notebook(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert run.main(list(CASES["colab"])) == 0
  (path,) = (p for p in tmp_path.rglob("*") if p.is_file())
  assert path.relative_to(tmp_path) == pathlib.Path("runs/launch/demo/demo.ipynb")
