"""What may look at a model while it trains. A new one is an entry here and a field of the
configuration that says how often."""

from collections.abc import Callable

from aromni_jax.training.config import TrainConfig
from aromni_jax.training.loop import Hook


def _samples(config: TrainConfig) -> Callable:
  from aromni_jax.evaluation.samples import Samples

  return Samples(config.base)


# Name -> (field of the configuration with the steps between two looks, maker).
_HOOKS = {"samples": ("sample_every", _samples)}


def make_hooks(config: TrainConfig) -> list[Hook]:
  """Returns the hooks that a configuration asks for; what they need is loaded, and checked, now.

  Raises:
    ValueError, FileNotFoundError: if something that they need is missing.
  """
  return [
    Hook(name, every, make(config))
    for name, (field, make) in _HOOKS.items()
    if (every := getattr(config, field))
  ]
