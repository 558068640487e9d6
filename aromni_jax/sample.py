"""One sample, and what it is made of."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Parts:
  """What stands on one side of a sample; None where a task has no such part.

  Attributes:
    text: a string.
    image: int32[image_length] codes.
    speech: int32[n] codes.
    transcript: dialogue only, the words that the user spoke.
  """

  text: str | None = None
  image: np.ndarray | None = None
  speech: np.ndarray | None = None
  transcript: str | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
  """One training sequence.

  Attributes:
    tokens: int32[n], from bos to eos.
    task: task name.
    response_start: position of the first response's first id.
    key: stable name of the source item.
    response_spans: int32[k, 2], [start, stop) of every response of a dialogue of several turns, in
      order; None if the one response runs from `response_start` to the end.
  """

  tokens: np.ndarray
  task: str
  response_start: int
  key: str
  response_spans: np.ndarray | None = None

  @property
  def spans(self) -> np.ndarray:
    """int32[k, 2], [start, stop) of every response, whether there is one or several."""
    if self.response_spans is None:
      return np.array([[self.response_start, len(self.tokens)]], np.int32)
    return self.response_spans


@dataclasses.dataclass(frozen=True)
class Turn:
  """One turn of a dialogue.

  Attributes:
    speech: int32[n] codes of what the user says.
    images: int32[image_length] codes each, of what the user shows.
    instruction: what to do, in words; may be empty.
    reply: int32[n], all ids that the model answered; None for the turn that it answers next.
  """

  speech: np.ndarray
  images: tuple[np.ndarray, ...] = ()
  instruction: str = ""
  reply: np.ndarray | None = None


def without_prompt(sample: Sample) -> Sample:
  """Returns the sample as bos and its response: what guidance compares a picture with. Of several
  turns, what follows the first response stays. A sample whose response is empty stays whole."""
  if sample.response_start == len(sample.tokens):
    return sample
  cut = max(sample.response_start - 1, 0)
  spans = None if sample.response_spans is None else sample.response_spans - cut
  tokens = np.concatenate([sample.tokens[:1], sample.tokens[cut + 1 :]])
  start = sample.response_start - cut
  return dataclasses.replace(sample, tokens=tokens, response_start=start, response_spans=spans)
