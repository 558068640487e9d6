import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from aromni_jax.configs import base
from aromni_jax.data.loss_weights import LossWeightConfig
from aromni_jax.data.pipeline import DataConfig, make_train_iterator
from aromni_jax.models import decoder as decoder_lib
from aromni_jax.models import sharding
from aromni_jax.tasks import TASKS
from aromni_jax.training import setup as setup_lib
from aromni_jax.training import step as step_lib
from aromni_jax.training.config import TrainConfig, to_dataclass
from aromni_jax.training.losses import token_losses
from aromni_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from aromni_jax.training.terms import LossConfig, image_targets
from tests.tiny import DECODER, VOCABULARY

MODEL = dataclasses.replace(DECODER, num_kv_heads=4)
LOSS = LossConfig(perceptual_weight=0.1, z_loss_weight=1e-4, normaliser="weights")
TABLE = jax.random.normal(jax.random.key(7), (1024, 8))


@pytest.fixture(scope="module")
def batches(shards):
  iterator = make_train_iterator(DataConfig(str(shards)), VOCABULARY, batch_size=8)
  return [next(iterator) for _ in range(3)]


def make_setup(mesh=(1, 1, 1), accumulate=1, loss=LOSS, model=MODEL, optimizer="adam", length=512):
  """The step that training has, on a (data, fsdp, tensor) mesh of the first devices."""
  config = to_dataclass(TrainConfig, base.get_config().to_dict())
  config = dataclasses.replace(
    config,
    batch_size=8,
    accumulate=accumulate,
    model=model,
    loss=loss,
    optimizer=OptimizerConfig(name=optimizer),
    data=dataclasses.replace(config.data, sequence_length=length),
  )
  mesh = sharding.make_mesh(*mesh, devices=jax.devices()[: int(np.prod(mesh))])
  return setup_lib.build(config, VOCABULARY, TABLE.shape, mesh)


def run(batches, **options):
  """Losses of some steps and the parameters after them."""
  setup = make_setup(**options)
  state = setup.init(jax.random.key(0), {})
  metrics = []
  for batch in batches:
    placed = jax.device_put(batch, setup.batch.tokens.sharding)
    table = jax.device_put(TABLE, setup.table.sharding) if setup.table else None
    state, values = setup.step(state, placed, table, jnp.float32(1e-3))
    metrics.append(jax.device_get(values))
  assert setup.step.__wrapped__._cache_size() == 1  # compiled once
  return metrics, jax.device_get(state.params)


@pytest.fixture(scope="module")
def reference(batches):
  return run(batches)


def assert_same(one, other, rtol=2e-5):
  for a, b in zip(one[0], other[0], strict=True):
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=1e-6, err_msg=name)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), one[1], other[1])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_eight_devices_equal_one(batches, reference, mesh):
  assert_same(reference, run(batches, mesh=mesh))


@pytest.mark.slow
@pytest.mark.parametrize("normaliser", ["tokens", "weights"])
def test_accumulation_equals_the_big_batch(batches, normaliser):
  loss = dataclasses.replace(LOSS, normaliser=normaliser)
  assert_same(run(batches, loss=loss), run(batches, loss=loss, accumulate=4))


@pytest.mark.slow
def test_muon_on_eight_devices_equals_one(batches):
  assert_same(run(batches, optimizer="muon"), run(batches, mesh=(2, 2, 2), optimizer="muon"))


