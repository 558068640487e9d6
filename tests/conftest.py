"""Every test runs on 8 simulated CPU devices; this must happen before anything touches a device."""

import fcntl
import importlib.abc
import os
import pathlib
import sys

# Processes that tests start, too; libtpu, which compiles for TPUs, would look for chips in each.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# A program is compiled once for all tests, the jobs that they start, and the next run. JAX finds it
# by what it computes, so what is there is what would be compiled.
_PROGRAMS = pathlib.Path(__file__).parents[1] / ".pytest_cache/programs"
os.environ.setdefault("AROMNI_CACHE", str(_PROGRAMS))

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

from aromni_jax import compilation_cache  # noqa: E402

compilation_cache.enable()


class _OnlyForMarked(importlib.abc.MetaPathFinder):
  """Refuses what a test may import only if it has a marker: `make check` runs without it."""

  marker_of = {"torch": "torch", "transformers": "torch", "libtpu": "tpu"}
  markers = frozenset()  # of the test that runs

  def find_spec(self, name, path=None, target=None):
    marker = self.marker_of.get(name)
    if marker and marker not in self.markers:
      raise ModuleNotFoundError(
        f"{name}: only a test with @pytest.mark.{marker} may import it", name=name
      )


sys.modules.pop("libtpu", None)  # JAX has looked for it; it asks again when it compiles for TPUs
sys.meta_path.insert(0, _OnlyForMarked())

import pytest  # noqa: E402

from aromni_jax import model_dir  # noqa: E402
from aromni_jax.codecs.registry import CODECS  # noqa: E402
from aromni_jax.data import token_shards  # noqa: E402
from tests import installed as installed_lib  # noqa: E402
from tests.tiny import VOCABULARY, random_samples, text_model  # noqa: E402


def pytest_collection_modifyitems(items):
  for item in items:
    if "installed" in item.fixturenames:
      item.add_marker("wheel")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  _OnlyForMarked.markers = {marker.name for marker in item.iter_markers()}


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
  """Token shards of random samples that the shipped codecs could have made."""
  out = tmp_path_factory.mktemp("data") / "tokens"
  info = model_dir.read_info(model_dir.SHIPPED)
  metadata = {f"{name}_fingerprint": info[name]["fingerprint"] for name in CODECS}
  metadata["text_fingerprint"] = text_model().fingerprint()
  splits = {"train": random_samples(360), "validation": random_samples(36, seed=1)}
  token_shards.write(out, splits, VOCABULARY, metadata)
  return out


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
  """The wheel in an environment of its own, see tests/installed.py; `installed.aromni(...)`."""
  base = tmp_path_factory.getbasetemp()
  if os.environ.get("PYTEST_XDIST_WORKER"):
    base = base.parent  # the workers of a run share one
  with open(base / "installed.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    return installed_lib.install(base / "installed")
