"""Generation: prefill and steps under jit, one batch of any tasks.

Prompts are padded on the right to a few lengths; slot s of the cache holds position s, so the
padding's slots are overwritten before anything can see them. The cache grows as it fills, since
every step reads all of it. Results do not depend on a row's neighbours.

With guidance every row has one or two twins in the batch: one holds bos and the picture so far, the
other bos and all pictures so far, those of the prompt among them. Ids that a twin must not see go
to the slot that its next id overwrites. Without pictures before the one that is drawn both twins
are the same, and the second is saved.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from aromni_jax.decoding import sampling
from aromni_jax.decoding.released import compile_released
from aromni_jax.decoding.state_machine import CLASSES, StateMachine, compile_machine
from aromni_jax.models.decoder import Cache, Decoder, init_cache, unroll
from aromni_jax.recipes import PAPER, Recipe, Sampler
from aromni_jax.tasks import get_task
from aromni_jax.vocabulary import Vocabulary

Array = jax.Array

_SHORTEST_BUCKET = 32
_FIRST_ROOM = 128  # new positions of the first cache; further ones have the next bucket's length
_RULES = {"grammar": compile_machine, "selector": compile_released}
_PICTURES = ("bos", "boi", "eoi", "image")  # what the twin with all pictures keeps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Progress:
  """What a step changes; R sequences are the B rows, then their twins.

  hidden: [R, D] at the last id; states: int32[B]; lengths: int32[R], ids in each sequence;
  remaining: int32[B], ids that a row may still emit; output: int32[B, new], -1 after a row's end;
  seen: bool[B, V].
  """

  cache: Cache
  hidden: Array
  states: Array
  lengths: Array
  remaining: Array
  output: Array
  seen: Array
  step: Array


class Engine:
  """Generates responses; with the paper's recipe they always parse.

  Args:
    decoder: the model; its layers' parameters are copied, and stay split over a mesh if they are.
      Processes that share the mesh call the engine alike.
    vocabulary: its id space.
    recipe: whose rules of decoding.
    samplers: how ids are drawn, by the names of `recipe.samplers`; greedy by default.
    max_length: most positions of prompt and response together.
    consume: frees the decoder's parameters while they are copied; it cannot be used afterwards.
  """

  def __init__(
    self,
    decoder: Decoder,
    vocabulary: Vocabulary,
    *,
    recipe: Recipe = PAPER,
    samplers: Mapping[str, Sampler] | None = None,
    max_length: int = 4096,
    consume: bool = False,
  ):
    self.vocabulary, self.max_length = vocabulary, max_length
    self.machine: StateMachine = _RULES[recipe.rules](vocabulary)
    samplers, names = dict(samplers or {}), self.machine.samplers
    if unknown := set(samplers) - set(names[:3]):
      raise ValueError(f"no sampler is called {sorted(unknown)}; expected {names[:3]}")
    others = [s for name, s in samplers.items() if name != "image"]
    if any(s.guidance != 1 or s.image_guidance is not None for s in others):
      raise ValueError("guidance is for pictures; text and speech have none")
    chosen = [_with_both_guidances(samplers.get(name, Sampler())) for name in names]
    by_state = [chosen[i] for i in self.machine.sampler]
    self._settings = {
      f.name: np.array([getattr(s, f.name) for s in by_state], np.float32)
      for f in dataclasses.fields(Sampler)
    }
    self._stochastic = any(s.temperature > 0 for s in chosen)
    self._penalised = any(s.repetition_penalty != 1 for s in chosen)
    image = chosen[names.index("image")]
    self._guided = (image.guidance, image.image_guidance) != (1, 1)
    self._guided_by_pictures = image.image_guidance != image.guidance
    self._kept = np.isin(self.machine.class_of, [CLASSES.index(name) for name in _PICTURES])
    self._config = decoder.config
    self.load(decoder, consume=consume)
    self._prefill = jax.jit(self._prefill_fn, static_argnames=("cache_length", "output_length"))
    self._advance = jax.jit(self._advance_fn, donate_argnums=1)

  def load(self, decoder: Decoder, *, consume: bool = False) -> None:
    """Takes the parameters of another decoder of the same shape; nothing is compiled again."""
    self._graphdef, self._params = nnx.split(unroll(decoder, consume=consume))

  def release(self) -> None:
    """Frees the parameters; `load` brings new ones."""
    self._params = None

  def generate(
    self,
    prompts: Sequence[np.ndarray],
    tasks: Sequence[str],
    *,
    max_new_tokens: int | Sequence[int],
    seed: int = 0,
    row_ids: Sequence[int] | None = None,
  ) -> list[np.ndarray]:
    """Returns the new ids of every prompt, up to and with the one that ends the row.

    Args:
      prompts: int32[n] each, from bos on.
      tasks: task of every prompt, which sets what may come.
      max_new_tokens: budget of every row, or one for each. Pictures count, and begin only if they
        fit. With the paper's recipe spans are closed in time; with the released one a row may end
        anywhere else.
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
    max_new_tokens: int | Sequence[int],
    seed: int = 0,
    row_ids: Sequence[int] | None = None,
    chunk: int | None = 8,
  ) -> Iterator[list[np.ndarray]]:
    """Yields what every row has so far, after each `chunk` steps; arguments as in `generate`."""
    if not prompts or len(prompts) != len(tasks):
      raise ValueError(f"got {len(prompts)} prompts and {len(tasks)} tasks; expected one task each")
    budgets = np.broadcast_to(np.asarray(max_new_tokens, np.int32), len(prompts))
    self._check(prompts, tasks, budgets)
    sequences = self._with_twins(prompts, tasks)
    lengths = np.array([len(ids) for ids in sequences], np.int32)
    longest, most = int(lengths.max()), int(budgets.max())
    end = int((lengths[: len(prompts)] + budgets).max())
    tokens = np.full((len(sequences), _bucket(longest)), self.vocabulary.pad, np.int32)
    for row, ids in zip(tokens, sequences, strict=True):
      row[: len(ids)] = ids
    cache_length = _cache_length(longest + _FIRST_ROOM, end)
    progress = self._prefill(
      self._params,
      tokens,
      lengths,
      self.machine.init_states(list(tasks), [prompt[-1] for prompt in prompts]),
      budgets,
      cache_length=cache_length,
      output_length=_bucket(most),
    )
    ids = np.arange(len(prompts)) if row_ids is None else np.asarray(row_ids)
    ids = ids.astype(np.int32)
    chunk = chunk or most
    step, shown, finished = 0, 0, False
    while not finished:
      if longest + step == cache_length < end:
        cache_length = _cache_length(cache_length + 1, end)
        progress = _grow(progress, cache_length)
      limit = shown + chunk
      if cache_length < end:  # else it holds all rows to their ends, the longest prompt's or not
        limit = min(limit, cache_length - longest)
      progress = self._advance(self._params, progress, np.uint32(seed), ids, np.int32(limit))
      step = int(_fetch(progress.step))
      finished = (_fetch(progress.states) == self.machine.done).all()
      if finished or step == shown + chunk:
        shown = step
        yield [row[row >= 0] for row in _fetch(progress.output)]

  def _with_twins(self, prompts: Sequence[np.ndarray], tasks: Sequence[str]) -> list[np.ndarray]:
    """Returns the prompts, then what their twins hold of them."""
    pictures = [self.machine.pictures[get_task(task).id] for task in tasks]
    if not (self._guided and any(pictures)):
      return list(prompts)
    kept = [prompt[self._kept[prompt]] for prompt in prompts]
    twins = [np.array([self.vocabulary.bos])] * len(prompts)
    if self._guided_by_pictures and any(
      n > 1 or (n and len(ids) > 1) for n, ids in zip(pictures, kept, strict=True)
    ):
      twins += kept
    return [*prompts, *twins]

  def _check(self, prompts, tasks, budgets) -> None:
    for prompt, task, budget in zip(prompts, tasks, budgets, strict=True):
      if budget < self.machine.shortest(task):
        raise ValueError(
          f"max_new_tokens is {budget}, but the shortest response of {task} has "
          f"{self.machine.shortest(task)} tokens"
        )
      if len(prompt) + budget > self.max_length:
        raise ValueError(
          f"a prompt of {len(prompt)} tokens and max_new_tokens {budget} exceed the cache of "
          f"{self.max_length} positions; shorten the input or lower max_new_tokens"
        )

  def _prefill_fn(self, params, tokens, lengths, states, budgets, *, cache_length, output_length):
    decoder = nnx.merge(self._graphdef, params)
    batch, width = len(states), tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(width), tokens.shape)
    cache = init_cache(self._config, len(tokens), cache_length)
    hidden, cache = decoder(tokens, positions, cache=cache)
    hidden = hidden[jnp.arange(len(tokens)), lengths - 1]
    real = positions[:batch] < lengths[:batch, None]
    seen = jnp.zeros((batch, self.vocabulary.size), bool)
    seen = seen.at[jnp.arange(batch)[:, None], tokens[:batch]].max(real)
    output = jnp.full((batch, output_length), -1, jnp.int32)
    step = jnp.zeros((), jnp.int32)
    return _Progress(cache, hidden, states, lengths, budgets, output, seen, step)

  def _advance_fn(self, params, progress: _Progress, seed: Array, ids: Array, limit: Array):
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(ids)
    decoder = nnx.merge(self._graphdef, params)
    machine, batch = self.machine, len(progress.states)
    sequences = len(progress.hidden) // batch
    rows_index = jnp.arange(batch)

    def unfinished(p: _Progress):
      return (p.step < limit) & jnp.any(p.states != machine.done)

    def body(p: _Progress) -> _Progress:
      settings = {k: jnp.asarray(v)[p.states] for k, v in self._settings.items()}
      logits = decoder.logits(p.hidden)
      if sequences > 1:
        logits = sampling.guide(
          logits.reshape(sequences, batch, -1), settings["guidance"], settings["image_guidance"]
        )
      token = sampling.sample(
        logits,
        machine.allowed(p.states, p.remaining),
        p.seen if self._penalised else None,
        settings,
        jax.vmap(lambda k: jax.random.fold_in(k, p.step))(keys),
        stochastic=self._stochastic,
      )
      states = machine.advance(p.states, token)
      slots, lengths = self._place(token, states, p.lengths, sequences)
      hidden, cache = decoder(jnp.tile(token, sequences)[:, None], slots[:, None], cache=p.cache)
      seen = p.seen.at[rows_index, token].set(True) if self._penalised else p.seen
      remaining = jnp.maximum(p.remaining - 1, 0)
      return _Progress(
        cache=cache,
        hidden=hidden[:, 0],
        states=jnp.where(remaining == 0, machine.done, states),
        lengths=lengths,
        remaining=remaining,
        output=p.output.at[:, p.step].set(jnp.where(p.states == machine.done, -1, token)),
        seen=seen,
        step=p.step + 1,
      )

    return jax.lax.while_loop(unfinished, body, progress)

  def _place(self, token, states, lengths, sequences: int) -> tuple[Array, Array]:
    """Returns the slot of the token in every sequence, and the sequences' lengths after it.

    Args:
      token: int32[B]. states: int32[B], after it. lengths: int32[R], before it.
      sequences: 1, 2 or 3 per row.
    """
    rows = jnp.split(lengths, sequences)
    slots, after = [rows[0]], [rows[0] + 1]
    if sequences > 1:  # outside of pictures slot 1 takes ids that the next boi overwrites
      slots.append(jnp.maximum(jnp.asarray(self.machine.picture_length)[states], 1))
      after.append(rows[1])
    if sequences > 2:
      slots.append(rows[2])
      after.append(rows[2] + jnp.asarray(self._kept)[token])
    return jnp.concatenate(slots), jnp.concatenate(after)


