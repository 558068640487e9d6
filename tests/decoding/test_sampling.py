import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aromni_jax.decoding.sampling import keep_top_p, penalise_repetition, sample
from aromni_jax.recipes import Sampler


def test_repetition_penalty_against_a_loop():
  rng = np.random.default_rng(0)
  logits, seen = rng.normal(size=(3, 7)).astype(np.float32), rng.random((3, 7)) < 0.5
  penalty = np.array([1.0, 1.5, 3.0], np.float32)
  want = logits.copy()
  for b in range(3):
    for v in np.flatnonzero(seen[b]):
      want[b, v] = logits[b, v] / penalty[b] if logits[b, v] > 0 else logits[b, v] * penalty[b]
  np.testing.assert_allclose(penalise_repetition(logits, seen, penalty), want, rtol=1e-6)


def test_top_p_keeps_the_smallest_likely_set():
  probabilities = np.array([[0.1, 0.5, 0.15, 0.25]] * 4, np.float32)
  kept = keep_top_p(jnp.log(probabilities), jnp.array([0.4, 0.6, 0.8, 1.0])) > -1e29
  np.testing.assert_array_equal(kept, [[0, 1, 0, 0], [0, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]])


def settings(**values):
  defaults = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0} | values
  return {k: jnp.full(2, v, jnp.float32) for k, v in defaults.items()}


def draw(logits, allowed, seed, **values):
  keys = jax.random.split(jax.random.key(seed), 2)
  return sample(logits, allowed, None, settings(**values), keys, stochastic=True)


@pytest.mark.slow
def test_draws_follow_the_probabilities_of_allowed_ids():
  logits = jnp.log(jnp.array([[0.6, 0.2, 0.2]] * 2))
  allowed = jnp.array([[True, True, False], [False, True, True]])
  drawn = np.stack(jax.vmap(lambda s: draw(logits, allowed, s))(jnp.arange(2000)))
  assert np.mean(drawn[:, 0] == 0) == pytest.approx(0.75, abs=0.04)
  assert np.mean(drawn[:, 1] == 1) == pytest.approx(0.5, abs=0.04)
  assert set(drawn[:, 1]) == {1, 2}
  cold = np.stack(jax.vmap(lambda s: draw(logits, allowed, s, temperature=0.0))(jnp.arange(50)))
  assert set(cold[:, 0]) == {0}


def test_nan_and_infinite_logits_still_give_an_allowed_id():
  allowed = jnp.array([[False, True, False], [True, False, True]])
  for value in (jnp.nan, jnp.inf, -jnp.inf):
    logits = jnp.full((2, 3), value)
    for stochastic in (False, True):
      keys = jax.random.split(jax.random.key(0), 2)
      out = sample(logits, allowed, None, settings(), keys, stochastic=stochastic)
      assert allowed[jnp.arange(2), out].all()


@pytest.mark.parametrize(
  "field, value", [("temperature", -1.0), ("top_p", 0.0), ("repetition_penalty", 0.0)]
)
def test_wrong_settings_are_named(field, value):
  with pytest.raises(ValueError, match=f"{field} is {value}"):
    Sampler(**{field: value})
