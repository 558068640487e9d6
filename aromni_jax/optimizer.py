"""Adam with decoupled weight decay, and its learning rate."""

import dataclasses
import math

import jax
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Attributes:
  learning_rate: peak rate.
  schedule: "cosine", "linear" or "constant" after the warm-up.
  warmup_steps: steps of linear warm-up.
  final_ratio: last rate as a share of the peak.
  b1, b2, epsilon: Adam's.
  weight_decay: decoupled decay of matrices; embeddings, norms and biases have none.
  clip_norm: largest global norm of the gradient; 0 never clips.
  """

  learning_rate: float = 6e-5
  schedule: str = "linear"
  warmup_steps: int = 7000
  final_ratio: float = 0.0
  b1: float = 0.9
  b2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float = 1.0

  def __post_init__(self):
    if self.schedule not in ("cosine", "linear", "constant"):
      raise ValueError(f"optimizer.schedule {self.schedule!r}; expected cosine, linear or constant")


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
  adam = optax.scale_by_adam(config.b1, config.b2, config.epsilon)
  return optax.chain(clip, adam, optax.add_decayed_weights(config.weight_decay, decay_mask))


def decay_mask(params):
  """Returns True for the leaves that decay: kernels, by their path."""

  def decays(path, _):
    return "kernel" in jax.tree_util.keystr(path)

  return jax.tree_util.tree_map_with_path(decays, params)
