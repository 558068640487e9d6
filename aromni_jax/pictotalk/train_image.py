"""What the image codec is trained with: errors of pixels, and codes that a language model can use.

Codes that only reconstruct are hard to read: they mix what is seen with the colour behind it. So a
reader must also name the object of every covered cell, and twins (`image_scenes`) exchange the
vectors of what covers them before they are drawn.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from aromni_jax.codecs import batching, image_vq, training
from aromni_jax.pictotalk.twin_scenes import TwinScenes

Array = jax.Array

_EDGE_WEIGHT = 0.5  # of the L1 error of horizontal and vertical differences
_TWIN_WEIGHT = 0.2
_READER_WEIGHT = 0.3
_READER_SCALE = 10.0  # of the vectors that it sees, so that it learns as fast as the encoder


class ReadableImageVQ(image_vq.ImageVQ):
  """The codec in training: with a linear reader, which is no part of the codec."""

  def __init__(self, config: image_vq.ImageVQConfig, num_objects: int, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    zeros = nnx.initializers.zeros_init()
    self.reader = nnx.Linear(config.embed_dim, num_objects, kernel_init=zeros, rngs=rngs)


def reconstruction_losses(output: Array, target: Array) -> training.Metrics:
  """Returns the mean errors of pictures float32[B, H, W, 3]: l1, l2 and edges; "loss" sums them."""
  difference = output - target
  edges = sum(jnp.mean(jnp.abs(jnp.diff(difference, axis=axis))) for axis in (1, 2))
  l1, l2 = jnp.mean(jnp.abs(difference)), jnp.mean(difference**2)
  return {"l1": l1, "l2": l2, "edges": edges, "loss": l1 + l2 + _EDGE_WEIGHT * edges}


def twin_loss(z: Array, covered: Array) -> Array:
  """Returns how far twins are apart where glyphs cover them, as a share of the latents' variance.

  Args:
    z: float32[2 n, h, w, d] or [2 n, h * w, d]; the second half are the twins of the first.
    covered: bool[n, h * w].
  """
  one, other = jnp.split(z.reshape(z.shape[0], -1, z.shape[-1]), 2)
  distance = jnp.sum((one - other) ** 2, axis=-1)
  scale = jnp.sum(jnp.var(z.reshape(-1, z.shape[-1]), axis=0))
  return jnp.sum(jnp.where(covered, distance, 0.0)) / (scale * jnp.maximum(jnp.sum(covered), 1))


def without_reader(codec: ReadableImageVQ) -> image_vq.ImageVQ:
  """Returns the codec itself, with the same parameters."""
  return image_vq.from_params(
    codec.config, {k: v for k, v in image_vq.to_params(codec).items() if k != "reader"}
  )


def reader_loss(logits: Array, objects: Array, covered: Array) -> tuple[Array, Array]:
  """Returns the mean cross-entropy over covered cells, and the share of them that are read right.

  Args:
    logits: float32[2 n, h * w, objects], of scenes and their twins.
    objects: int32[n]. covered: bool[n, h * w].
  """
  labels = jnp.broadcast_to(jnp.tile(objects, 2)[:, None], logits.shape[:2])
  errors = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  weights = jnp.tile(covered, (2, 1)) / jnp.maximum(2 * jnp.sum(covered), 1)
  return jnp.sum(weights * errors), jnp.sum(weights * (jnp.argmax(logits, -1) == labels))


def regularise(codec: ReadableImageVQ, z: Array, batch: dict[str, Array]) -> training.Metrics:
  """Returns the errors of twins and reader, and "regular", their weighted sum.

  Args:
    codec: whose reader is asked.
    z: float32[2 n, h, w, d], vectors of a batch of `TwinScenes`.
    batch: the batch.
  """
  vectors = z.reshape(len(z), -1, z.shape[-1])
  vectors *= _READER_SCALE * jax.lax.rsqrt(jnp.mean(vectors**2, -1, keepdims=True) + 1e-6)
  twins = twin_loss(z, batch["covered"])
  reader, right = reader_loss(codec.reader(vectors), batch["object"], batch["covered"])
  total = _TWIN_WEIGHT * twins + _READER_WEIGHT * reader
  return {"twins": twins, "reader": reader, "read": right, "regular": total}


def exchange(z: Array, batch: dict[str, Array]) -> Array:
  """Returns the vectors float32[2 n, h, w, d] of twins, which swapped those of covered cells.

  What is drawn on one colour then cannot depend on vectors that know the other.
  """
  one, other = jnp.split(z, 2)
  covered = batch["covered"].reshape(*one.shape[:3], 1)
  return jnp.concatenate([jnp.where(covered, other, one), jnp.where(covered, one, other)])


def reconstruct(codec: image_vq.ImageVQ, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns codes int32[n, h*w] of pictures uint8[n, H, W, 3], and what they decode to."""
  codes = batching.encode_images(codec, pictures)
  return codes, batching.decode_images(codec, codes)


def make_task(
  model: image_vq.ImageVQConfig, source: TwinScenes, held_out: np.ndarray
) -> training.CodecTask:
  """Returns what the training loop needs.

  Args:
    model: shape of the codec.
    source: pictures of every step.
    held_out: pictures for the progress lines, uint8[n, H, W, 3].
  """

  def measure(codec):
    codes, pictures = reconstruct(codec, held_out)
    return {"psnr": image_vq.psnr(pictures, held_out), "used": len(np.unique(codes))}

  return training.CodecTask(
    make=lambda rngs: ReadableImageVQ(model, len(source.objects), rngs=rngs),
    codebook=lambda codec: codec.quantize.embedding,
    prepare=lambda batch: batch["pictures"].astype(jnp.float32) / 127.5 - 1.0,
    regularise=regularise,
    exchange=exchange,
    losses=reconstruction_losses,
    batch_at=source,
    measure=measure,
  )
