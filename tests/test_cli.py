import pathlib
import re
import subprocess
import sys

import pytest

from aromni_jax.cli import GROUPS, JOBS

ROOT = pathlib.Path(__file__).parents[1]


def aromni(*args):
  return subprocess.run(
    [sys.executable, "-m", "aromni_jax.cli", *args], cwd=ROOT, capture_output=True, text=True
  )


def test_help_lists_the_jobs_by_group():
  done = aromni("--help")
  assert done.returncode == 0
  shown = [line.split()[0] for line in done.stdout.splitlines() if re.match("  [a-z]", line)]
  assert shown == list(JOBS)
  assert all(f"\n{group}:\n" in done.stdout for group in GROUPS)


@pytest.mark.parametrize("job", JOBS)
def test_every_job_has_help(job):
  done = aromni(job, "--help")
  assert done.returncode == 0, done.stderr
  assert f"aromni {job} --" in done.stdout
  assert "\n  --" in done.stdout


@pytest.mark.parametrize(
  "argv, message",
  [
    (["sing"], "job 'sing' does not exist; expected one of build_pictotalk, "),
    (["trian"], "job 'trian' does not exist; did you mean train?"),
    (["train", "--config=demo"], "--workdir missing"),
    (["train"], "--config and --workdir missing"),
    (["train", "--config.seed=1"], "name a --config before its fields"),
    (["train", "--workdirs=x"], "flag 'workdirs'. Did you mean: workdir"),
    (["plan", "--config=demo", "--topology=v5e:4x4", "x"], "unexpected arguments x; flags are"),
    (["generate", "--task=sing"], "flag --task=sing: value should be one of <image_caption|"),
  ],
)
def test_what_is_wrong_with_a_line_is_one_line(argv, message):
  done = aromni(*argv)
  assert done.returncode == 1 and done.stderr.startswith("error: ")
  assert message in done.stderr and done.stderr.count("\n") == 1
