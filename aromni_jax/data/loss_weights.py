"""Which targets count how much: pure functions of a sample's task and response span."""

import dataclasses

import numpy as np

# Tasks whose response is text about another modality, up-weighted by the paper's weighted
# next-token loss; the first two are the released code's choice.
RELEASED_TASKS = ("image_caption", "speech_to_text")


@dataclasses.dataclass(frozen=True)
class LossWeightConfig:
  """Token weights of the next-token loss.

  Attributes:
    prompt: weight of targets before the response; 0 trains on responses only.
    response: weight of the response.
    boosted: weight of the responses of `boosted_tasks`, except their closing eos.
    boosted_tasks: tasks whose short text response would drown among long pictures and speech.
  """

  prompt: float = 1.0
  response: float = 1.0
  boosted: float = 2.0
  boosted_tasks: tuple[str, ...] = RELEASED_TASKS

  def __post_init__(self):
    object.__setattr__(self, "boosted_tasks", tuple(self.boosted_tasks))
    for name in ("prompt", "response", "boosted"):
      if getattr(self, name) < 0:
        raise ValueError(f"data.loss_weights.{name} is {getattr(self, name)}; it must be >= 0")


def loss_weights(
  length: int, task: str, response_start: int, config: LossWeightConfig
) -> np.ndarray:
  """Returns float32[length], the weight of the target at each position of a sample.

  The target at position t is the id at t + 1; the last position has none, so its weight is 0.

  Args:
    length: ids of the sample, from bos to eos.
    task: task name.
    response_start: position of the response's first id.
    config: weights.
  """
  weights = np.full(length, config.prompt, np.float32)
  weights[response_start - 1 :] = config.response
  if task in config.boosted_tasks:
    weights[response_start - 1 : length - 2] = config.boosted
  weights[length - 1 :] = 0.0
  return weights
