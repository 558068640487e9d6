"""The terms of the loss. A new one is an entry here, a field of `LossConfig` and, if it is more
than a line, a function in `losses.py`.

Next-token prediction with token weights and perceptual alignment are those of AR-Omni (arXiv
2601.17761, sections on weighted NTP and perceptual alignment). Paper and released code differ;
every difference is a field of `LossConfig`, and `recipes.py` has both sides.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from aromni_jax.data.batch import Batch
from aromni_jax.models import sharding
from aromni_jax.models.config import DecoderConfig
from aromni_jax.tasks import get_task
from aromni_jax.training import losses
from aromni_jax.vocabulary import Vocabulary

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Which losses, and in which variant.

  Attributes:
    perceptual_weight: lambda of the perceptual loss; 0 leaves it out, and needs no image codec.
    perceptual_pairing: "predicting" pairs the state that predicts a code with that code (paper);
      "own_position" the state at the code's own position (released code).
    perceptual_distance: "squared_l2" sums over dimensions (paper), "mse" averages (released).
    perceptual_tasks: tasks whose pictures count; empty means all.
    train_projection: whether the projection is trained (paper) or stays random (released).
    normaliser: "tokens" divides by the number of targets (paper), "weights" by the sum of their
      weights (released).
    z_loss_weight: weight of log(Z)^2; 0 leaves it out.
    vocab_block: ids whose logits exist at once; 0 means all.
  """

  perceptual_weight: float = 0.1
  perceptual_pairing: str = "predicting"
  perceptual_distance: str = "squared_l2"
  perceptual_tasks: tuple[str, ...] = ()
  train_projection: bool = True
  normaliser: str = "tokens"
  z_loss_weight: float = 0.0
  vocab_block: int = 0

  def __post_init__(self):
    object.__setattr__(self, "perceptual_tasks", tuple(self.perceptual_tasks))
    for task in self.perceptual_tasks:
      get_task(task)
    for field, choices in {
      "perceptual_pairing": ("predicting", "own_position"),
      "perceptual_distance": ("squared_l2", "mse"),
      "normaliser": ("tokens", "weights"),
    }.items():
      if getattr(self, field) not in choices:
        raise ValueError(f"loss.{field} {getattr(self, field)!r}; expected one of {choices}")


@dataclasses.dataclass(frozen=True)
class Forward:
  """A forward pass over a (micro-)batch, as the terms see it.

  Attributes:
    params: all groups of parameters, the terms' own among them.
    batch: [B, T].
    hidden: [B, T, D], final hidden states.
    nll, log_z: float32[B, T], negative log likelihood of the targets and log of the normaliser.
    table: float32[codes, E], image embeddings of the perceptual loss, or None without it.
    vocabulary, loss: as configured.
  """

  params: dict[str, Any]
  batch: Batch
  hidden: Array
  nll: Array
  log_z: Array
  table: Array | None
  vocabulary: Vocabulary
  loss: LossConfig


@dataclasses.dataclass(frozen=True)
class Term:
  """One term: its share of the loss is weight * (sum over the batch) / (count of the batch).

  Attributes:
    name: of it, in metrics "loss/<name>".
    weight: configuration -> its weight; 0 leaves the term out.
    total: the sum over a (micro-)batch, float32[].
    count: (batch, vocabulary, configuration) -> what the sum of the whole batch is divided by,
      float32[]; so micro-batches with unequal numbers of targets add up to one big batch.
    group: name of its own parameters among the groups of a state, if it has any.
    init: (shape of the decoder, width of the table E, key) -> these parameters.
    trained: configuration -> whether they are trained.
  """

  name: str
  weight: Callable[[LossConfig], float]
  total: Callable[[Forward], Array]
  count: Callable[[Batch, Vocabulary, LossConfig], Array]
  group: str = ""
  init: Callable[[DecoderConfig, int, Array], dict] | None = None
  trained: Callable[[LossConfig], bool] = lambda loss: True


def count_targets(batch: Batch, vocabulary: Vocabulary, loss: LossConfig) -> Array:
  """Returns the number of targets of a batch, or the sum of their weights, by `normaliser`."""
  weights = batch.loss_weights  # [B, T]
  return jnp.sum(weights if loss.normaliser == "weights" else weights > 0, dtype=jnp.float32)


def image_targets(batch: Batch, vocabulary: Vocabulary, loss: LossConfig) -> tuple[Array, Array]:
  """Returns the image codes int32[B, T] paired with each state, and bool[B, T] where they are.

  Only codes that the next-token loss counts as targets are: with a prompt weight of 0, pictures of
  prompts are left out, as in the released fine-tuning.
  """
  counted = batch.loss_weights > 0  # the targets; the weight of a token stands one position before
  if loss.perceptual_pairing == "predicting":
    ids = batch.targets
  else:
    ids, counted = batch.tokens, jnp.pad(counted[:, :-1], ((0, 0), (1, 0)))
  mask = counted & (ids >= vocabulary.image.start) & (ids < vocabulary.image.stop)
  if loss.perceptual_tasks:
    allowed = jnp.array([get_task(task).id for task in loss.perceptual_tasks])
    mask &= jnp.isin(batch.task_ids, allowed)
  return ids - vocabulary.image.start, mask


def _perceptual_total(forward: Forward) -> Array:
  codes, mask = image_targets(forward.batch, forward.vocabulary, forward.loss)
  projection, distance = forward.params["projection"], forward.loss.perceptual_distance
  return losses.perceptual(forward.hidden, projection, forward.table, codes, mask, distance)[0]


def _count_images(batch: Batch, vocabulary: Vocabulary, loss: LossConfig) -> Array:
  return jnp.sum(image_targets(batch, vocabulary, loss)[1], dtype=jnp.float32)


def _init_projection(model: DecoderConfig, width: int, key: Array) -> dict:
  """{"kernel": [D, E], "bias": [E]}, W_h of the paper."""
  bound = model.embed_dim**-0.5  # PyTorch's default of a linear layer, as the released code has it

  def uniform(key, shape, *names):
    init = sharding.weight(
      lambda *args: jax.random.uniform(*args, minval=-bound, maxval=bound), *names
    )
    return nnx.Param(init(key, shape))

  kernel_key, bias_key = jax.random.split(key)
  return {
    "kernel": uniform(kernel_key, (model.embed_dim, width), "embed", "projection"),
    "bias": uniform(bias_key, (width,), "projection"),
  }


TERMS = (
  Term(
    name="next_token",
    weight=lambda loss: 1.0,
    total=lambda f: jnp.sum(f.batch.loss_weights * f.nll),
    count=count_targets,
  ),
  Term(
    name="z_loss",
    weight=lambda loss: loss.z_loss_weight,
    total=lambda f: losses.z_loss(f.log_z, f.batch.loss_weights)[0],
    count=count_targets,
  ),
  Term(
    name="perceptual",
    weight=lambda loss: loss.perceptual_weight,
    total=_perceptual_total,
    count=_count_images,
    group="projection",
    init=_init_projection,
    trained=lambda loss: loss.train_projection,
  ),
)


def active(loss: LossConfig) -> tuple[Term, ...]:
  """Returns the terms that a configuration has."""
  return tuple(term for term in TERMS if term.weight(loss))