@pytest.mark.slow
def test_muon_turns_matrices_and_leaves_the_rest_to_adam():
  key = jax.random.key(0)
  adam, muon = (make_optimizer(OptimizerConfig(name=n, clip_norm=0)) for n in ("adam", "muon"))
  params = make_setup().init(key, {}).params
  # Gradients of rank one, as if from one token: Adam and Muon differ most there.
  grads = jax.tree.map(lambda p: jnp.ones_like(p) + 0.01 * jax.random.normal(key, p.shape), params)
  one, other = (
    dict(jax.tree_util.tree_leaves_with_path(t.update(grads, t.init(params), params)[0]))
    for t in (adam, muon)
  )
  assert one.keys() == other.keys()
  for path in one:
    if "kernel" not in jax.tree_util.keystr(path):
      np.testing.assert_array_equal(one[path], other[path])
      continue
    width = max(other[path].shape[-2:])
    singular = np.linalg.svd(other[path], compute_uv=False) / (0.2 * width**0.5)
    # Newton-Schulz brings most of them near 1; the gradient's first is 100 times the others.
    assert np.median(singular) > 0.5 and singular.max() < 1.3, path
  shardings = sharding.state_shardings(
    jax.eval_shape(muon.init, params), sharding.make_mesh(2, 2, 2)
  )
  specs = [s.spec for s in jax.tree.leaves(shardings)]
  assert PartitionSpec(None, "fsdp", "tensor") in specs  # its momentum is split, too


@pytest.mark.slow
def test_accumulation_on_a_mesh(batches, reference):
  assert_same(reference, run(batches, mesh=(2, 1, 2), accumulate=2))


@pytest.mark.slow
def test_unrolled_layers_and_blocked_logits_equal_the_rest(batches, reference):
  model = dataclasses.replace(MODEL, scan_layers=False, remat_policy="full")
  assert_same(reference, run(batches, model=model, loss=dataclasses.replace(LOSS, vocab_block=368)))


@pytest.mark.slow
def test_a_frozen_projection_stays_is_used_and_counts_in_no_norm(batches):
  loss = dataclasses.replace(LOSS, train_projection=False)
  before = run(batches[:1], loss=loss)[1]["projection"]
  metrics, params = run(batches, loss=loss)
  jax.tree.map(np.testing.assert_array_equal, before, params["projection"])
  trained = run(batches)
  assert np.abs(trained[1]["projection"]["kernel"] - before["kernel"]).max() > 1e-4
  # The loss is the same; what clips the gradient is the norm of the decoder's alone.
  assert metrics[0]["loss"] == pytest.approx(trained[0][0]["loss"], rel=1e-6)
  assert metrics[0]["grad_norm"] < 0.99 * trained[0][0]["grad_norm"]
  setup = make_setup(loss=loss)
  state = setup.init(jax.random.key(0), {})
  grads, _ = step_lib.gradients(
    {"decoder": state.params["decoder"]},
    {"projection": state.params["projection"]},
    batches[0],
    TABLE,
    setup.step_config,
  )
  assert metrics[0]["grad_norm"] == pytest.approx(float(optax.global_norm(grads)), rel=1e-5)
  moments = jax.tree.leaves(state.opt_state)
  assert sum(x.size for x in moments) < 2.1 * MODEL.num_params()


@pytest.mark.slow
def test_without_the_perceptual_loss_no_image_codec_is_needed(batches):
  loss = dataclasses.replace(LOSS, perceptual_weight=0.0)
  config = to_dataclass(TrainConfig, base.get_config().to_dict())
  config = dataclasses.replace(config, model=MODEL, loss=loss)
  setup = setup_lib.build(config, VOCABULARY, None, sharding.make_mesh(1, 1, 1, jax.devices()[:1]))
  assert setup.table is None and set(setup.state.params) == {"decoder"}
  metrics, params = run(batches, loss=loss)
  assert set(params) == {"decoder"} and "loss/perceptual" not in metrics[0]
  with_it = run(batches)[0][0]
  assert metrics[0]["loss/next_token"] == pytest.approx(with_it["loss/next_token"], rel=1e-6)


