"""The one thing that leaves the data pipeline and enters the training step."""

import dataclasses

import jax

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """A batch of packed rows; every field is [B, T] (NumPy on the host, JAX in the step).

  Attributes:
    tokens: int32 input ids; padding is the vocabulary's eos id, told apart by segment 0.
    targets: int32 next ids. The only shifted thing in the project: `targets[t] == tokens[t + 1]`
      inside a segment, but for codes that `data.code_noise` changed in tokens.
    loss_weights: float32, 0 at the last position of a segment and on padding.
    positions: int32, 0, 1, ... inside each segment.
    segment_ids: int32, 1, 2, ... for the samples of a row; 0 = padding.
    task_ids: int32, `Task.id` of the sample at each position.
  """

  tokens: Array
  targets: Array
  loss_weights: Array
  positions: Array
  segment_ids: Array
  task_ids: Array
