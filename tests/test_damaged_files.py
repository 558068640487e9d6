"""Whatever happened to model.json, a manifest or an index, reading names the file in one error."""

import json
import pathlib
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aromni_jax import model_dir
from aromni_jax.data import token_shards
from aromni_jax.data.token_shards import TokenShards
from aromni_jax.model import load_model
from aromni_jax.vocabulary import get_vocabulary
from tests.tiny import random_samples

DEMO = get_vocabulary("demo")
JUNK = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-3, 3),
  st.floats(),
  st.text(max_size=3),
  st.lists(st.integers(-3, 3), max_size=3),
  st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp("damaged") / "model"
  shutil.copytree(model_dir.SHIPPED, path)
  return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
  path = tmp_path_factory.mktemp("damaged") / "shards"
  token_shards.write(path, {"train": random_samples(5)}, DEMO, {"recipe": "paper"})
  return path


def places(data, path=()):
  """Yields the path of every value in nested dicts."""
  for key, value in data.items():
    yield (*path, key)
    if isinstance(value, dict):
      yield from places(value, (*path, key))


@st.composite
def damaged(draw, file: pathlib.Path):
  """The text of a JSON file after something happened to it."""
  text = file.read_text()
  kind = draw(st.sampled_from(["cut", "missing", "wrong", "more", "newer", "other"]))
  if kind == "cut":
    return text[: draw(st.integers(0, len(text.rstrip()) - 1))]
  if kind == "other":
    return json.dumps(draw(JUNK))
  data = json.loads(text)
  path = draw(st.sampled_from(list(places(data))))
  parent = data
  for key in path[:-1]:
    parent = parent[key]
  if kind == "missing":
    del parent[path[-1]]
  elif kind == "wrong":
    parent[path[-1]] = draw(JUNK)
  elif kind == "more":
    parent[draw(st.text(min_size=1, max_size=5))] = draw(JUNK)
  else:
    data["version"] = draw(st.integers(2, 100))
  return json.dumps(data)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_to_model_json_is_an_error_that_names_it(model, data):
  file = model / "model.json"
  whole = model_dir.SHIPPED / "model.json"
  file.write_text(data.draw(damaged(whole)))
  try:
    load_model(model, decoder=False)
    model_dir.decoder_config(model)
  except (ValueError, FileNotFoundError) as e:
    assert str(model) in str(e), e
    assert "\n" not in str(e)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_to_a_manifest_is_an_error_that_names_it(shards, data):
  file = shards / "manifest.json"
  whole = file.with_name("whole.json")
  if not whole.exists():
    shutil.copy(file, whole)
  file.write_text(data.draw(damaged(whole)))
  try:
    TokenShards(shards, "train", DEMO)
  except (ValueError, FileNotFoundError) as e:
    assert str(shards) in str(e), e
    assert "\n" not in str(e)


@pytest.mark.parametrize("change", [lambda f: f.unlink(), lambda f: f.write_bytes(b"PK"), None])
def test_damage_to_an_index_is_an_error_that_names_it(tmp_path, change):
  token_shards.write(tmp_path / "s", {"train": random_samples(5)}, DEMO, {})
  file = tmp_path / "s/train.npz"
  if change is None:
    file.write_bytes(file.read_bytes()[:-40])
  else:
    change(file)
  with pytest.raises((ValueError, FileNotFoundError), match=r"s/train.npz is (damaged|missing)"):
    TokenShards(tmp_path / "s", "train", DEMO)
