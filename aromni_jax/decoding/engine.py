"""Generation: prefill and steps under jit, one batch of any tasks.

Prompts are padded on the right to a few lengths; slot s of the cache holds position s, so the
padding's slots are overwritten before anything can see them. The cache grows as it fills, since
every step reads all of it. Results do not depend on a row's neighbours.

With guidance every row that draws has a twin, which holds bos and the picture so far, nothing else.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aromni_jax.decoding import sampling
from aromni_jax.decoding.sampling import Sampler
from aromni_jax.decoding.state_machine import SAMPLERS, StateMachine, compile_machine
from aromni_jax.models.decoder import Cache, Decoder, init_cache, unroll
from aromni_jax.prompts import OUTPUTS
from aromni_jax.vocabulary import Vocabulary

Array = jax.Array

_SHORTEST_BUCKET = 32
_FIRST_ROOM = 128  # new positions of the first cache; every further one has twice as many


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Progress:
  """What a step changes.

  hidden: [B, D] at the last id, or [2 B, D] with twins; output: int32[B, new]; seen: bool[B, V].
  """

  cache: Cache
  hidden: Array
  states: Array
  lengths: Array
  output: Array
  seen: Array
  step: Array


class Engine:
  """Generates responses that always parse.

  Args:
    decoder: the model; its layers' parameters are copied.
    vocabulary: its id space.
    samplers: "text", "speech" and "image" -> how ids of that kind are drawn; greedy by default.
    max_length: most positions of prompt and response together.
  """

  def __init__(
    self,
    decoder: Decoder,
    vocabulary: Vocabulary,
    *,
    samplers: Mapping[str, Sampler] | None = None,
    max_length: int = 4096,
  ):
    samplers = dict(samplers or {})
    if unknown := set(samplers) - set(SAMPLERS[:3]):
      raise ValueError(f"no sampler is called {sorted(unknown)}; expected {SAMPLERS[:3]}")
    if any(s.guidance != 1 for name, s in samplers.items() if name != "image"):
      raise ValueError("guidance is for pictures; text and speech have none")
    self.vocabulary, self.max_length = vocabulary, max_length
    self.machine: StateMachine = compile_machine(vocabulary)
    chosen = [samplers.get(name, Sampler()) for name in SAMPLERS]
    by_state = [chosen[i] for i in self.machine.sampler]
    self._settings = {
      f.name: np.array([getattr(s, f.name) for s in by_state], np.float32)
      for f in dataclasses.fields(Sampler)
    }
    self._stochastic = any(s.temperature > 0 for s in chosen)
    self._penalised = any(s.repetition_penalty != 1 for s in chosen)
    self._guided = any(s.guidance != 1 for s in chosen)
    self._graphdef, self._params = nnx.split(unroll(decoder))
    self._config = decoder.config
    self._prefill = jax.jit(
      self._prefill_fn, static_argnames=("cache_length", "max_new_tokens", "guided")
    )
    self._advance = jax.jit(self._advance_fn, donate_argnums=1)

  def generate(
    self,
    prompts: Sequence[np.ndarray],
    tasks: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int = 0,
    row_ids: Sequence[int] | None = None,
  ) -> list[np.ndarray]:
    """Returns the new ids of every prompt, up to and with the closing eos.

    Args:
      prompts: int32[n] each, from bos on.
      tasks: task of every prompt, which sets its grammar.
      max_new_tokens: budget of every row; spans are closed in time.
      seed: randomness of the samplers.
      row_ids: names of the rows for their randomness; their numbers by default.

    Raises:
      ValueError: if a budget is too small for a task, or prompt and budget exceed the cache.
    """
    *_, last = self.stream(
      prompts, tasks, max_new_tokens=max_new_tokens, seed=seed, row_ids=row_ids, chunk=None
    )
    return last

  def stream(
    self,
    prompts: Sequence[np.ndarray],
    tasks: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int = 0,
    row_ids: Sequence[int] | None = None,
    chunk: int | None = 8,
  ) -> Iterator[list[np.ndarray]]:
    """Yields what every row has so far, after each `chunk` steps; arguments as in `generate`."""
    self._check(prompts, tasks, max_new_tokens)
    lengths = np.array([len(p) for p in prompts], np.int32)
    longest = int(lengths.max())
    width = _bucket(longest)
    tokens = np.full((len(prompts), width), self.vocabulary.pad, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
      row[: len(prompt)] = prompt
    room = min(_FIRST_ROOM, max_new_tokens)
    progress = self._prefill(
      self._params,
      tokens,
      lengths,
      self.machine.init_states(list(tasks)),
      cache_length=_bucket(longest + room),
      max_new_tokens=max_new_tokens,
      guided=self._guided and any("image" in OUTPUTS[task] for task in tasks),
    )
    ids = np.arange(len(prompts)) if row_ids is None else np.asarray(row_ids)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.asarray(ids))
    chunk = chunk or max_new_tokens
    step, shown, finished = 0, 0, False
    while not finished:
      if step == room:
        room = min(2 * room, max_new_tokens)
        progress = _grow(progress, cache_length=_bucket(longest + room))
      limit = min(room, shown + chunk)
      progress = self._advance(self._params, progress, keys, limit)
      step = int(progress.step)
      done = np.asarray(progress.states) == self.machine.done
      finished = done.all() or step >= max_new_tokens
      if finished or step == shown + chunk:
        shown, output = step, np.asarray(progress.output)
        yield [_until_eos(row[:step], self.vocabulary.eos) for row in output]

  def _check(self, prompts, tasks, max_new_tokens: int) -> None:
    if not prompts or len(prompts) != len(tasks):
      raise ValueError(f"got {len(prompts)} prompts and {len(tasks)} tasks; expected one task each")
    for task in sorted(set(tasks)):
      if max_new_tokens < self.machine.shortest(task):
        raise ValueError(
          f"max_new_tokens is {max_new_tokens}, but the shortest response of {task} has "
          f"{self.machine.shortest(task)} tokens"
        )
    longest = max(len(p) for p in prompts)
    if longest + max_new_tokens > self.max_length:
      raise ValueError(
        f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} exceed the cache of "
        f"{self.max_length} positions; shorten the input or lower max_new_tokens"
      )

  def _prefill_fn(self, params, tokens, lengths, states, *, cache_length, max_new_tokens, guided):
    decoder = nnx.merge(self._graphdef, params)
    batch, width = tokens.shape
    inputs, ends = tokens, lengths - 1
    if guided:
      twins = jnp.full_like(tokens, self.vocabulary.pad).at[:, 0].set(self.vocabulary.bos)
      inputs, ends = jnp.concatenate([tokens, twins]), jnp.concatenate([ends, jnp.zeros_like(ends)])
    positions = jnp.broadcast_to(jnp.arange(width), inputs.shape)
    cache = init_cache(self._config, len(inputs), cache_length)
    hidden, cache = decoder(inputs, positions, cache=cache)
    hidden = hidden[jnp.arange(len(inputs)), ends]
    real = positions[:batch] < lengths[:, None]
    seen = jnp.zeros((batch, self.vocabulary.size), bool)
    seen = seen.at[jnp.arange(batch)[:, None], tokens].max(real)
    output = jnp.full((batch, max_new_tokens), self.vocabulary.eos, jnp.int32)
    return _Progress(cache, hidden, states, lengths, output, seen, jnp.zeros((), jnp.int32))

  def _advance_fn(self, params, progress: _Progress, keys: Array, limit: Array) -> _Progress:
    decoder = nnx.merge(self._graphdef, params)
    machine, (batch, budget) = self.machine, progress.output.shape
    guided = len(progress.hidden) > batch
    rows_index = jnp.arange(batch)

    def unfinished(p: _Progress):
      return (p.step < limit) & jnp.any(p.states != machine.done)

    def body(p: _Progress) -> _Progress:
      settings = {k: jnp.asarray(v)[p.states] for k, v in self._settings.items()}
      remaining = jnp.full(batch, budget - p.step)
      logits = decoder.logits(p.hidden)
      if guided:
        logits = sampling.guide(logits[:batch], logits[batch:], settings["guidance"])
      token = sampling.sample(
        logits,
        machine.allowed(p.states, remaining),
        p.seen if self._penalised else None,
        settings,
        jax.vmap(lambda k: jax.random.fold_in(k, p.step))(keys),
        stochastic=self._stochastic,
      )
      states = machine.advance(p.states, token)
      inputs, positions = token, p.lengths + p.step
      if guided:  # outside of pictures, a twin's slot 1 takes ids that its boi overwrites
        slots = jnp.maximum(jnp.asarray(machine.picture_length)[states], 1)
        inputs, positions = jnp.concatenate([token, token]), jnp.concatenate([positions, slots])
      hidden, cache = decoder(inputs[:, None], positions[:, None], cache=p.cache)
      seen = p.seen.at[rows_index, token].set(True) if self._penalised else p.seen
      return _Progress(
        cache=cache,
        hidden=hidden[:, 0],
        states=states,
        lengths=p.lengths,
        output=p.output.at[:, p.step].set(token),
        seen=seen,
        step=p.step + 1,
      )

    return jax.lax.while_loop(unfinished, body, progress)


@functools.partial(jax.jit, static_argnames="cache_length")
def _grow(progress: _Progress, *, cache_length: int) -> _Progress:
  """Returns the same with empty slots at the end of the cache."""

  def pad(x):
    return jnp.pad(x, ((0, 0), (0, 0), (0, cache_length - x.shape[2]), (0, 0)))

  return dataclasses.replace(progress, cache=jax.tree.map(pad, progress.cache))


def _bucket(length: int) -> int:
  """Returns the next of 32, 64, 96, 128, 192, 256, 384 ...: few lengths, little padding."""
  size = _SHORTEST_BUCKET
  while size < length:
    size *= 2
  return size * 3 // 4 if size > 64 and size * 3 // 4 >= length else size


def _until_eos(ids: np.ndarray, eos: int) -> np.ndarray:
  ends = np.flatnonzero(ids == eos)
  return ids[: ends[0] + 1] if len(ends) else ids
