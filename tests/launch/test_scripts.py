"""Rendered scripts run, with programs on PATH that stand in for gcloud, xpk, SLURM and Python.

The stand-ins record what they are given. Arguments must reach the training unchanged, and each
kind of end must have its consequence.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from aromni_jax.launch import run

ROOT = pathlib.Path(__file__).parents[2]
AWKWARD = (
  "--workdir=gs://bucket/first run",
  '--config.data.shards=gs://bucket/it\'s "so"/$HOME/`date`/\\n/*/{a}/%(b)s/#!&',
  "--config.base=gs://bucket/anole",
)
MOUNTS = {"--target=tpu_vm", "--target=xpk"}
CLOUD = ("--project=p", "--zone=z", "--name=first")

# Plays the interpreter of a worker: records the training, then ends as the next of `ends` says.
PYTHON = """\
#!{python}
import json, os, pathlib, signal, sys, time
place = pathlib.Path({place!r})
if "pip" in sys.argv:
  uv = pathlib.Path.home() / ".local/bin/uv"
  uv.parent.mkdir(parents=True, exist_ok=True)
  uv.write_text('#!/bin/bash\\nmkdir -p .venv/bin; cp ' + {own!r} + ' .venv/bin/python\\n')
  uv.chmod(0o755)
  sys.exit()
with (place / "trainings").open("a") as f:
  f.write(json.dumps([sys.argv[1:], os.environ.get("JAX_PLATFORMS")]) + "\\n")
print("a line of the log", flush=True)
if (place / "wait").exists():
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))  # saves and leaves, as the training does
  (place / "starting").write_text(str(os.getpid()))
  (place / "starting").rename(place / "waiting")
  time.sleep(60)
ends = (place / "ends").read_text().split() if (place / "ends").exists() else []
(place / "ends").write_text(" ".join(ends[1:]))
end = ends[0] if ends else "0"
if end == "preempted":
  (place / "state").write_text("SUSPENDED")
  os.kill(os.getppid(), signal.SIGKILL)
  sys.exit(1)
sys.exit(int(end))
"""

# One worker is enough: ends are taken one by one.
GCLOUD = """\
#!{python}
import json, os, pathlib, shutil, subprocess, sys
place, argv = pathlib.Path({place!r}), sys.argv[1:]
with (place / "gcloud").open("a") as f:
  f.write(json.dumps(argv) + "\\n")
if argv[:2] == ["storage", "cp"]:
  target = place / argv[-1].replace("gs://", "bucket/")
  target.parent.mkdir(parents=True, exist_ok=True)
  shutil.copy(argv[-2], target)
  sys.exit()
assert argv[:3] == ["compute", "tpus", "queued-resources"], argv
verb, state, home = argv[3], place / "state", place / "worker"
if verb == "create":
  state.write_text("ACTIVE")
  home.mkdir()
elif verb == "describe":
  if not state.exists():
    sys.exit("ERROR: NOT_FOUND: no such resource")
  print(state.read_text())
elif verb == "delete":
  state.unlink()
  shutil.rmtree(home)
elif verb == "scp":
  *files, target = [a for a in argv[4:] if not a.startswith("-")]
  for file in files:
    shutil.copy(file, home / target.partition(":")[2])
elif verb == "ssh":
  (command,) = [a.partition("=")[2] for a in argv if a.startswith("--command=")]
  code = subprocess.run(["bash", "-c", command], cwd=home, env=os.environ | {{"HOME": str(home)}})
  sys.exit(255 if state.read_text() != "ACTIVE" else code.returncode)
"""

XPK = """\
#!{python}
import json, pathlib, subprocess, sys
place, argv = pathlib.Path({place!r}), sys.argv[1:]
(place / "xpk").write_text(json.dumps(argv))
value = dict(a[2:].split("=", 1) for a in argv if a.startswith("--"))
# As in the pods that xpk makes.
sys.exit(subprocess.run(["bash", "-c", "(" + value["command"] + ") & PID=$!; wait $PID"],
                        cwd=value["script-dir"]).returncode)
