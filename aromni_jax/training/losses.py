"""Losses as pure functions: float32 sums with their weights, never means."""

import functools

import jax
import jax.numpy as jnp

from aromni_jax.models.sharding import gather, on_devices, scatter, shard

Array = jax.Array
Sum = tuple[Array, Array]


def token_losses(hidden: Array, head: Array, targets: Array, vocab_block: int = 0) -> Sum:
  """Returns the negative log likelihood of every target and log(Z), both float32[B, T].

  The head is applied in blocks of the vocabulary, and again in the backward pass, so that the
  logits [B, T, V] never exist at once. A head that is split over devices is gathered block by
  block too, never as a whole, and its gradient is scattered block by block.

  Args:
    hidden: [B, T, D] final hidden states.
    head: [D, V].
    targets: int32[B, T].
    vocab_block: ids per block; 0 is one block, whose logits are kept for the backward pass.

  Raises:
    ValueError: if the blocks do not divide the vocabulary as it is split.
  """
  if not vocab_block or vocab_block >= head.shape[1]:
    head = head.astype(hidden.dtype)
    logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], log_z
  return _blocked_losses(hidden, head, targets, vocab_block)


_HIDDEN, _HEAD = ("act_batch", "act_length", "act_embed"), ("embed", "vocab")
_TOKENS = ("act_batch", "act_length")


def _head_blocks(head: Array, size: int) -> tuple[Array, Array]:
  """Returns this device's part of the head in blocks [K, D, W], and the first id of each."""
  dim, count = head.shape
  if count % size:
    raise ValueError(
      f"loss.vocab_block {size} does not divide the {count} ids of the vocabulary that a device "
      "has; choose a divisor or 0"
    )
  blocks = head.reshape(dim, count // size, size).transpose(1, 0, 2)
  first = jax.lax.axis_index("tensor") * count
  return blocks, first + jnp.arange(0, count, size, dtype=jnp.int32)


def _block_logits(hidden: Array, block: Array, start: Array, targets: Array):
  """Returns the gathered block, the logits float32[B, T, W] and where they are the targets'."""
  block = gather(block.astype(hidden.dtype), "embed", "vocab")
  logits = jnp.einsum("btd,dw->btw", hidden, block, preferred_element_type=jnp.float32)
  return block, logits, start + jnp.arange(block.shape[1]) == targets[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked_losses(hidden: Array, head: Array, targets: Array, size: int) -> Sum:
  def local(hidden, head, targets):
    def body(carry, scanned):
      largest, total, chosen = carry
      _, logits, is_target = _block_logits(hidden, *scanned, targets)
      new = jnp.maximum(largest, logits.max(-1))
      total = total * jnp.exp(largest - new) + jnp.exp(logits - new[..., None]).sum(-1)
      return (new, total, chosen + jnp.where(is_target, logits, 0.0).sum(-1)), None

    zeros = jnp.zeros(targets.shape, jnp.float32)
    start = zeros - jnp.inf, zeros, zeros
    (largest, total, chosen), _ = jax.lax.scan(body, start, _head_blocks(head, size))
    new = jax.lax.pmax(largest, "tensor")
    total = jax.lax.psum(total * jnp.exp(largest - new), "tensor")
    log_z = new + jnp.log(total)
    return log_z - jax.lax.psum(chosen, "tensor"), log_z

  return on_devices(local, (_HIDDEN, _HEAD, _TOKENS), (_TOKENS, _TOKENS))(hidden, head, targets)


def _blocked_losses_forward(hidden, head, targets, size):
  nll, log_z = _blocked_losses(hidden, head, targets, size)
  return (nll, log_z), (hidden, head, targets, log_z)


def _blocked_losses_backward(size, saved, cotangents):
  def local(hidden, head, targets, log_z, d_nll, d_log_z):
    def body(d_hidden, scanned):
      block, logits, is_target = _block_logits(hidden, *scanned, targets)
      d_logits = (d_nll + d_log_z)[..., None] * jnp.exp(logits - log_z[..., None])
      d_logits -= jnp.where(is_target, d_nll[..., None], 0.0)
      d_logits = d_logits.astype(hidden.dtype)
      d_hidden += jnp.einsum("btw,dw->btd", d_logits, block, preferred_element_type=jnp.float32)
      return d_hidden, scatter(jnp.einsum("btd,btw->dw", hidden, d_logits), "embed", "vocab")

    zeros = jnp.zeros(hidden.shape, jnp.float32)
    d_hidden, d_blocks = jax.lax.scan(body, zeros, _head_blocks(head, size))
    d_head = d_blocks.transpose(1, 0, 2).reshape(head.shape).astype(head.dtype)
    return jax.lax.psum(d_hidden, "tensor").astype(hidden.dtype), d_head

  in_names = (_HIDDEN, _HEAD, _TOKENS, _TOKENS, _TOKENS, _TOKENS)
  d_hidden, d_head = on_devices(local, in_names, (_HIDDEN, _HEAD))(*saved, *cotangents)
  return d_hidden, d_head, None


_blocked_losses.defvjp(_blocked_losses_forward, _blocked_losses_backward)


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
    distance: "squared_l2" sums over dimensions, "mse" averages.
  """
  table = shard(jax.lax.stop_gradient(table), None, None)
  wanted = table[jnp.where(mask, codes, 0)]
  kernel, bias = (projection[k][...].astype(jnp.float32) for k in ("kernel", "bias"))
  error = (hidden.astype(jnp.float32) @ kernel + bias - wanted) ** 2
  error = error.sum(-1) if distance == "squared_l2" else error.mean(-1)
  return jnp.sum(jnp.where(mask, error, 0.0)), jnp.sum(mask.astype(jnp.float32))


def ratio(total: Array, count: Array) -> Array:
  """Returns total / count, and 0 where nothing was counted."""
  return jnp.where(count > 0, total / jnp.maximum(count, 1e-9), 0.0)
