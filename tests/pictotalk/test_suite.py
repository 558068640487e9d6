import numpy as np
import pytest

from aromni_jax.data_pipelines import espeak
from aromni_jax.evaluation.metrics import wer
from aromni_jax.evaluation.metrics.captions import caption_scores
from aromni_jax.pictotalk import speech_recogniser, world
from aromni_jax.pictotalk.scene_reader import read_scene, scene_scores
from aromni_jax.pictotalk.world import Caption


def test_error_rates_by_hand():
  scores = wer.error_rates(["two dogs on blue", "One egg."], ["two dog on blue", "one egg"])
  assert scores["wer"] == pytest.approx(1 / 6)
  assert scores["cer"] == pytest.approx(1 / 23)
  with pytest.raises(ValueError, match="no reference may be empty"):
    wer.error_rates(["?"], ["a"])


def test_caption_scores_by_hand():
  scores = caption_scores(["two dogs on blue", "one egg on red"], ["Two dogs, on blue", "one egg"])
  assert scores == {"exact": 0.5, "word_accuracy": 6 / 8}
  with pytest.raises(ValueError, match="at least one pair"):
    caption_scores([], [])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_reader_reads_clean_scenes(count):
  for i, name in enumerate(world.OBJECTS[count::9]):
    caption = Caption(count, name, list(world.COLOURS)[i % 8])
    assert read_scene(world.draw_scene(caption, i)) == caption


def test_reader_reads_scenes_of_new_objects_among_all():
  caption = Caption(3, "zebra", "green")
  objects = world.OBJECTS + world.NEW_OBJECTS
  assert read_scene(world.draw_scene(caption, 0), objects) == caption


def test_reader_refuses_other_pictures():
  with pytest.raises(ValueError, match=r"shape \(32, 32, 3\); expected \(64, 64, 3\)"):
    read_scene(np.zeros((32, 32, 3), np.uint8))


def test_scene_scores_by_hand():
  truth = [Caption(1, "dog", "red"), Caption(2, "egg", "blue")]
  found = [Caption(1, "cow", "red"), Caption(2, "egg", "blue")]
  assert scene_scores(truth, found) == {"count": 1, "object": 0.5, "colour": 1, "all": 0.5}


def test_recogniser_hears_what_espeak_says():
  texts = ["three lemons on gray", "one rocket on purple", "two dogs on blue", "four bees on pink"]
  heard = [
    speech_recogniser.recognise(clip.astype(np.float32) / 32768)
    for clip in espeak.synthesise("f5", texts)
  ]
  assert wer.error_rates(texts, heard)["wer"] <= 1 / 16
  noise = np.random.default_rng(0).normal(size=16000).astype(np.float32) * 0.1
  assert speech_recogniser.recognise(noise) not in texts
