"""Vector quantisation shared by the image and the speech codec: pure functions on arrays.

A codebook is `float32[K, d]`: K codes of d dimensions. Codes are int32 row numbers. Training moves
the codebook towards the vectors that choose it (exponential moving averages, van den Oord et al.
2017, appendix A) and restarts codes that no vector chooses.
"""

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array


def nearest_codes(z: Array, codebook: Array) -> Array:
  """Returns int32[...] with the nearest code of every vector.

  The distance is `|z|^2 + |e|^2 - 2 z.e` in float32 at the highest matmul precision (reduced
  precision changes codes); of equally near codes the first is taken.

  Args:
    z: float[..., d] vectors.
    codebook: float[K, d].

  Raises:
    ValueError: if the last dimensions differ.
  """
  if z.shape[-1] != codebook.shape[-1]:
    raise ValueError(
      f"z has {z.shape[-1]} dimensions and the codebook {codebook.shape[-1]}; they must be equal."
    )
  return jnp.argmin(squared_distances(z, codebook), axis=-1).astype(jnp.int32)


def squared_distances(z: Array, codebook: Array) -> Array:
  """Returns float32[..., K], the squared Euclidean distance of every vector to every code."""
  z = z.astype(jnp.float32)
  codebook = codebook.astype(jnp.float32)
  dot = jnp.einsum("...d,kd->...k", z, codebook, precision=jax.lax.Precision.HIGHEST)
  return jnp.sum(z**2, -1, keepdims=True) + jnp.sum(codebook**2, -1) - 2.0 * dot


def straight_through(z: Array, quantised: Array) -> Array:
  """Returns the value of `quantised` with the gradient of `z`."""
  return z + jax.lax.stop_gradient(quantised - z)


def commitment_loss(z: Array, quantised: Array) -> Array:
  """Returns the mean squared distance that pulls `z` towards its (fixed) code."""
  return jnp.mean((z - jax.lax.stop_gradient(quantised)) ** 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EmaCodebook:
  """Running averages behind a codebook that is trained without gradients.

  Attributes:
    embedding: float32[K, d], the codebook itself.
    cluster_size: float32[K], average number of vectors per update that choose the code.
    embedding_sum: float32[K, d], average sum of those vectors.
  """

  embedding: Array
  cluster_size: Array
  embedding_sum: Array


def init_codebook(key: Array, num_codes: int, dim: int, scale: float = 1.0) -> EmaCodebook:
  """Returns a random codebook whose codes all count as unused.

  The first `update_codebook` therefore moves every code to the data: to the mean of the vectors
  that chose it, or, for the many that none chose, to a vector of the batch.
  """
  embedding = scale * jax.random.normal(key, (num_codes, dim), jnp.float32)
  return EmaCodebook(embedding, jnp.zeros(num_codes), jnp.zeros((num_codes, dim)))


def update_codebook(
  codebook: EmaCodebook,
  z: Array,
  codes: Array,
  key: Array,
  *,
  decay: float = 0.99,
  dead_below: float = 0.03,
  revived_size: float = 1.0,
  epsilon: float = 1e-5,
) -> EmaCodebook:
  """Returns the codebook after one batch: moving averages, then revival of dead codes.

  Args:
    codebook: the state before.
    z: float[..., d] encoder outputs of the batch (gradients are not used).
    codes: int32[...] their nearest codes.
    key: randomness of the revival.
    decay: share of the old averages that is kept.
    dead_below: a code whose average use per batch falls below this is replaced by a random vector
      of the batch. 0 never revives.
    revived_size: average use that a revived code starts with, so that it has time to be chosen.
    epsilon: a code whose average use is below this keeps its place (no division by nothing).
  """
  num_codes, dim = codebook.embedding.shape
  z = jax.lax.stop_gradient(z).reshape(-1, dim).astype(jnp.float32)
  codes = codes.reshape(-1)
  counts = jnp.zeros(num_codes).at[codes].add(1.0)
  sums = jnp.zeros((num_codes, dim)).at[codes].add(z)
  size = decay * codebook.cluster_size + (1 - decay) * counts
  total = decay * codebook.embedding_sum + (1 - decay) * sums

  dead = size < dead_below
  fresh = z[jax.random.choice(key, len(z), (num_codes,), replace=len(z) < num_codes)]
  size = jnp.where(dead, revived_size, size)
  total = jnp.where(dead[:, None], revived_size * fresh, total)

  mean = total / jnp.maximum(size, epsilon)[:, None]
  embedding = jnp.where((size > epsilon)[:, None], mean, codebook.embedding)
  return EmaCodebook(embedding, size, total)


def code_statistics(codes: Array, num_codes: int) -> dict[str, Array]:
  """Returns how a set of codes spreads: `used` (distinct codes) and `perplexity` (exp entropy)."""
  counts = jnp.bincount(codes.reshape(-1), length=num_codes)
  p = counts / jnp.maximum(counts.sum(), 1)
  entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.maximum(p, 1e-30)), 0.0))
  return {"used": jnp.sum(counts > 0), "perplexity": jnp.exp(entropy)}
