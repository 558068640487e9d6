"""Adam or Muon with decoupled weight decay, and their learning rate."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers, scale_by_muon

_ADAM_RMS = 0.2  # typical size of an element of Adam's update


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Attributes:
  name: "adam", or "muon": matrices move by their orthogonalised momentum (Jordan et al. 2024),
    everything else by Adam.
  learning_rate: peak rate.
  schedule: "cosine", "linear" or "constant" after the warm-up.
  warmup_steps: steps of linear warm-up.
  final_ratio: last rate as a share of the peak.
  b1, b2, epsilon: Adam's; Muon's momentum is 0.95.
  mu_dtype: storage type of Adam's first moment.
  weight_decay: decoupled decay of matrices; embeddings, norms and biases have none.
  clip_norm: largest global norm of the gradient; 0 never clips.
  """

  name: str = "adam"
  learning_rate: float = 6e-5
  schedule: str = "linear"
  warmup_steps: int = 7000
  final_ratio: float = 0.0
  b1: float = 0.9
  b2: float = 0.95
  epsilon: float = 1e-8
  mu_dtype: str = "float32"
  weight_decay: float = 0.0
  clip_norm: float = 1.0

  def __post_init__(self):
    if self.name not in ("adam", "muon"):
      raise ValueError(f"optimizer.name {self.name!r}; expected adam or muon")
    if self.schedule not in ("cosine", "linear", "constant"):
      raise ValueError(f"optimizer.schedule {self.schedule!r}; expected cosine, linear or constant")
    if self.mu_dtype not in ("float32", "bfloat16"):
      raise ValueError(f"optimizer.mu_dtype {self.mu_dtype!r}; expected float32 or bfloat16")


def learning_rate(config: OptimizerConfig, step: int, progress: float) -> float:
  """Returns the rate of a step.

  Args:
    config: schedule.
    step: steps done before this one.
    progress: share of the training that is done, 0 to 1.
  """
  left = 1.0 - min(max(progress, 0.0), 1.0)
  decay = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
  floor = config.final_ratio
  warmup = min(1.0, (step + 1) / max(config.warmup_steps, 1))
  return config.learning_rate * warmup * (floor + (1 - floor) * decay[config.schedule])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
  """Returns the transformation without the rate, which the step multiplies in."""
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
  direction = optax.scale_by_adam(
    config.b1, config.b2, config.epsilon, mu_dtype=jnp.dtype(config.mu_dtype)
  )
  if config.name == "muon":
    direction = _split(_muon(), direction)
  return optax.chain(clip, direction, optax.add_decayed_weights(config.weight_decay, decay_mask))


def is_kernel(path: jax.tree_util.KeyPath) -> bool:
  """Whether a parameter is a matrix between two widths: no embedding, head, norm or bias."""
  return "kernel" in jax.tree_util.keystr(path)


def decay_mask(params):
  """Returns True for the leaves that decay: kernels, by their path."""
  return jax.tree_util.tree_map_with_path(lambda path, _: is_kernel(path), params)


def _muon() -> optax.GradientTransformation:
  """Muon whose updates are as large as Adam's (arXiv 2502.16982), so that one rate serves both."""

  def axes(updates):  # of [in, out] or [L, in, out]
    return jax.tree.map(lambda x: MuonDimensionNumbers(-2, -1), updates)

  def match_adam(updates, params):
    return jax.tree.map(lambda x: _ADAM_RMS * max(x.shape[-2:]) ** 0.5 * x, updates)

  return optax.chain(scale_by_muon(weight_dimension_numbers=axes), optax.stateless(match_adam))


def _split(
  kernels: optax.GradientTransformation, others: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Returns one transformation for kernels and one for all other parameters.

  Both see dicts of gradients by path, with the parameters' sharding metadata, which the masks of
  `optax.partition` would lose. Neither is given the parameters.
  """

  def flatten(tree):
    flat, treedef = jax.tree_util.tree_flatten_with_path(
      tree, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    paths = [path for path, _ in flat]
    parts: tuple[dict, dict] = ({}, {})
    for path, leaf in flat:
      parts[not is_kernel(path)][jax.tree_util.keystr(path)] = leaf
    return parts, paths, treedef

  def init(params):
    parts, _, _ = flatten(params)
    return tuple(t.init(part) for t, part in zip((kernels, others), parts, strict=True))

  def update(updates, state, params=None):
    del params
    parts, paths, treedef = flatten(updates)
    out, states = {}, []
    for transform, part, old in zip((kernels, others), parts, state, strict=True):
      new, after = transform.update(part, old)
      out |= new
      states.append(after)
    leaves = [out[jax.tree_util.keystr(path)] for path in paths]
    return jax.tree_util.tree_unflatten(treedef, leaves), tuple(states)

  return optax.GradientTransformation(init, update)
