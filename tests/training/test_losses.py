import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aromni_jax.models import sharding
from aromni_jax.training import losses


@pytest.mark.parametrize("block", [0, 2, 4, 9])
def test_blocks_equal_loops(block):
  rng = np.random.default_rng(0)
  hidden, head = rng.normal(size=(2, 8, 5)), rng.normal(size=(5, 8))
  targets, weights = rng.integers(0, 8, (2, 8)), rng.random((2, 2, 8))
  nll, log_z = np.zeros((2, 8)), np.zeros((2, 8))
  d_hidden, d_head = np.zeros_like(hidden), np.zeros_like(head)
  for b, t in np.ndindex(2, 8):
    logits = hidden[b, t] @ head
    log_z[b, t] = np.log(np.exp(logits).sum())
    nll[b, t] = log_z[b, t] - logits[targets[b, t]]
    # Of the sum of both, each with weights of its own.
    d_logits = weights[:, b, t].sum() * np.exp(logits - log_z[b, t])
    d_logits[targets[b, t]] -= weights[0, b, t]
    d_hidden[b, t] = head @ d_logits
    d_head += np.outer(hidden[b, t], d_logits)

  def total(hidden, head):
    values = losses.token_losses(hidden, head, targets, block)
    return jnp.sum(weights[0] * values[0] + weights[1] * values[1]), values

  f32 = [jnp.asarray(x, jnp.float32) for x in (hidden, head)]
  grads, got = jax.grad(total, (0, 1), has_aux=True)(*f32)
  np.testing.assert_allclose(got, (nll, log_z), rtol=1e-5)
  for a, b in zip(grads, (d_hidden, d_head), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_large_logits_do_not_overflow():
  """Nor do those of the first block count less than they should beside a larger later one."""
  hidden, head = jnp.ones((1, 3, 1)), jnp.array([[-300.0, 0, 300, 299, 1, 2, 250, 300]])
  targets = jnp.array([[2, 3, 0]])
  for block in (0, 2):
    nll, log_z = losses.token_losses(hidden, head, targets, block)
    want = 300 + np.log(2 + np.exp(-1))
    np.testing.assert_allclose(log_z, np.full((1, 3), want), rtol=1e-6)
    np.testing.assert_allclose(nll, [[want - 300, want - 299, want + 300]], rtol=1e-6, atol=1e-4)


def test_z_loss_and_ratio():
  total, count = losses.z_loss(jnp.array([[2.0, 3.0, 5.0]]), jnp.array([[1.0, 0.5, 0.0]]))
  assert (float(total), float(count)) == (8.5, 1.5)
  assert float(losses.ratio(jnp.float32(3.0), jnp.float32(0.5))) == 6.0
  assert float(losses.ratio(jnp.float32(3.0), jnp.float32(0.0))) == 0.0
  assert float(jax.grad(lambda x: losses.ratio(x, jnp.float32(0.0)))(1.0)) == 0.0


@pytest.mark.parametrize("distance,scale", [("squared_l2", 1.0), ("mse", 0.25)])
def test_perceptual_equals_loops(distance, scale):
  rng = np.random.default_rng(0)
  hidden, table = rng.normal(size=(2, 3, 5)), rng.normal(size=(6, 4))
  projection = {"kernel": rng.normal(size=(5, 4)), "bias": rng.normal(size=4)}
  codes, mask = rng.integers(0, 6, (2, 3)), np.array([[1, 0, 1], [0, 0, 1]], bool)
  want = sum(
    np.sum((hidden[i] @ projection["kernel"] + projection["bias"] - table[codes[i]]) ** 2)
    for i in zip(*np.nonzero(mask), strict=True)
  )
  cast = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (hidden, projection, table))
  codes = np.where(mask, codes, -7)  # where the mask is False there may be anything
  got = losses.perceptual(*cast, codes, mask, distance)
  np.testing.assert_allclose(got, (want * scale, 3), rtol=1e-5)
  of_table = jax.grad(lambda table: losses.perceptual(*cast[:2], table, codes, mask, distance)[0])
  assert not of_table(cast[2]).any()  # frozen


def test_bad_settings_are_named():
  with pytest.raises(ValueError, match="vocab_block 3 does not divide the 8 ids"):
    losses.token_losses(jnp.zeros((1, 8, 2)), jnp.zeros((2, 8)), jnp.zeros((1, 8), int), 3)


MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)]


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh, dtype, tolerance",
  [*((mesh, "float32", 1e-5) for mesh in MESHES), ((2, 2, 2), "bfloat16", 0.02)],
)
def test_blocks_on_every_mesh_equal_the_whole(mesh, dtype, tolerance):
  """With token weights and z-loss, value and gradients; over tensor the vocabulary is split."""
  key = jax.random.split(jax.random.key(0), 4)
  hidden = jax.random.normal(key[0], (8, 4, 16)).astype(dtype)
  head = jax.random.normal(key[1], (16, 64))
  targets = jax.random.randint(key[2], (8, 4), 0, 64)
  targets = targets.at[0].set(jnp.array([0, 7, 8, 63]))  # at the ends of blocks and of devices
  weights = jax.random.uniform(key[3], (8, 4)) * (targets % 5 > 0)

  def total(hidden, head, block):
    nll, log_z = losses.token_losses(hidden, head, targets, block)
    return jnp.sum(weights * nll) + 0.1 * losses.z_loss(log_z, weights)[0], (nll, log_z)

  run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True), static_argnums=2)
  want = run(hidden, head, 0)
  count = int(np.prod(mesh))
  mesh = sharding.make_mesh(*mesh, devices=jax.devices()[:count])
  with jax.set_mesh(mesh):
    placed = jax.device_put(head, jax.NamedSharding(mesh, sharding.spec("embed", "vocab")))
    got = run(hidden, placed, 4)
  assert got[1][0].dtype == hidden.dtype and got[1][1].dtype == head.dtype
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


def test_blocks_must_divide_what_a_device_has():
  """16 divides 64 ids, but not the 8 of each of 8 devices."""
  hidden, head, targets = jnp.zeros((8, 4, 16)), jnp.zeros((16, 64)), jnp.zeros((8, 4), int)
  with (
    jax.set_mesh(sharding.make_mesh(1, 1, 8)),
    pytest.raises(ValueError, match="loss.vocab_block 16 does not divide the 8 ids"),
  ):
    losses.token_losses(hidden, head, targets, 16)


def test_blocks_hold_no_whole_logits():
  """No array of the program, forward or backward, has the vocabulary as an axis beside tokens."""
  hidden, head, targets = jnp.zeros((2, 3, 16)), jnp.zeros((16, 64)), jnp.zeros((2, 3), int)

  def program(block):
    def total(hidden, head):
      return losses.token_losses(hidden, head, targets, block)[0].sum()

    return jax.jit(jax.grad(total, (0, 1))).lower(hidden, head).as_text()

  assert "2x3x64x" in program(0)
  assert "2x3x64x" not in program(8) and "2x3x8x" in program(8)
