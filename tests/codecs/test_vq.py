"""Vector quantisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aromni_jax.codecs import vq


def test_nearest_codes_agree_with_brute_force():
  rng = np.random.default_rng(0)
  z, codebook = rng.normal(size=(3, 5, 4)), rng.normal(size=(17, 4))
  want = ((z[..., None, :] - codebook) ** 2).sum(-1).argmin(-1)
  got = vq.nearest_codes(jnp.asarray(z), jnp.asarray(codebook))
  assert got.dtype == jnp.int32
  np.testing.assert_array_equal(got, want)


def test_first_of_equal_codes_wins():
  codebook = jnp.array([[5.0], [1.0], [1.0], [-1.0]])
  np.testing.assert_array_equal(vq.nearest_codes(jnp.array([[1.0], [0.0]]), codebook), [1, 1])


def test_other_dimension_is_refused():
  with pytest.raises(ValueError, match="3 dimensions and the codebook 4"):
    vq.nearest_codes(jnp.zeros((2, 3)), jnp.zeros((8, 4)))


def test_straight_through_keeps_value_and_passes_gradient():
  z, q = jnp.array([0.3, 0.7]), jnp.array([0.0, 1.0])
  np.testing.assert_allclose(vq.straight_through(z, q), q)
  grads = jax.grad(lambda z, q: (vq.straight_through(z, q) * jnp.array([2.0, 3.0])).sum(), (0, 1))
  np.testing.assert_allclose(grads(z, q)[0], [2.0, 3.0])
  np.testing.assert_allclose(grads(z, q)[1], 0.0)


def test_commitment_moves_only_the_vector():
  gz, gq = jax.grad(vq.commitment_loss, (0, 1))(jnp.ones(4), jnp.zeros(4))
  np.testing.assert_allclose(gz, 0.5)
  np.testing.assert_allclose(gq, 0.0)


def test_first_update_moves_every_code_to_the_data():
  z = 0.1 * jax.random.normal(jax.random.key(1), (50, 3)) + 7.0
  state = vq.init_codebook(jax.random.key(0), 16, 3)
  state = vq.update_codebook(state, z, vq.nearest_codes(z, state.embedding), jax.random.key(2))
  assert float(jnp.abs(state.embedding - 7.0).max()) < 0.5


def test_updates_converge_to_cluster_means():
  means = jnp.array([[4.0, 0.0], [-4.0, 0.0], [0.0, 4.0]])
  state = vq.EmaCodebook(means + 1.0, jnp.ones(3), means + 1.0)
  for step in range(60):
    key = jax.random.key(step)
    noise = 0.1 * jax.random.normal(key, (30, 3, 2))
    z = (means + noise - noise.mean(0)).reshape(-1, 2)
    codes = vq.nearest_codes(z, state.embedding)
    state = vq.update_codebook(state, z, codes, key, decay=0.8)
  np.testing.assert_allclose(state.embedding, means, atol=1e-3)
  np.testing.assert_allclose(state.cluster_size, 30.0, rtol=1e-3)


def test_dead_codes_come_back_and_live_ones_stay():
  z = jnp.tile(jnp.array([[1.0, 1.0]]), (8, 1))
  embedding = jnp.array([[1.0, 1.0], [100.0, 100.0]])
  state = vq.EmaCodebook(embedding, jnp.array([8.0, 0.0]), 8.0 * embedding.at[1].set(0.0))
  codes = vq.nearest_codes(z, state.embedding)
  revived = vq.update_codebook(state, z, codes, jax.random.key(0))
  np.testing.assert_allclose(revived.embedding, 1.0, atol=1e-4)
  kept = vq.update_codebook(state, z, codes, jax.random.key(0), dead_below=0.0)
  assert float(kept.cluster_size[1]) == 0.0
  np.testing.assert_allclose(kept.embedding, embedding, atol=1e-4)


def test_code_statistics():
  stats = vq.code_statistics(jnp.array([[0, 1], [1, 0]]), 8)
  assert int(stats["used"]) == 2
  np.testing.assert_allclose(stats["perplexity"], 2.0, rtol=1e-6)
