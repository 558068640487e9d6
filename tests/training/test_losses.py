import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from aromni_jax.models import sharding
from aromni_jax.training import losses

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures/parity/aromni_losses.safetensors"
FIRST_IMAGE, LAST_IMAGE = 4, 8195


@pytest.fixture(scope="module")
def reference():
  with safe_open(FIXTURE, "np") as f:
    return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["meta"])  # noqa: SIM118


def released_total(ref, kind, weights, image_rows):
  """The released total, from our functions; the shift is what the data transform does."""
  ids = ref[f"{kind}.in.input_ids"].astype(np.int32)
  labels = ref[f"{kind}.in.labels"][:, 1:].astype(np.int32)
  hidden = jnp.asarray(ref[f"{kind}.in.hidden"])
  projection = {"kernel": ref["w.proj.weight"].T, "bias": ref["w.proj.bias"]}
  codes = ids - FIRST_IMAGE
  valid = np.pad(ref[f"{kind}.in.labels"][:, 1:] != -100, ((0, 0), (1, 0)))
  mask = (ids >= FIRST_IMAGE) & (ids <= LAST_IMAGE) & valid & image_rows[:, None]

  def total(hidden):
    nll = losses.weighted_next_token(
      hidden[:, :-1], ref["w.lm_head"].T, np.where(labels < 0, 0, labels), weights
    )
    image = losses.perceptual(hidden, projection, ref["w.table"], codes, mask, "mse")
    return losses.ratio(*nll) + losses.ratio(*image)

  return jax.jit(jax.value_and_grad(total))(hidden)


def test_equals_the_released_pretraining_loss(reference):
  ref, meta = reference
  labels = ref["pre.in.labels"][:, 1:]
  weights = (labels != -100) * np.where(ref["pre.out.tail_mask_shifted"], 2.0, 1.0)
  rows = np.array([task == "text_to_image" for task in meta["tasks"]])
  loss, grad = released_total(ref, "pre", weights.astype(np.float32), rows)
  np.testing.assert_allclose(loss, ref["pre.out.loss.fp32"], rtol=1e-5)
  np.testing.assert_allclose(grad, ref["pre.out.grad_hidden"], atol=1e-5)


def test_equals_the_released_fine_tuning_loss(reference):
  ref, _ = reference
  labels = ref["sft.in.labels"][:, 1:]
  inside = ref["sft.out.inside_mask"][:, 1:]
  weights = (labels != -100) * np.where(inside, 3.0, 1.0)
  loss, grad = released_total(ref, "sft", weights.astype(np.float32), np.ones(2, bool))
  np.testing.assert_allclose(loss, ref["sft.out.loss.fp32"], rtol=1e-5)
  np.testing.assert_allclose(grad, ref["sft.out.grad_hidden"], atol=1e-5)


@pytest.mark.parametrize("block", [0, 2, 4])
def test_blocks_equal_loops(block):
  rng = np.random.default_rng(0)
  hidden, head = rng.normal(size=(2, 8, 5)), rng.normal(size=(5, 8))
  targets, weights = rng.integers(0, 8, (2, 8)), rng.random((2, 8))
  want = weight_sum = 0.0
  for b in range(2):
    for t in range(8):
      logits = hidden[b, t] @ head
      want += weights[b, t] * (np.log(np.exp(logits).sum()) - logits[targets[b, t]])
      weight_sum += weights[b, t]
  f32 = [jnp.asarray(x, jnp.float32) for x in (hidden, head)]
  got = losses.weighted_next_token(*f32, targets, weights.astype(np.float32), block)
  np.testing.assert_allclose(got, (want, weight_sum), rtol=1e-5)
  grads = jax.grad(
    lambda h, w: losses.weighted_next_token(h, w, targets, weights, block)[0], (0, 1)
  )
  whole = jax.grad(lambda h, w: losses.weighted_next_token(h, w, targets, weights)[0], (0, 1))
  for a, b in zip(grads(*f32), whole(*f32), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


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
  got = losses.perceptual(*cast, codes, mask, distance)
  np.testing.assert_allclose(got, (want * scale, 3), rtol=1e-5)


def test_bad_settings_are_named():
  with pytest.raises(ValueError, match="loss.normaliser 'mean'"):
    losses.LossConfig(normaliser="mean")
  with pytest.raises(ValueError, match="vocab_block 3 does not divide the 8 ids"):
    losses.token_losses(jnp.zeros((1, 8, 2)), jnp.zeros((2, 8)), jnp.zeros((1, 8), int), 3)


MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)]


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
