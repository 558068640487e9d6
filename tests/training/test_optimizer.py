import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aromni_jax.configs import base
from aromni_jax.fields import to_dataclass
from aromni_jax.recipes import PAPER
from aromni_jax.training.optimizer import (
  OptimizerConfig,
  decay_mask,
  is_kernel,
  learning_rate,
  make_optimizer,
)

PARAMS = {
  "embedding": np.array([[0.5, -1.0], [2.0, 0.25]]),
  "layer": {"kernel": np.array([[1.0, -2.0, 0.5], [0.75, 3.0, -1.0]]), "scale": np.ones(3)},
}


def gradients(count, size=1.0):
  rng = np.random.default_rng(0)
  return [jax.tree.map(lambda p: size * rng.normal(size=p.shape), PARAMS) for _ in range(count)]


def updates(config, steps):
  optimizer = make_optimizer(config)
  params = jax.tree.map(jnp.float32, PARAMS)
  state, out = optimizer.init(params), []
  for grads in steps:
    update, state = optimizer.update(jax.tree.map(jnp.float32, grads), state, params)
    out.append(update)
  return out, state


def naive_adam(config, steps):
  """Kingma and Ba 2015 with decoupled decay of the kernels, after clipping the global norm."""
  first, second = (jax.tree.map(np.zeros_like, PARAMS) for _ in range(2))
  for t, grads in enumerate(steps, 1):
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
    scale = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
    grads = jax.tree.map(lambda g, scale=scale: scale * g, grads)
    first = jax.tree.map(lambda m, g: config.b1 * m + (1 - config.b1) * g, first, grads)
    second = jax.tree.map(lambda v, g: config.b2 * v + (1 - config.b2) * g**2, second, grads)
    out = jax.tree.map(
      lambda m, v, t=t: m / (1 - config.b1**t) / (np.sqrt(v / (1 - config.b2**t)) + config.epsilon),
      first,
      second,
    )
    out["layer"]["kernel"] = (
      out["layer"]["kernel"] + config.weight_decay * PARAMS["layer"]["kernel"]
    )
    yield out


@pytest.mark.parametrize(
  "changed", [{}, {"clip_norm": 0.0}, {"clip_norm": 100.0}, {"b1": 0.8, "b2": 0.9, "epsilon": 0.1}]
)
def test_adam_is_the_papers(changed):
  config = OptimizerConfig(weight_decay=0.5, epsilon=0.01)
  config = dataclasses.replace(config, **changed)
  steps = gradients(3, size=2.0)
  got, _ = updates(config, steps)
  for one, want in zip(got, naive_adam(config, steps), strict=True):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, want)


def test_the_first_moment_is_stored_as_it_is_told():
  for dtype in ("float32", "bfloat16"):
    for name in ("adam", "muon"):
      _, state = updates(OptimizerConfig(name=name, mu_dtype=dtype), gradients(1))
      kinds = {str(x.dtype) for x in jax.tree.leaves(state) if x.dtype != jnp.int32}
      assert kinds == {"float32", dtype}, (name, kinds)


def test_muon_turns_kernels_and_adam_has_the_rest():
  config = OptimizerConfig(name="muon", weight_decay=0.5, clip_norm=0.0)
  adam = dataclasses.replace(config, name="adam")
  steps = gradients(2)
  got, _ = updates(config, steps)
  for one, other in zip(got, updates(adam, steps)[0], strict=True):
    np.testing.assert_array_equal(one["embedding"], other["embedding"])
    np.testing.assert_array_equal(one["layer"]["scale"], other["layer"]["scale"])
  # Singular values near 1, times 0.2 sqrt(3), the size of Adam's elements; Newton-Schulz is rough.
  turned = np.asarray(got[0]["layer"]["kernel"]) - 0.5 * PARAMS["layer"]["kernel"]
  u, _, v = np.linalg.svd(steps[0]["layer"]["kernel"], full_matrices=False)
  size = np.diag(u.T @ turned @ v.T) / (0.2 * 3**0.5)
  assert ((size > 0.6) & (size < 1.3)).all(), size
  rest = turned / (0.2 * 3**0.5) - u @ np.diag(size) @ v
  np.testing.assert_allclose(rest, 0, atol=1e-3)  # it turns nothing away from the gradient


def test_kernels_are_known_by_their_path():
  mask = decay_mask(PARAMS)
  assert mask == {"embedding": False, "layer": {"kernel": True, "scale": False}}
  (path, _), *_ = jax.tree_util.tree_leaves_with_path({"kernel": 1})
  assert is_kernel(path)


@pytest.mark.parametrize(
  "schedule, final, done, want",
  [
    ("constant", 0.0, 0.7, 1.0),
    ("linear", 0.0, 0.25, 0.75),
    ("linear", 0.2, 0.25, 0.8),
    ("linear", 0.2, 1.0, 0.2),
    ("cosine", 0.0, 0.25, 0.5 + 0.5 * np.cos(np.pi / 4)),
    ("cosine", 0.1, 1.0, 0.1),
    ("linear", 0.0, -0.5, 1.0),  # a clock may run a little early or late
    ("linear", 0.0, 1.5, 0.0),
  ],
)
def test_the_rate_decays_to_its_share(schedule, final, done, want):
  config = OptimizerConfig(learning_rate=3.0, warmup_steps=4, schedule=schedule, final_ratio=final)
  assert learning_rate(config, 4, done) == pytest.approx(3.0 * want)
  assert learning_rate(config, 3, done) == pytest.approx(3.0 * want)  # the fourth step is warm
  assert learning_rate(config, 0, done) == pytest.approx(3.0 * want / 4)
  cold = dataclasses.replace(config, warmup_steps=0)
  assert learning_rate(cold, 0, done) == pytest.approx(3.0 * want)


def test_the_defaults_are_those_of_the_papers_pretraining():
  """In `configs/base.py`, too."""
  assert to_dataclass(OptimizerConfig, base.get_config().optimizer.to_dict()) == OptimizerConfig()
  assert OptimizerConfig().learning_rate == PAPER.training["optimizer.learning_rate"] == 6e-5


def test_wrong_settings_are_named():
  for name, value, message in (
    ("schedule", "step", "optimizer.schedule 'step'; expected cosine, linear or constant"),
    ("name", "sgd", "optimizer.name 'sgd'; expected adam or muon"),
    ("mu_dtype", "float16", "optimizer.mu_dtype 'float16'; expected float32 or bfloat16"),
  ):
    with pytest.raises(ValueError, match=message):
      OptimizerConfig(**{name: value})
