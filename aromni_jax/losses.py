"""Losses as pure functions: float32 sums with their weights, never means.

Next-token prediction with token weights and perceptual alignment are those of AR-Omni (arXiv
2601.17761, sections on weighted NTP and perceptual alignment). Paper and released code differ;
every difference is a field of `LossConfig`, and `recipe` sets them all.
"""

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array
Sum = tuple[Array, Array]


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Which losses, and in which variant.

  Attributes:
    perceptual_weight: lambda of the perceptual loss; 0 leaves it out.
    perceptual_pairing: "predicting" pairs the state that predicts a code with that code (paper);
      "own_position" the state at the code's own position (released code).
    perceptual_distance: "squared_l2" sums over dimensions (paper), "mse" averages (released).
    perceptual_tasks: tasks whose pictures count; empty means all.
    train_projection: whether the projection is trained (paper) or stays random (released).
    normaliser: "tokens" divides by the number of targets (paper), "weights" by the sum of their
      weights (released).
    z_loss_weight: weight of log(Z)^2; 0 leaves it out.
    block_size: positions whose logits exist at once; 0 means all.
  """

  perceptual_weight: float = 0.1
  perceptual_pairing: str = "predicting"
  perceptual_distance: str = "squared_l2"
  perceptual_tasks: tuple[str, ...] = ()
  train_projection: bool = True
  normaliser: str = "tokens"
  z_loss_weight: float = 0.0
  block_size: int = 0

  def __post_init__(self):
    object.__setattr__(self, "perceptual_tasks", tuple(self.perceptual_tasks))
    for field, choices in {
      "perceptual_pairing": ("predicting", "own_position"),
      "perceptual_distance": ("squared_l2", "mse"),
      "normaliser": ("tokens", "weights"),
    }.items():
      if getattr(self, field) not in choices:
        raise ValueError(f"loss.{field} {getattr(self, field)!r}; expected one of {choices}")


RECIPES = {
  "paper": LossConfig(),
  "released": LossConfig(
    perceptual_weight=1.0,
    perceptual_pairing="own_position",
    perceptual_distance="mse",
    perceptual_tasks=("text_to_image",),
    train_projection=False,
    normaliser="weights",
  ),
}


def token_losses(hidden: Array, head: Array, targets: Array, block_size: int = 0) -> Sum:
  """Returns the negative log likelihood of every target and log(Z), both float32[B, T].

  The head is applied in blocks of positions and again in the backward pass, so that the logits
  [B, T, V] never exist at once.

  Args:
    hidden: [B, T, D] final hidden states.
    head: [D, V].
    targets: int32[B, T].
    block_size: positions per block; 0 is one block, whose logits are kept for the backward pass.

  Raises:
    ValueError: if T is not a multiple of the block size.
  """
  if not block_size or block_size >= hidden.shape[1]:
    return _block_losses(hidden, head, targets)
  batch, length, dim = hidden.shape
  if length % block_size:
    raise ValueError(
      f"loss.block_size {block_size} does not divide the sequence length {length}; "
      "choose a divisor or 0"
    )
  blocks = length // block_size
  xs = (
    hidden.reshape(batch, blocks, block_size, dim).swapaxes(0, 1),
    targets.reshape(batch, blocks, block_size).swapaxes(0, 1),
  )

  @jax.checkpoint
  def body(_, x):
    return None, _block_losses(x[0], head, x[1])

  _, out = jax.lax.scan(body, None, xs)
  nll, log_z = (x.swapaxes(0, 1).reshape(batch, length) for x in out)
  return nll, log_z


def _block_losses(hidden: Array, head: Array, targets: Array) -> Sum:
  head = head.astype(hidden.dtype)
  logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return log_z - chosen, log_z


def weighted_next_token(
  hidden: Array, head: Array, targets: Array, weights: Array, block_size: int = 0
) -> Sum:
  """Returns (sum of weight * nll, sum of weights) over all positions.

  Args:
    hidden, head, targets, block_size: as in `token_losses`.
    weights: float32[B, T], 0 where nothing is to be predicted.
  """
  nll, _ = token_losses(hidden, head, targets, block_size)
  return jnp.sum(weights * nll), jnp.sum(weights)


def z_loss(log_z: Array, weights: Array) -> Sum:
  """Returns (sum of weight * log(Z)^2, sum of weights); keeps logits from drifting."""
  return jnp.sum(weights * log_z**2), jnp.sum(weights)


def perceptual(
  hidden: Array,
  projection: dict[str, Array],
  table: Array,
  codes: Array,
  mask: Array,
  distance: str = "squared_l2",
) -> Sum:
  """Returns (sum of distances, number of positions): states should point at image embeddings.

  Args:
    hidden: [B, T, D] final hidden states.
    projection: {"kernel": [D, E], "bias": [E]}, W_h of the paper.
    table: float32[codes, E], frozen embeddings of the image codes.
    codes: int32[B, T], the code that belongs to each state; anything where the mask is False.
    mask: bool[B, T].
    distance: "squared_l2" or "mse", see `LossConfig`.
  """
  table = jax.lax.stop_gradient(table)
  wanted = table[jnp.where(mask, codes, 0)]
  kernel, bias = (projection[k].astype(jnp.float32) for k in ("kernel", "bias"))
  error = (hidden.astype(jnp.float32) @ kernel + bias - wanted) ** 2
  error = error.sum(-1) if distance == "squared_l2" else error.mean(-1)
  return jnp.sum(jnp.where(mask, error, 0.0)), jnp.sum(mask.astype(jnp.float32))


def ratio(total: Array, count: Array) -> Array:
  """Returns total / count, and 0 where nothing was counted."""
  return jnp.where(count > 0, total / jnp.maximum(count, 1e-9), 0.0)
