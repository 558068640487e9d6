"""Legal responses as a table: states x token classes -> next state.

Every task's response is a chain of spans (text, speech, a picture) that ends in `eom eos`. The
chains are compiled once per vocabulary, one state per position inside a picture, so the state of a
row is one integer and a batch may mix tasks under jit. A token after which the response could not
be closed within the row's budget is not allowed: every output parses, whatever the logits are.
Axis letters: B rows, V vocabulary; S states, C token classes.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from aromni_jax.tasks import TASKS, Task, get_task
from aromni_jax.vocabulary import SPECIAL_NAMES, Vocabulary

Array = jax.Array

# A token's class: its modality, or the name of its special id.
CLASSES = ("text", "image", "speech", *SPECIAL_NAMES)

# What a state's token is drawn with; ids that the grammar alone decides are "special".
SAMPLERS = ("text", "speech", "image", "special")

# A cost that no budget pays, and a number of pictures without a limit.
NEVER = MANY = 1 << 30


@dataclasses.dataclass(frozen=True)
class StateMachine:
  """The compiled table.

  Attributes:
    class_of: int32[V], index into `CLASSES`; len(CLASSES) for ids of no span.
    next_state: int32[S, C + 1].
    cost: int32[S, C + 1], the tokens that must be left if a token of that class comes next, itself
      among them; huge where it is not legal, 0 for the eos that finished rows repeat.
    samplers: names of the ways in which tokens are drawn.
    sampler: int32[S], index into `samplers`.
    picture_length: int32[S], ids of a picture that have come before, boi among them; 0 outside.
    start: int32[number of tasks, C + 1], first state of each task by the class of the prompt's
      last id.
    pictures: int32[number of tasks], most pictures of a response; `MANY` without a limit.
    done: the last state.
  """

  class_of: np.ndarray
  next_state: np.ndarray
  cost: np.ndarray
  samplers: tuple[str, ...]
  sampler: np.ndarray
  picture_length: np.ndarray
  start: np.ndarray
  pictures: np.ndarray
  done: int = 0

  def init_states(self, tasks: Sequence[str], last_ids: Sequence[int]) -> np.ndarray:
    """Returns int32[B], the first states of rows whose prompts end in `last_ids`.

    Raises:
      ValueError: for an unknown task.
    """
    return self.start[[get_task(task).id for task in tasks], self.class_of[list(last_ids)]]

  def shortest(self, task: str) -> int:
    """Returns the fewest tokens of a whole response, closing ids included."""
    return int(self.cost[self.start[get_task(task).id, -1]].min())

  def allowed(self, states: Array, remaining: Array) -> Array:
    """Returns bool[B, V], the ids that may come next; at least one in every row.

    Args:
      states: int32[B].
      remaining: int32[B], tokens that each row may still emit; `shortest(task)` or more at the
        start, one less after each token.
    """
    return (jnp.asarray(self.cost)[states] <= remaining[:, None])[:, self.class_of]

  def advance(self, states: Array, tokens: Array) -> Array:
    """Returns the states int32[B] after legal tokens int32[B]."""
    return jnp.asarray(self.next_state)[states, jnp.asarray(self.class_of)[tokens]]


def compile_machine(vocabulary: Vocabulary) -> StateMachine:
  """Returns the grammar of all tasks; the released rules are in `released.py`."""
  table = _Table(vocabulary.image_length)
  start = [table.chain(_response(task)) for task in TASKS.values()]
  next_state = np.zeros((len(table.moves), len(CLASSES) + 1), np.int32)
  cost = np.full(next_state.shape, NEVER, np.int32)
  for state, moves in enumerate(table.moves):
    for name, target in moves.items():
      next_state[state, CLASSES.index(name)] = target
      cost[state, CLASSES.index(name)] = table.distance[target] + (state != table.done)
  return StateMachine(
    class_of=classes_of(vocabulary),
    next_state=next_state,
    cost=cost,
    samplers=SAMPLERS,
    sampler=np.array([SAMPLERS.index(s) for s in table.sampler], np.int32),
    picture_length=np.array(table.picture_length, np.int32),
    start=np.tile(np.array(start, np.int32)[:, None], len(CLASSES) + 1),
    pictures=np.array([t.outputs.count("image") for t in TASKS.values()], np.int32),
    done=table.done,
  )


def classes_of(vocabulary: Vocabulary) -> np.ndarray:
  """Returns int32[V], the class of every id: an index into `CLASSES`, or len(CLASSES)."""
  out = np.full(vocabulary.size, len(CLASSES), np.int32)
  for name in ("text", "image", "speech"):
    ids = getattr(vocabulary, name)
    out[ids.start : ids.stop] = CLASSES.index(name)
  for name, special in vocabulary.special_ids.items():
    out[special] = CLASSES.index(name)
  return out


def _response(task: Task) -> tuple[str, ...]:
  """Returns the spans and special ids of a task's response, without the closing `eom eos`."""
  transcript = ("instruction", "text", "response") if task.chats else ()
  return transcript + task.outputs


class _Table:
  """States, built from the end so that chains with equal ends share them.

  Attributes:
    moves: class -> next state, of each state. sampler, picture_length: of each state.
    distance: the fewest tokens from each state to the end.
  """

  def __init__(self, image_length: int):
    self.moves: list[dict[str, int]] = []
    self.sampler: list[str] = []
    self.picture_length: list[int] = []
    self.distance: list[int] = []
    self._image_length = image_length
    self.done = self._add("special", {})
    self.moves[self.done]["eos"] = self.done
    end = self._add("special", {"eos": self.done})
    self._chains = {(): self._add("special", {"eom": end})}

  def chain(self, links: tuple[str, ...]) -> int:
    """Returns the state in which the first of `links` comes next."""
    if links not in self._chains:
      after = self.chain(links[1:])
      self._chains[links] = getattr(self, f"_{links[0]}", self._special)(links[0], after)
    return self._chains[links]

  def _special(self, name: str, after: int) -> int:
    return self._add("special", {name: after})

  def _text(self, name: str, after: int) -> int:
    more = self._add(name, dict(self.moves[after]))  # what opens the next span ends this one
    self.moves[more][name] = more
    return self._add(name, {name: more})

  def _speech(self, name: str, after: int) -> int:
    more = self._add(name, {"eoa": after})
    self.moves[more][name] = more
    return self._special("boa", self._add(name, {name: more}))

  def _image(self, name: str, after: int) -> int:
    state = self._add("special", {"eoi": after}, self._image_length + 1)
    for length in range(self._image_length, 0, -1):
      state = self._add(name, {name: state}, length)
    return self._special("boi", state)

  def _add(self, sampler: str, moves: dict[str, int], picture_length: int = 0) -> int:
    self.moves.append(moves)
    self.sampler.append(sampler)
    self.picture_length.append(picture_length)
    self.distance.append(1 + min((self.distance[s] for s in moves.values()), default=-1))
    return len(self.moves) - 1
