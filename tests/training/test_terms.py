"""What the terms of the loss count, on batches written by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from aromni_jax.configs import base
from aromni_jax.data.batch import Batch
from aromni_jax.fields import to_dataclass
from aromni_jax.recipes import PAPER
from aromni_jax.tasks import get_task
from aromni_jax.training.terms import TERMS, LossConfig, active, count_targets, image_targets
from aromni_jax.vocabulary import get_vocabulary

VOCABULARY = get_vocabulary("demo")
FIRST, LAST = VOCABULARY.image.start, VOCABULARY.image.stop - 1


def batch_of(tokens, weights, tasks):
  tokens = jnp.array(tokens)
  targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=VOCABULARY.eos)
  ids = jnp.array([[get_task(task).id] * tokens.shape[1] for task in tasks])
  return Batch(tokens, targets, jnp.array(weights), ids, ids, ids)


BATCH = batch_of(
  [
    [VOCABULARY.bos, FIRST, LAST, FIRST + 7, VOCABULARY.image.stop, FIRST - 1],
    [VOCABULARY.bos, FIRST + 3, FIRST + 4, VOCABULARY.eos, VOCABULARY.eos, VOCABULARY.eos],
  ],
  # Of the id one further on: the first code of each row does not count.
  [[0.0, 0.5, 2.0, 1.0, 1.0, 0.0], [0.0, 0.5, 1.0, 0.0, 0.0, 0.0]],
  ["text_to_image", "image_caption"],
)


@pytest.mark.parametrize(
  "pairing, want",
  [
    ("predicting", {(0, 1): LAST - FIRST, (0, 2): 7, (1, 1): 4}),
    ("own_position", {(0, 2): LAST - FIRST, (0, 3): 7, (1, 2): 4}),
  ],
)
def test_codes_that_count_are_paired_with_states(pairing, want):
  for tasks in ((), ("image_caption",), ("image_caption", "text_to_image"), ("dialogue",)):
    loss = LossConfig(perceptual_pairing=pairing, perceptual_tasks=tasks)
    codes, mask = image_targets(BATCH, VOCABULARY, loss)
    rows = {0: "text_to_image", 1: "image_caption"}
    chosen = {at: code for at, code in want.items() if not tasks or rows[at[0]] in tasks}
    found = {(int(b), int(t)): int(codes[b, t]) for b, t in np.argwhere(mask)}
    assert found == chosen, tasks
    (images,) = (term for term in TERMS if term.name == "perceptual")
    assert float(images.count(BATCH, VOCABULARY, loss)) == len(chosen)


def test_both_ends_of_the_image_codes_are_codes():
  batch = batch_of([[0, FIRST, LAST, LAST + 1, FIRST - 1, 0]], np.ones((1, 6)), ["text_to_image"])
  for pairing, want in (("predicting", [0, 1]), ("own_position", [1, 2])):
    _, mask = image_targets(batch, VOCABULARY, LossConfig(perceptual_pairing=pairing))
    assert np.flatnonzero(mask[0]).tolist() == want


def test_targets_are_counted_or_weighed():
  doubled = batch_of(BATCH.tokens, 2 * BATCH.loss_weights, ["text_to_image"] * 2)
  assert float(count_targets(doubled, VOCABULARY, LossConfig(normaliser="tokens"))) == 6.0
  assert float(count_targets(doubled, VOCABULARY, LossConfig(normaliser="weights"))) == 12.0


def test_terms_without_a_weight_are_left_out():
  def names(**options):
    return [term.name for term in active(LossConfig(**options))]

  assert names() == ["next_token", "perceptual"]
  assert names(z_loss_weight=1e-4) == ["next_token", "z_loss", "perceptual"]
  assert names(perceptual_weight=0.0) == ["next_token"]


def test_the_defaults_are_those_of_the_paper():
  """In `configs/base.py`, too."""
  fields = {k.split(".")[1]: v for k, v in PAPER.training.items() if k.startswith("loss.")}
  assert LossConfig(**fields) == LossConfig()
  assert to_dataclass(LossConfig, base.get_config().loss.to_dict()) == LossConfig()


def test_lists_of_config_files_become_tuples():
  assert LossConfig(perceptual_tasks=["dialogue"]) == LossConfig(perceptual_tasks=("dialogue",))


def test_wrong_settings_are_named():
  for name in ("perceptual_pairing", "perceptual_distance", "normaliser"):
    with pytest.raises(ValueError, match=f"loss.{name} 'mean'; expected one of"):
      LossConfig(**{name: "mean"})
  with pytest.raises(ValueError, match="task 'sing' does not exist"):
    LossConfig(perceptual_tasks=("sing",))
