"""The cache of compiled programs: where it is, how to turn it off, and what happens if it cannot be
written. tests/test_front_door.py sees a second call find what the first compiled."""

import os
import stat
import subprocess
import sys

import pytest

from aromni_jax import compilation_cache

JOB = """
from aromni_jax import compilation_cache
print(compilation_cache.enable())
import jax, jax.numpy as jnp
print(float(jax.jit(lambda x: jnp.sin(x) + 1)(jnp.float32(2))))
"""


def job(**variables):
  """Returns the folder that a process names, what it computed, and what it said."""
  env = {k: v for k, v in os.environ.items() if k != "AROMNI_CACHE"} | variables
  done = subprocess.run([sys.executable, "-c", JOB], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return *done.stdout.split(), done.stderr


@pytest.mark.parametrize(
  "variables, place",
  [
    ({"XDG_CACHE_HOME": "{0}/xdg"}, "{0}/xdg/aromni_jax/"),
    ({"XDG_CACHE_HOME": "", "HOME": "{0}/home"}, "{0}/home/.cache/aromni_jax/"),
    ({"AROMNI_CACHE": "{0}/there", "XDG_CACHE_HOME": "{0}/xdg"}, "{0}/there/"),
    ({"AROMNI_CACHE": "~/there", "HOME": "{0}"}, "{0}/there/"),
  ],
)
def test_small_programs_are_kept_in_the_folder_of_this_machine(variables, place, tmp_path):
  folder, value, said = job(**{k: v.format(tmp_path) for k, v in variables.items()})
  assert folder == place.format(tmp_path) + compilation_cache._machine() and not said
  assert [f.name for f in tmp_path.rglob("jit__lambda*-cache")]
  assert float(value) == pytest.approx(1.909297)


@pytest.mark.parametrize("name", ["off", "jax's own"])
def test_is_off_or_left_to_jax(name, tmp_path):
  variables = {"AROMNI_CACHE": "off", "XDG_CACHE_HOME": str(tmp_path)}
  if name != "off":
    own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax"), "AROMNI_CACHE": str(tmp_path / "x")}
    variables |= own
  folder, _, said = job(**variables)
  assert folder == "None" and not said
  assert not list(tmp_path.rglob("*-cache"))  # JAX's own rules keep what takes a second to compile


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path):
  (tmp_path / "file").write_text("")
  folder, value, said = job(AROMNI_CACHE=str(tmp_path / "file"))
  assert folder == "None" and float(value) == pytest.approx(1.909297)
  (line,) = said.splitlines()
  assert "Compiled programs are not kept: " in line and "AROMNI_CACHE=FOLDER" in line


def test_the_oldest_programs_go_when_there_are_too_many(tmp_path):
  folder = tmp_path / "inner"
  folder.mkdir()
  for i in range(10):
    file = (folder if i % 2 else tmp_path) / f"{i}-cache"
    file.write_bytes(bytes(100))
    os.utime(file, (i, i))
  compilation_cache._shrink(tmp_path, 1000)
  assert len(list(tmp_path.rglob("*-cache"))) == 10
  compilation_cache._shrink(tmp_path, 999)
  left = sorted(f.name for f in tmp_path.rglob("*-cache"))
  assert left == [f"{i}-cache" for i in range(6, 10)]
  assert stat.S_ISDIR(folder.stat().st_mode)


@pytest.mark.slow
def test_torn_programs_are_compiled_again(tmp_path):
  """A process that is killed while it writes leaves half a file."""
  env = {"AROMNI_CACHE": str(tmp_path)}
  expected = job(**env)[1]
  files = list(tmp_path.rglob("*-cache"))
  for cut in (0, 10):
    for file in files:
      file.write_bytes(file.read_bytes()[:cut])
    assert job(**env)[1] == expected