@pytest.mark.slow
def test_losses_of_tasks_are_weighted_means(batches):
  batch = batches[0]
  setup = make_setup()
  params = setup.init(jax.random.key(0), {}).params
  metrics = step_lib.summarise(*setup.evaluate(params, batch, TABLE), LOSS)
  decoder = setup.decoder(params)
  hidden = decoder(batch.tokens, batch.positions, batch.segment_ids)
  nll = np.asarray(token_losses(hidden, decoder.head[...], batch.targets)[0])
  assert len(np.unique(batch.loss_weights)) > 2
  for i, task in enumerate(TASKS):
    weights = batch.loss_weights * (batch.task_ids == i)
    if weights.any():
      want = np.sum(weights * nll) / np.sum(weights)
      assert float(metrics[f"task/{task}"]) == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_loss_of_the_right_targets_falls(batches):
  metrics, _ = run([batches[0]] * 12)
  assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.2
  assert metrics[0]["modality/text"] == pytest.approx(np.log(VOCABULARY.size), abs=0.3)


def test_perceptual_tasks_choose_the_pictures(batches):
  def pairs(**options):
    batch = jax.tree.map(jnp.asarray, batches[0])
    return image_targets(batch, VOCABULARY, LossConfig(**options))

  codes, mask = pairs()
  assert mask.any() and ((codes[mask] >= 0) & (codes[mask] < len(VOCABULARY.image))).all()
  _, some = pairs(perceptual_tasks=("text_to_image",))
  assert 0 < some.sum() < mask.sum()
  own_codes, own = pairs(perceptual_pairing="own_position")
  np.testing.assert_array_equal(own_codes[own], VOCABULARY.image_codes(batches[0].tokens[own]))
  assert own.sum() == mask.sum()


@pytest.mark.parametrize("pairing", ["predicting", "own_position"])
def test_pictures_of_prompts_that_do_not_count_are_left_out(shards, pairing):
  weights = LossWeightConfig(prompt=0.0)
  data = DataConfig(str(shards), mixture={"image_caption": 1.0}, loss_weights=weights)
  batch = next(make_train_iterator(data, VOCABULARY, batch_size=8))
  batch = jax.tree.map(jnp.asarray, batch)
  assert not image_targets(batch, VOCABULARY, LossConfig(perceptual_pairing=pairing))[1].any()


def test_learning_rate_schedules():
  config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule="cosine")
  assert learning_rate(config, 1, 0.0) == 0.5
  assert learning_rate(config, 9, 0.5) == pytest.approx(0.5)
  assert learning_rate(config, 9, 1.0) == pytest.approx(0.0)
  linear = dataclasses.replace(config, schedule="linear", final_ratio=0.1)
  assert learning_rate(linear, 9, 0.5) == pytest.approx(0.55)
  with pytest.raises(ValueError, match="optimizer.schedule 'step'"):
    OptimizerConfig(schedule="step")
  with pytest.raises(ValueError, match="optimizer.name 'sgd'; expected adam or muon"):
    OptimizerConfig(name="sgd")


@pytest.mark.slow
def test_similar_codes_start_alike():
  table = TABLE.at[1].set(TABLE[0] + 0.01)  # codes 0 and 1 are nearly the same
  config = to_dataclass(TrainConfig, base.get_config().to_dict())
  config = dataclasses.replace(config, model=MODEL, code_embedding_std=0.3)
  _, decoder = decoder_lib.init_params(MODEL, jax.random.key(0))
  setup_lib.embed_codebooks(decoder, {"image": table}, VOCABULARY, config, jax.random.key(1))
  start = VOCABULARY.image.start
  for rows, std, ratio in (
    (decoder["embedding"][...], 0.3, 0.3),
    (decoder["head"][...].T, 0.02, 0.95),  # as much noise as codebook
  ):
    codes = rows[start : VOCABULARY.image.stop]
    assert float(jnp.std(codes)) == pytest.approx((std**2 + MODEL.init_std**2) ** 0.5, rel=0.1)
    near, far = jnp.linalg.norm(codes[0] - codes[1]), jnp.linalg.norm(codes[0] - codes[2:], axis=1)
    assert near < ratio * jnp.median(far)
    text = rows[VOCABULARY.text.start : VOCABULARY.text.stop]
    assert float(jnp.std(text)) == pytest.approx(MODEL.init_std, rel=0.1)
