import os
import subprocess
import sys

import pytest

from aromni_jax.cluster import xla_flags


@pytest.mark.parametrize("platform", xla_flags.FLAGS)
def test_every_setting_stands_once_and_has_a_reason(platform):
  settings = (*xla_flags.FLAGS[platform], *xla_flags.VARIABLES[platform])
  names = [setting.name for setting in settings]
  assert len(set(names)) == len(names)
  for setting in settings:
    assert setting.value and len(setting.reason) > 10, setting.name


def start_jax(flags):
  env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
  command = [sys.executable, "-c", "import jax; jax.devices()"]
  return subprocess.run(command, env=env, capture_output=True, text=True)


def test_xla_knows_the_gpu_flags():
  """XLA refuses to start with a flag that it does not know, on any platform."""
  done = start_jax(xla_flags.flags_value("gpu"))
  assert done.returncode == 0, done.stderr
  assert start_jax("--xla_gpu_no_such_flag=true").returncode != 0
