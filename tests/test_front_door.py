"""What a newcomer does first, with the wheel in a fresh environment and in an empty folder."""

from aromni_jax.cli import JOBS


def test_help_lists_every_job(installed, tmp_path):
  done = installed.aromni("--help", cwd=tmp_path)
  assert done.returncode == 0 and all(job in done.stdout for job in JOBS)
