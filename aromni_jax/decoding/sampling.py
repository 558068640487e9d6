"""Samplers: logits -> ids, per row, in float32. All functions are pure and run inside jit."""

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array

_BANNED = -1e30


@dataclasses.dataclass(frozen=True)
class Sampler:
  """How ids are drawn in one kind of span.

  Attributes:
    temperature: 0 takes the likeliest id.
    top_p: share of the probability mass that is kept, the likeliest ids first.
    repetition_penalty: ids that stand in the sequence already become less likely (Keskar et al.
      2019); 1 is off.
    guidance: pictures only: how far the logits move away from those without a prompt (Ho and
      Salimans 2022); 1 is off.
  """

  temperature: float = 0.0
  top_p: float = 1.0
  repetition_penalty: float = 1.0
  guidance: float = 1.0

  def __post_init__(self):
    if self.temperature < 0:
      raise ValueError(f"temperature is {self.temperature}; it must be >= 0")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1]")
    if self.repetition_penalty <= 0:
      raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be > 0")
    if self.guidance < 0:
      raise ValueError(f"guidance is {self.guidance}; it must be >= 0")


def guide(logits: Array, unconditional: Array, guidance: Array) -> Array:
  """Returns u + guidance (c - u), float32[B, V]: away from what would come without a prompt.

  Args:
    logits: float[B, V], c. unconditional: float[B, V], u. guidance: float32[B].
  """
  c, u = logits.astype(jnp.float32), unconditional.astype(jnp.float32)
  guidance = guidance[:, None]
  return jnp.where(guidance == 1, c, u + guidance * (c - u))


def penalise_repetition(logits: Array, seen: Array, penalty: Array) -> Array:
  """Divides positive and multiplies negative logits of seen ids by the penalty.

  Args:
    logits: float32[B, V]. seen: bool[B, V]. penalty: float32[B].
  """
  penalty = penalty[:, None]
  return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_p(logits: Array, top_p: Array) -> Array:
  """Bans the least likely ids whose probabilities sum to at most 1 - top_p; one always stays.

  Args:
    logits: float32[B, V]. top_p: float32[B].
  """
  order = jnp.argsort(logits, axis=-1)
  ascending = jnp.take_along_axis(logits, order, axis=-1)
  below = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - top_p[:, None]
  below = below.at[:, -1].set(False)
  banned = jnp.zeros_like(below).at[jnp.arange(len(logits))[:, None], order].set(below)
  return jnp.where(banned, _BANNED, logits)


def sample(
  logits: Array,
  allowed: Array,
  seen: Array | None,
  settings: dict[str, Array],
  keys: Array,
  *,
  stochastic: bool,
) -> Array:
  """Returns int32[B], one allowed id per row.

  Args:
    logits: float[B, V]; NaN counts as least likely.
    allowed: bool[B, V]; at least one per row.
    seen: bool[B, V], ids of the sequence so far, or None where nothing is penalised.
    settings: fields of `Sampler`, each float32[B].
    keys: keys [B], one per row, so that a row does not depend on its neighbours.
    stochastic: False promises that every temperature is 0, which saves the sorting.
  """
  logits = jnp.nan_to_num(logits.astype(jnp.float32), nan=_BANNED, posinf=1e30, neginf=_BANNED)
  if seen is not None:
    logits = penalise_repetition(logits, seen, settings["repetition_penalty"])
  logits = jnp.where(allowed, jnp.maximum(logits, 0.99 * _BANNED), -jnp.inf)
  greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  if not stochastic:
    return greedy
  temperature = settings["temperature"]
  warm = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
  warm = jnp.where(allowed, keep_top_p(warm, settings["top_p"]), -jnp.inf)
  drawn = jax.vmap(jax.random.categorical)(keys, warm).astype(jnp.int32)
  return jnp.where(temperature > 0, drawn, greedy)
