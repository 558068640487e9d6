"""What the backward pass keeps of a layer: one entry per `model.remat_policy`."""

import dataclasses
from collections.abc import Callable

import jax

from aromni_jax.models.attention import BACKENDS, CONTEXT


@dataclasses.dataclass(frozen=True)
class Remat:
  """A choice between memory and time; all give the same gradients.

  Attributes:
    keeps: names (`checkpoint_name`) of what a layer keeps besides its input; what is not named is
      computed again. None keeps everything.
    passes: how often a layer's forward and backward pass read or write an array [B, T, D] besides
      what products do. Plans reckon with it; fitted to compilations, see docs/scale.md.
  """

  keeps: tuple[str, ...] | None
  passes: int


_ATTENTION = ("qkv", CONTEXT, "attention_out")
# Each keeps more than the one before.
REMAT: dict[str, Remat] = {
  "full": Remat(keeps=(), passes=60),
  "mlp": Remat(keeps=(*_ATTENTION, "mlp_out"), passes=130),
  "up": Remat(keeps=(*_ATTENTION, "mlp_out", "mlp_gate"), passes=140),
  "norms": Remat(keeps=(*_ATTENTION, "mlp_out", "mlp_gate", "mlp_up"), passes=150),
  "none": Remat(keeps=None, passes=170),
}


def checkpoint(body: Callable, policy: str) -> Callable:
  """Returns the body of a layer, whose backward pass keeps what a policy of `REMAT` says."""
  keeps = REMAT[policy].keeps
  if keeps is None:
    return body
  saves = jax.checkpoint_policies.save_only_these_names(*keeps)
  if CONTEXT in keeps:
    for backend in BACKENDS.values():
      saves = jax.checkpoint_policies.save_from_both_policies(saves, backend.keeps)
  return jax.checkpoint(body, policy=saves, prevent_cse=False)
