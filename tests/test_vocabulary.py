import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aromni_jax import vocabulary as v

PRESETS = ("aromni_7b", "demo")


@pytest.mark.parametrize("name", PRESETS)
def test_every_id_has_one_modality(name):
  vocabulary = v.get_vocabulary(name)
  ids = np.arange(vocabulary.size)
  counts = np.bincount(vocabulary.modality_of(ids), minlength=4)
  parts = [len(vocabulary.text), len(vocabulary.image), len(vocabulary.speech)]
  assert counts.tolist() == [*parts, vocabulary.size - sum(parts)]
  specials = np.array(list(vocabulary.special_ids.values()))
  assert len(set(specials.tolist())) == len(v.SPECIAL_NAMES)
  assert (vocabulary.modality_of(specials) == v.SPECIAL).all()


def test_released_ids():
  """Ids of the released layout (public AR-Omni code)."""
  a = v.get_vocabulary("aromni_7b")
  assert a.image_ids(np.array([0, 8191])).tolist() == [4, 8195]
  assert a.speech_ids(np.array([0, 4095])).tolist() == [8724, 12819]
  assert (a.boi, a.eoi, a.boa, a.eoa) == (8197, 8196, 12821, 12820)
  assert (a.eoh, a.eom, a.instruction, a.response) == (12830, 12831, 12840, 12841)


def test_numpy_and_jax_agree_also_under_jit():
  d = v.get_vocabulary("demo")
  ids = np.arange(d.size, dtype=np.int32).reshape(2, -1)
  out = jax.jit(d.modality_of)(jnp.asarray(ids))
  assert isinstance(out, jax.Array) and out.dtype == jnp.int8
  np.testing.assert_array_equal(out, d.modality_of(ids))
  codes = jnp.arange(5)
  np.testing.assert_array_equal(jax.jit(lambda c: d.image_codes(d.image_ids(c)))(codes), codes)


def test_codes_outside_the_book_are_refused():
  d = v.get_vocabulary("demo")
  with pytest.raises(ValueError, match="1024 is not a speech code; expected 0..1023"):
    d.speech_ids(np.array([3, 1024]))
  with pytest.raises(ValueError, match="3 is not a image id; expected 4..1027"):
    d.image_codes(np.array([3]))


def test_overlaps_are_refused():
  d = v.get_vocabulary("demo")
  with pytest.raises(ValueError, match="id 0 is both bos and pad"):
    dataclasses.replace(d, pad=0)
  with pytest.raises(ValueError, match="id 1028 is both image and eoi"):
    dataclasses.replace(d, image=range(4, 1029))
  with pytest.raises(ValueError, match="leaves the id space"):
    dataclasses.replace(d, size=2060)


def test_dict_round_trip_and_fingerprint():
  d = v.get_vocabulary("demo")
  assert v.Vocabulary.from_dict(d.to_dict()) == d
  assert dataclasses.replace(d, name="other").fingerprint() == d.fingerprint()
  assert dataclasses.replace(d, speech_rate=50).fingerprint() != d.fingerprint()
  with pytest.raises(ValueError, match=r"unknown keys \['x'\], missing keys \['bos'\]"):
    v.Vocabulary.from_dict({k: w for k, w in d.to_dict().items() if k != "bos"} | {"x": 1})


@pytest.mark.parametrize("name", PRESETS)
def test_fingerprints_stay(name):
  """Every shard and model directory says them."""
  known = {"aromni_7b": "2070601b43b616bb", "demo": "df078631d5e83d51"}
  assert v.get_vocabulary(name).fingerprint() == known[name]


def test_versions():
  data = v.get_vocabulary("demo").to_dict()
  assert data["version"] == v.VERSION == 1
  older = {key: value for key, value in data.items() if key != "version"}
  assert v.Vocabulary.from_dict(older) == v.get_vocabulary("demo")
  with pytest.raises(ValueError, match="vocabulary: version is 2, and .* up to 1: made by a newer"):
    v.Vocabulary.from_dict(data | {"version": 2})


@pytest.mark.parametrize(
  "change, message",
  [
    ({"bos": "0"}, "bos is '0'; expected a whole number"),
    ({"bos": True}, "bos is True; expected a whole number"),
    ({"text": 5}, "text is 5; expected a list"),
    ({"text": [5]}, r"text is \[5\]; expected \[first id, the id after the last\]"),
    ({"name": None}, "name is None; expected a text"),
  ],
)
def test_wrong_values_are_named(change, message):
  with pytest.raises(ValueError, match=f"vocabulary: {message}"):
    v.Vocabulary.from_dict(v.get_vocabulary("demo").to_dict() | change)


def test_unknown_presets_are_named():
  with pytest.raises(ValueError, match="vocabulary 'x' does not exist"):
    v.get_vocabulary("x")
