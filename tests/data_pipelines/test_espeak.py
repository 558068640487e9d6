import sys

import numpy as np
import pytest

from aromni_jax.data_pipelines import espeak

TEXTS = ["three lemons on gray", "one butterfly on purple"]


@pytest.fixture(scope="module")
def spoken():
  return espeak.synthesise("f2", TEXTS)


def test_two_processes_say_the_same_bytes(spoken):
  again = espeak.synthesise("f2", TEXTS)
  assert [c.tobytes() for c in again] == [c.tobytes() for c in spoken]


def test_clips_are_phrases_at_16_khz(spoken):
  assert len(spoken) == len(TEXTS)
  for clip in spoken:
    assert clip.dtype == np.int16 and clip.ndim == 1
    assert 0.5 < len(clip) / espeak.SAMPLE_RATE < 3
    assert 2000 < np.abs(clip.astype(int)).max() < 32767


def test_silence_around_the_phrase_is_cut(spoken):
  for clip in spoken:
    loud = np.flatnonzero(np.abs(clip.astype(int)) > 200)
    assert loud[0] <= 800 and len(clip) - loud[-1] <= 801


def test_every_voice_exists_and_differs(spoken):
  clips = {v: espeak.synthesise(v, TEXTS[:1])[0] for v in espeak.VOICES if v != "f2"}
  clips["f2"] = spoken[0]
  assert len({c.tobytes() for c in clips.values()}) == len(espeak.VOICES) == 4


def test_unknown_voice_is_refused():
  with pytest.raises(ValueError, match="voice 'f9' does not exist; expected one of f2, f5, m2, f3"):
    espeak.synthesise("f9", TEXTS)


def test_voice_that_espeak_does_not_have_is_an_error(monkeypatch):
  monkeypatch.setitem(espeak.VOICES, "gb", "en-gb")  # its file is gmw/en
  with pytest.raises(RuntimeError, match="no voice 'en-gb'"):
    espeak.synthesise("gb", TEXTS)


def test_missing_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "espeakng_loader", None)
  with pytest.raises(ImportError, match=r"aromni_jax\[demo\]"):
    espeak.synthesise("f2", TEXTS)


def test_nothing_to_say_is_an_empty_list():
  assert espeak.synthesise("f2", []) == []


def test_text_without_sound_is_an_error():
  with pytest.raises(RuntimeError, match="said nothing for ''"):
    espeak.synthesise("f2", [""])
