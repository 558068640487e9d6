"""Which targets count how much: pure functions of a sample's ids, task and response spans."""

import dataclasses

import numpy as np

from aromni_jax.sample import Sample
from aromni_jax.vocabulary import Vocabulary

# Tasks whose response is text about another modality, up-weighted by the paper's weighted
# next-token loss; the first two are the released code's choice.
RELEASED_TASKS = ("image_caption", "speech_to_text")


@dataclasses.dataclass(frozen=True)
class LossWeightConfig:
  """Token weights of the next-token loss.

  Attributes:
    prompt: weight of targets outside the responses; 0 trains on responses only.
    response: weight of the responses.
    boosted: weight of the responses of `boosted_tasks`, except eos.
    boosted_tasks: tasks whose short text response would drown among long pictures and speech.
    transcript: factor on what the model writes down of a spoken turn, strictly between the
      vocabulary's `instruction` and `response` ids (the released fine-tuning's segment weight).
  """

  prompt: float = 1.0
  response: float = 1.0
  boosted: float = 2.0
  boosted_tasks: tuple[str, ...] = RELEASED_TASKS
  transcript: float = 1.0

  def __post_init__(self):
    object.__setattr__(self, "boosted_tasks", tuple(self.boosted_tasks))
    for name in ("prompt", "response", "boosted", "transcript"):
      if getattr(self, name) < 0:
        raise ValueError(f"data.loss_weights.{name} is {getattr(self, name)}; it must be >= 0")


def loss_weights(sample: Sample, vocabulary: Vocabulary, config: LossWeightConfig) -> np.ndarray:
  """Returns float32[n], the weight of the target at each position of a sample of n ids.

  The target at position t is the id at t + 1; the last position has none, so its weight is 0. With
  the default weights they are those of the released code: 2 on the responses of two tasks without
  any eos, 1 on every other target.

  Args:
    sample: ids, task and responses.
    vocabulary: its eos, instruction and response ids.
    config: weights.
  """
  tokens = np.asarray(sample.tokens)
  boosted = sample.task in config.boosted_tasks
  weights = np.full(len(tokens), config.prompt, np.float32)  # of the id at each position ...
  for start, stop in sample.spans:
    weights[start:stop] = config.response
    if boosted:
      weights[start:stop][tokens[start:stop] != vocabulary.eos] = config.boosted
  if config.transcript != 1.0:
    weights[between(tokens, vocabulary.instruction, vocabulary.response)] *= config.transcript
  return np.append(weights[1:], np.float32(0))  # ... which is the target one position before


def between(tokens: np.ndarray, opening: int, closing: int) -> np.ndarray:
  """Returns bool[n]: which ids stand strictly between an opening id and its closing id.

  Every opening id takes the next closing id that no earlier one has taken; one that finds none
  opens nothing.
  """
  inside = np.zeros(len(tokens), bool)
  closings = iter(np.flatnonzero(tokens == closing))
  for start in np.flatnonzero(tokens == opening):
    stop = next((at for at in closings if at > start), None)
    if stop is not None:
      inside[start + 1 : stop] = True
  return inside