def _fetch(array: Array) -> np.ndarray:
  """Returns an array on the host, in every process that shares it."""
  if array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  return multihost_utils.process_allgather(array, tiled=True)


def _grow(progress: _Progress, cache_length: int) -> _Progress:
  """Returns the same with empty slots at the end of the cache. Each old array is freed once its
  longer copy is there, so memory never holds two caches."""
  arrays, treedef = jax.tree.flatten(progress.cache)
  for i, old in enumerate(arrays):
    arrays[i] = jax.block_until_ready(_lengthen(old, cache_length))
    old.delete()
  return dataclasses.replace(progress, cache=treedef.unflatten(arrays))


@functools.partial(jax.jit, static_argnums=1)
def _lengthen(array: Array, length: int) -> Array:
  """Returns [B, K, S, H] as [B, K, length, H], zeros at the end."""
  return jnp.pad(array, ((0, 0), (0, 0), (0, length - array.shape[2]), (0, 0)))


def _cache_length(needed: int, end: int) -> int:
  """Returns the bucket of the slots needed, or the last slot's, rounded up, where that is less."""
  return min(_bucket(needed), -(-end // _SHORTEST_BUCKET) * _SHORTEST_BUCKET)


def _bucket(length: int) -> int:
  """Returns the next of 32, 64, 96, 128, 192, 256, 384 ...: few lengths, little padding."""
  size = _SHORTEST_BUCKET
  while size < length:
    size *= 2
  return size * 3 // 4 if size > 64 and size * 3 // 4 >= length else size


def _with_both_guidances(sampler: Sampler) -> Sampler:
  if sampler.image_guidance is not None:
    return sampler
  return dataclasses.replace(sampler, image_guidance=sampler.guidance)
