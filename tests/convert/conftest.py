import pytest

from aromni_jax.convert.importer import Sources, convert
from tests import released


@pytest.fixture(scope="session")
def root(tmp_path_factory):
  """The folder that AR-Omni's inference reads, and a WavTokenizer beside it."""
  root = tmp_path_factory.mktemp("released")
  released.write_root(root)
  return root


@pytest.fixture(scope="session")
def model(root):
  """The model directory of it."""
  out = root.with_name("model")
  convert(Sources(root), out)
  return out
