"""Samplers: logits -> ids, per row, in float32. All functions are pure and run inside jit."""

import jax
import jax.numpy as jnp

Array = jax.Array

_BANNED = -1e30


def guide(logits: Array, guidance: Array, image_guidance: Array) -> Array:
  """Returns u + image_guidance (i - u) + guidance (c - i), float32[B, V].

  Args:
    logits: float[2 or 3, B, V]: c after the whole sequence, u after the picture so far alone, and i
      after all pictures; two where i is u.
    guidance, image_guidance: float32[B]; rows where what counts of them is 1 stay c.
  """
  c, u, *i = logits.astype(jnp.float32)
  guidance, image_guidance = guidance[:, None], image_guidance[:, None]
  if not i:
    return jnp.where(guidance == 1, c, u + guidance * (c - u))
  guided = u + image_guidance * (i[0] - u) + guidance * (c - i[0])
  return jnp.where((guidance == 1) & (image_guidance == 1), c, guided)


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


def warp(
  logits: Array, allowed: Array, seen: Array | None, settings: dict[str, Array], *, stochastic: bool
) -> Array:
  """Returns float32[B, V], the logits of what is drawn: banned ids at -1e30 or lower.

  In this order: repetition penalty, allowed ids only, temperature (none where it is 0), top-p.
  Arguments as in `sample`; the last two are left out unless `stochastic`.
  """
  logits = jnp.nan_to_num(logits.astype(jnp.float32), nan=_BANNED, posinf=1e30, neginf=_BANNED)
  if seen is not None:
    logits = penalise_repetition(logits, seen, settings["repetition_penalty"])
  logits = jnp.where(allowed, jnp.maximum(logits, 0.99 * _BANNED), -jnp.inf)
  if not stochastic:
    return logits
  temperature = settings["temperature"]
  warm = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
  return jnp.where(allowed, keep_top_p(warm, settings["top_p"]), -jnp.inf)


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
  warm = warp(logits, allowed, seen, settings, stochastic=stochastic)
  greedy = jnp.argmax(warm, axis=-1).astype(jnp.int32)  # top-p keeps the likeliest id
  if not stochastic:
    return greedy
  drawn = jax.vmap(jax.random.categorical)(keys, warm).astype(jnp.int32)
  return jnp.where(settings["temperature"] > 0, drawn, greedy)
