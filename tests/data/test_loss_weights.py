import dataclasses

import numpy as np
import pytest

from aromni_jax.data.loss_weights import LossWeightConfig, between, loss_weights
from aromni_jax.sample import Sample
from aromni_jax.vocabulary import get_vocabulary

VOCABULARY = get_vocabulary("demo")


def test_loss_weights_follow_the_response():
  ids = np.array([VOCABULARY.bos, 2100, 2101, VOCABULARY.eoh, 2102, 2103, 2104, VOCABULARY.eos])
  heard = Sample(ids, "speech_to_text", 4, "k")
  weights = loss_weights(heard, VOCABULARY, LossWeightConfig(prompt=0.5, boosted=3.0))
  # Targets of positions 3..5 are the response's ids 4..6; id 7 is the closing eos.
  np.testing.assert_array_equal(weights, [0.5, 0.5, 0.5, 3, 3, 3, 1, 0])
  plain = loss_weights(
    dataclasses.replace(heard, task="text_to_image"), VOCABULARY, LossWeightConfig()
  )
  np.testing.assert_array_equal(plain, [1, 1, 1, 1, 1, 1, 1, 0])


def test_the_transcript_is_weighted_up_to_the_next_unused_response_id():
  opening, closing = VOCABULARY.instruction, VOCABULARY.response
  for ids, inside in {
    (2100, opening, 2101, 2102, closing, 2103): [2, 3],
    (opening, 2100, opening, 2101, closing, 2102, closing, 2103): [1, 2, 3, 4, 5],
    (closing, opening, 2100, opening, 2101, closing, 2102): [2, 3, 4],
    (opening, closing, opening, 2100): [],
    (opening, 2100, closing, closing, opening, 2101, closing): [1, 5],
  }.items():
    sample = Sample(np.array([VOCABULARY.bos, *ids]), "dialogue", 1, "k")
    weights = loss_weights(sample, VOCABULARY, LossWeightConfig(transcript=4.0))
    want = np.ones(len(ids) + 1)
    want[inside], want[-1] = 4.0, 0.0
    np.testing.assert_array_equal(weights, want, err_msg=str(ids))


def test_each_response_of_a_dialogue_counts_and_what_stands_between_does_not():
  ids = np.array([VOCABULARY.bos, *range(2100, 2108), VOCABULARY.eos], np.int32)
  spans = np.array([[2, 4], [7, 10]], np.int32)
  sample = Sample(ids, "dialogue", 2, "k", spans)
  config = LossWeightConfig(prompt=0.25, response=1.5, boosted=3.0)
  #         target: 1     2    3    4     5     6     7    8    9
  plain = [0.25, 1.5, 1.5, 0.25, 0.25, 0.25, 1.5, 1.5, 1.5, 0]
  np.testing.assert_array_equal(loss_weights(sample, VOCABULARY, config), plain)
  boosted = [0.25, 3.0, 3.0, 0.25, 0.25, 0.25, 3.0, 3.0, 1.5, 0]
  config = dataclasses.replace(config, boosted_tasks=["dialogue"])  # as a config file has it
  assert config == dataclasses.replace(config, boosted_tasks=("dialogue",))
  got = loss_weights(sample, VOCABULARY, config)
  np.testing.assert_array_equal(got, boosted)
  assert got.dtype == np.float32


def test_the_defaults_are_those_of_the_released_code():
  assert LossWeightConfig() == LossWeightConfig(
    1.0, 1.0, 2.0, ("image_caption", "speech_to_text"), 1.0
  )


def test_transcripts_only_count_otherwise_if_they_are_asked_to():
  opening, closing = VOCABULARY.instruction, VOCABULARY.response
  ids = np.array([VOCABULARY.bos, opening, 2100, 2101, closing, VOCABULARY.eos])
  sample = Sample(ids, "dialogue", 1, "k")
  for factor in (0.0, 0.5, 1.0):
    got = loss_weights(sample, VOCABULARY, LossWeightConfig(response=2.0, transcript=factor))
    np.testing.assert_array_equal(got, [2, 2 * factor, 2 * factor, 2, 2, 0])
  assert between(ids, opening, closing).tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize("name", ["prompt", "response", "boosted", "transcript"])
def test_negative_weights_are_named(name):
  LossWeightConfig(**{name: 0.0})
  with pytest.raises(ValueError, match=f"data.loss_weights.{name} is -0.5; it must be >= 0"):
    LossWeightConfig(**{name: -0.5})