"""

# mountpoint says that nothing is mounted yet.
MOUNT = """\
#!{python}
import json, pathlib, sys
with (pathlib.Path({place!r}) / "mounts").open("a") as f:
  f.write(json.dumps([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
sys.exit(sys.argv[0].endswith("mountpoint"))
"""

SLURM = """\
#!{python}
import json, os, pathlib, signal, subprocess, sys
place, name, argv = pathlib.Path({place!r}), pathlib.Path(sys.argv[0]).name, sys.argv[1:]
with (place / "slurm").open("a") as f:
  f.write(json.dumps([name, *argv]) + "\\n")
if name == "sbatch":
  sys.exit(subprocess.run(["bash", argv[0]], env=os.environ | {{"SLURM_JOB_ID": "7"}}).returncode)
if name == "srun":
  first = next(i for i, a in enumerate(argv) if not a.startswith("--"))
  os.execvp(argv[first], argv[first:])
if name == "scancel":
  os.kill(int((place / "waiting").read_text()), signal.SIGTERM)
"""


def line(own):
  """The training line of a launch: the configuration for its chips, and awkward words."""
  (topology,) = (a.partition("=")[2] for a in own if a.startswith("--topology="))
  name = "demo.py:shipped" if topology == "v5e:1x1" else f"pretrain_7b.py:{topology}"
  awkward = AWKWARD if MOUNTS & set(own) else [a.replace("gs://bucket", "/shared") for a in AWKWARD]
  return [f"--config=configs/{name}", *awkward]


def training(own):
  """What the training is given: buckets are mounted."""
  words = [word.replace("gs://bucket", "/mnt/bucket") for word in line(own)]
  return ["-m", "aromni_jax.train", *words, "--coordinator=auto"]


class Place:
  """A folder that plays the checkout, with stand-ins for programs."""

  def __init__(self, path):
    self.path = path
    for name in ("aromni_jax", "configs", "data_pipelines", "launch", "bin"):
      (path / name).mkdir()
    for name in ("setup.py", "pyproject.toml"):
      (path / name).touch()
    programs = {"python": PYTHON, "python3": PYTHON, "gcloud": GCLOUD, "xpk": XPK}
    programs |= {name: MOUNT for name in ("mountpoint", "sudo", "gcsfuse")}
    programs |= {name: SLURM for name in ("sbatch", "srun", "scontrol", "scancel")}
    for name, text in programs.items():
      file = path / "bin" / name
      own = str(path / "bin/python")
      file.write_text(text.format(python=sys.executable, place=str(path), own=own))
      file.chmod(0o755)
    # Keeps the order of looks, but does not wait; no end comes too soon.
    self.env = os.environ | {"PATH": f"{path / 'bin'}:{os.environ['PATH']}"}
    self.env |= {"LOOK": "0.1", "SOON": "0"}

  def start(self, *argv):
    """Starts the script that a command line renders."""
    script = run.plan([*argv, "--", *line(argv)])[1].script()
    (self.path / "script.sh").write_text(script)
    return subprocess.Popen(
      ["bash", "-e", "script.sh"],
      cwd=self.path,
      env=self.env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,
    )

  def run(self, *argv):
    process = self.start(*argv)
    output = process.communicate(timeout=60)[0]
    return process.returncode, output

  def records(self, name):
    path = self.path / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def wait_for(self, name):
    deadline = time.time() + 30
    while not (self.path / name).exists():
      assert time.time() < deadline, f"{name} did not appear"
      time.sleep(0.01)


@pytest.fixture
def place(tmp_path):
  return Place(tmp_path)


TPU_VM = ("--target=tpu_vm", "--topology=v5e:16x16", *CLOUD)


def test_tpu_vm_passes_the_line_and_collects_logs(place):
  code, output = place.run(*TPU_VM)
  assert code == 0, output
  assert place.records("trainings") == [[training(TPU_VM), "tpu,cpu"]]
  assert "] a line of the log" in (place.path / "runs/launch/first/train.log").read_text()
  (log,) = (place.path / "bucket/bucket/first run/logs").rglob("*.log")
  assert log.read_text() == "a line of the log\n"
  assert ["gcsfuse", "--implicit-dirs", "bucket", "/mnt/bucket"] in place.records("mounts")
  verbs = [argv[3] for argv in place.records("gcloud") if argv[0] == "compute"]
  asked = ["describe", "create", "describe", "ssh", "scp", "ssh", "ssh", "delete"]
  assert verbs == asked, output


def test_tpu_vm_restarts_crashes_and_books_again_after_preemptions(place):
  """42 is no crash: a host was lost, or told to stop."""
  (place.path / "ends").write_text("137 preempted 42 134 0")
  code, output = place.run(*TPU_VM, "--restarts=2")
  assert code == 0, output
  assert place.records("trainings") == [[training(TPU_VM), "tpu,cpu"]] * 5
  verbs = [argv[3] for argv in place.records("gcloud") if argv[0] == "compute"]
  assert verbs.count("create") == verbs.count("delete") == 2, output


@pytest.mark.parametrize("end, soon", [("137", "0"), ("42", "1000")])
def test_tpu_vm_gives_up_after_its_restarts_and_releases(place, end, soon):
  """Of crashes, and of ends that come too soon for a training: hosts that cannot be reached."""
  (place.path / "ends").write_text(f"{end} {end} {end}")
  place.env["SOON"] = soon
  code, output = place.run(*TPU_VM, "--restarts=1")
  assert code == int(end) and "more than --restarts=1" in output
  assert len(place.records("trainings")) == 2
  assert not (place.path / "state").exists()


def test_tpu_vm_does_not_restart_an_error(place):
  (place.path / "ends").write_text("1 0")
  code, output = place.run(*TPU_VM)
  assert code == 1 and "an error that would come again" in output
  assert len(place.records("trainings")) == 1 and not (place.path / "state").exists()


def test_tpu_vm_joins_what_still_runs(place):
  """The controller is stopped and started again: the training is the same one."""
  (place.path / "wait").touch()
  first = place.start(*TPU_VM)
  place.wait_for("waiting")
  os.killpg(first.pid, signal.SIGKILL)
  pid = int((place.path / "worker/first/pid").read_text())
  second = place.start(*TPU_VM)
  try:
    for line in second.stdout:
      if "] a line of the log" in line:
        break
    assert len(place.records("trainings")) == 1
    (place.path / "wait").unlink()
    os.kill(pid, signal.SIGTERM)  # as when the VM goes down: saved, but not at its end
    rest = second.communicate(timeout=60)[0]
  finally:
    if second.poll() is None:
      os.killpg(second.pid, signal.SIGKILL)
    first.communicate()
  assert second.returncode == 0 and "told to stop, or a host is lost" in rest
  assert len(place.records("trainings")) == 2


def test_tpu_vm_stops_if_the_booking_fails(place):
  (place.path / "state").write_text("FAILED")
  code, output = place.run(*TPU_VM)
  assert code == 1 and "the booking failed" in output
  assert not place.records("trainings")


XPK_LINE = ("--target=xpk", "--topology=2xv5e:16x16", *CLOUD, "--cluster=c", "--storage=disk")


def test_xpk_passes_the_line(place):
  code, output = place.run(*XPK_LINE)
  assert code == 0, output
  assert place.records("trainings") == [[training(XPK_LINE), "tpu,cpu"]]
  (argv,) = place.records("xpk")
  assert argv[:2] == ["workload", "create"]
  assert {"--device-type=v5litepod-256", "--num-slices=2"} <= set(argv)


def test_a_stopped_pod_does_not_look_finished(place):
  """The training itself is told, and its 42 reaches xpk, which restarts after it."""
  place.run(*XPK_LINE)
  (place.path / "wait").touch()
  command = ["bash", "train.sh"]
  pod = subprocess.Popen(command, cwd=place.path / "runs/launch/first/source", env=place.env)
  place.wait_for("waiting")
  pod.terminate()
  assert pod.wait(timeout=30) == 42


SBATCH = ("--target=slurm", "--topology=h100:8", "--name=first", "--python=python")
REQUEUE = ["scontrol", "requeue", "7"]


def test_slurm_passes_the_line(place):
  code, output = place.run(*SBATCH)
  assert code == 0, output
  assert place.records("trainings") == [[training(SBATCH), "cuda,cpu"]]
  assert REQUEUE not in place.records("slurm")


@pytest.mark.parametrize(
  "end, soon, requeued",
  [
    ("137", "0", [1, 1]),
    ("42", "0", [1, 2]),  # a node was lost: no crash
    ("42", "1000", [1, 1]),  # nodes that cannot be reached, so soon
    ("1", "0", [0, 0]),  # an error that would come again
  ],
)
def test_slurm_queues_crashes_again_up_to_its_restarts(place, end, soon, requeued):
  (place.path / "ends").write_text(f"{end} {end}")
  place.env["SOON"] = soon
  for count in requeued:
    assert place.run(*SBATCH, "--restarts=1")[0] == int(end)
    assert place.records("slurm").count(REQUEUE) == count


@pytest.mark.parametrize("number, requeued", [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_queues_a_job_at_its_time_limit_again(place, number, requeued):
  """SLURM sends what --signal names before the limit; SIGTERM is scancel, which must not.

  The tasks are told: srun makes SIGKILL of the SIGTERM that it gets.
  """
  (place.path / "wait").touch()
  (script,) = run.plan([*SBATCH, "--restarts=0", "--", *line(SBATCH)])[1].files
  assert "#SBATCH --signal=B:USR1@" in script.text
  path = place.path / script.path
  path.parent.mkdir(parents=True)
  path.write_text(script.text)
  env = place.env | {"SLURM_JOB_ID": "7", "SOON": "1000"}
  job = subprocess.Popen(["bash", str(path)], cwd=place.path, env=env, start_new_session=True)
  place.wait_for("waiting")
  job.send_signal(number)
  code = job.wait(timeout=30)
  assert (code == 42) == requeued
  assert (["scancel", "--signal=TERM", "7"] in place.records("slurm")) == requeued
  assert (REQUEUE in place.records("slurm")) == requeued
  if not requeued:
    os.killpg(job.pid, signal.SIGKILL)  # SLURM tells the tasks itself


def test_colab_cells_pass_the_line(place):
  argv = ("--target=colab", "--topology=v5e:1x1", "--repository=unused", "--name=first")
  (file,) = run.plan([*argv, "--", *line(argv)])[1].files
  (cell,) = (c for c in json.loads(file.text)["cells"] if "aromni_jax.train" in str(c["source"]))
  magic, *lines = cell["source"]
  assert magic == "%%bash\n"
  subprocess.run(["bash", "-c", "".join(lines)], cwd=place.path, env=place.env, check=True)
  assert place.records("trainings") == [[training(argv)[:-1], "tpu,cpu"]]


def test_signals_reach_what_was_launched(place):
  """Without --dry-run: the command takes the launcher's place, and is told to save."""
  (place.path / "wait").touch()
  own = ("--target=local", f"--python={place.path / 'bin/python'}", f"--out={place.path}")
  words = ("--config=configs/demo.py:tiny", "--workdir=two words")
  command = [sys.executable, "-m", "aromni_jax.cli", "launch", *own, "--", *words]
  launcher = subprocess.Popen(command, cwd=ROOT, env=place.env)
  place.wait_for("waiting")
  launcher.terminate()
  assert launcher.wait(timeout=30) == 42
  ((argv, _),) = place.records("trainings")
  assert argv[:2] == ["-m", "aromni_jax.launch.processes"] and argv[-3:] == ["--", *words]
