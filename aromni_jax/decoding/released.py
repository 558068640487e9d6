"""The decoding rules of AR-Omni's released code as a table (recipe `RELEASED`).

The released code has no grammar. In the text phase every id but the picture codes may come, speech
and its marks among them, and a selector looks at the last id alone: after `instruction` or `boa`
ids are greedy, after `response` or `eoa` they are sampled, and a row begins greedy or sampled by
its task. A boi opens a picture: exactly its codes, an eoi by rule, then a new text phase that has
forgotten the mode. Text to picture and speech to picture have no text phase: boi and codes, nothing
else. A row ends with its first eos or eom (the released code waits until all rows have one), or
when its budget is used up: nothing is closed in time.

Two things differ on purpose. Tasks without pictures ban boi, where the released code would stop at
an assertion, and a picture must fit into what is left of the row's budget, not of the context only.
"""

import numpy as np

from aromni_jax.decoding.state_machine import CLASSES, MANY, NEVER, StateMachine, classes_of
from aromni_jax.tasks import TASKS
from aromni_jax.vocabulary import Vocabulary

# What a state's token is drawn with; ids that the rules alone decide are "special".
SAMPLERS = ("greedy", "sampled", "image", "special")

_SWITCHES = {"instruction": "greedy", "boa": "greedy", "response": "sampled", "eoa": "sampled"}


def compile_released(vocabulary: Vocabulary) -> StateMachine:
  """Returns the machine of all tasks; source: AR-Omni's inference code, its selector and loops."""
  table = _Table(vocabulary.image_length)
  answer = table.text(first="greedy", pictures=False)
  chat = table.text(first="sampled", pictures=True)
  drawing = np.full(len(CLASSES) + 1, table.picture_alone())
  start, pictures = [], []
  for task in TASKS.values():
    draws = "image" in task.outputs
    pictures.append((1 if task.only_draws else MANY) if draws else 0)
    start.append(drawing if task.only_draws else chat if draws else answer)
  return StateMachine(
    class_of=classes_of(vocabulary),
    next_state=np.array(table.next_state, np.int32),
    cost=np.array(table.cost, np.int32),
    samplers=SAMPLERS,
    sampler=np.array([SAMPLERS.index(s) for s in table.sampler], np.int32),
    picture_length=np.array(table.picture_length, np.int32),
    start=np.array(start, np.int32),
    pictures=np.array(pictures, np.int32),
    done=table.done,
  )


class _Table:
  """States as rows: next state and cost by class, sampler, ids of the picture so far."""

  def __init__(self, image_length: int):
    self.next_state: list[np.ndarray] = []
    self.cost: list[np.ndarray] = []
    self.sampler: list[str] = []
    self.picture_length: list[int] = []
    self._image_length = image_length
    self.done = self._add("special", {"eos": (0, 0)})

  def text(self, first: str, pictures: bool) -> np.ndarray:
    """Adds a text phase; returns its first state by the class of the prompt's last id."""
    states = {name: len(self.sampler) + i for i, name in enumerate(("greedy", "sampled"))}
    after_boi = len(self.sampler) + len(states)
    for name, state in states.items():
      moves = {c: (state, 1) for c in (*CLASSES, None) if c not in ("image", "boi")}
      moves |= {c: (states[mode], 1) for c, mode in _SWITCHES.items()}
      moves |= {c: (self.done, 1) for c in ("eos", "eom")}
      if (
        pictures
      ):  # at length L boi needs L < limit - (codes + 2), one id more than the picture has
        moves["boi"] = (after_boi, self._image_length + 3)
      self._add(name, moves)
    if pictures:
      self._codes(closing=1)
      self._add("special", {"eoi": (states[first], 1)}, self._image_length + 1)
    start = np.full(len(CLASSES) + 1, states[first])
    for name, mode in _SWITCHES.items():
      start[CLASSES.index(name)] = states[mode]
    return start

  def picture_alone(self) -> int:
    """Adds boi, codes and the end; returns the state in which boi comes next."""
    state = self._add("special", {"boi": (len(self.sampler) + 1, self._image_length + 1)})
    self._codes(closing=0)
    self.next_state[-1][CLASSES.index("image")] = self.done
    return state

  def _codes(self, closing: int) -> None:
    """Adds the states of a picture's codes, which lead to the state that is added next."""
    for length in range(1, self._image_length + 1):
      move = (len(self.sampler) + 1, self._image_length + 1 - length + closing)
      self._add("image", {"image": move}, length)

  def _add(
    self, sampler: str, moves: dict[str | None, tuple[int, int]], picture_length: int = 0
  ) -> int:
    """Adds a state. moves: class (None: ids of no span) -> next state and cost; others stay."""
    state = len(self.sampler)
    self.next_state.append(np.full(len(CLASSES) + 1, state))
    self.cost.append(np.full(len(CLASSES) + 1, NEVER))
    for name, (target, cost) in moves.items():
      column = len(CLASSES) if name is None else CLASSES.index(name)
      self.next_state[-1][column], self.cost[-1][column] = target, cost
    self.sampler.append(sampler)
    self.picture_length.append(picture_length)
    return state
