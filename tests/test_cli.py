import pathlib
import subprocess
import sys

import pytest

from aromni_jax.cli import JOBS

ROOT = pathlib.Path(__file__).parents[1]


def aromni(*args):
  return subprocess.run(
    [sys.executable, "-m", "aromni_jax.cli", *args], cwd=ROOT, capture_output=True, text=True
  )


def test_help_lists_the_jobs():
  done = aromni("--help")
  assert done.returncode == 0 and all(job in done.stdout for job in JOBS)


@pytest.mark.parametrize("job", JOBS)
def test_every_job_has_help(job):
  done = aromni(job, "--help")
  assert f"aromni {job} --" in done.stdout, done.stderr
  assert "flags:" in done.stdout


def test_an_unknown_job_is_named():
  done = aromni("sing")
  assert done.returncode == 1 and "job 'sing' does not exist; expected one of" in done.stderr
