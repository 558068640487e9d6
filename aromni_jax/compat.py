"""The private names of JAX, Orbax and TFDS that this project needs, each with the reason.

Nothing else in the package reaches behind another project's public names. `tests/test_compat.py`
searches for it, and asks of each name here what we rely on, so that a new version says at once
what it broke. Imports stand inside the functions: a command that does not need a name pays nothing
for it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  import jax
  import orbax.checkpoint as ocp
  import tensorflow_datasets as tfds

# Name of the primitive of cuDNN's forward pass. Remat policies see primitives, and this one's
# results have no `checkpoint_name`.
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"


def cudnn_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, offsets: jax.Array, sizes: jax.Array
) -> jax.Array:
  """cuDNN's causal attention over the segments of packed rows.

  `jax.nn.dot_product_attention` reaches the same kernel, but has no argument for offsets: it would
  compute the scores of other segments, too, and mask them.

  Args:
    q, k, v: [B, T, N, H] in bfloat16.
    offsets: int32[B, M + 1], first positions of a row's segments, -1 after the last.
    sizes: int32[B, M], their lengths, -1 after the last.

  Returns:
    [B, T, N, H].
  """
  from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

  return dot_product_attention(
    q,
    k,
    v,
    q_seqlen=sizes,
    kv_seqlen=sizes,
    q_offsets=offsets,
    kv_offsets=offsets,
    scale=q.shape[-1] ** -0.5,
    mask_type=MaskType.PADDING_CAUSAL,
  )


def coordination() -> Any:
  """JAX's side of the coordination service: `client`, `process_id`, `num_processes`.

  `jax.process_index` and `jax.process_count` start the devices, and processes must talk before
  that. There is no public name for the client's key-value store; Orbax uses it in the same way.
  `client` is None in a run of one process, which has `process_id` 0 and `num_processes` 1.
  """
  from jax._src import distributed

  return distributed.global_state


def array_handler(
  write: Callable[[Any, dict, Any], Awaitable[None]],
) -> ocp.type_handlers.NumpyHandler:
  """Orbax's handler of NumPy arrays with another way to write one.

  `NumpyHandler` is public, but what writes one array is not: a public handler would have to make
  metadata, paths and TensorStore specs anew.

  Args:
    write: of (value, TensorStore spec, TensorStore context); value is what the tree holds, with
      `shape` and `dtype`.
  """
  import orbax.checkpoint as ocp

  class Handler(ocp.type_handlers.NumpyHandler):
    async def _open_and_write(self, value, tspec, ts_context):
      await write(value, tspec, ts_context)

  return Handler(deepcopy_host_arrays=False)


def deterministic_writer(file_format: Any) -> tfds.core.ExampleWriter:
  """A writer of TFDS records whose bytes depend on their values alone.

  TFDS leaves the order of a record's fields to protobuf, which changes it from process to process.
  The writer is a public class and made to be replaced; the message of its records has no public
  name.

  Args:
    file_format: as TFDS names it, e.g. "array_record".
  """
  import tensorflow_datasets as tfds
  from tensorflow_datasets.proto import tf_example_pb2

  def ordered(record: bytes) -> bytes:
    return tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)

  class Writer(tfds.core.ExampleWriter):
    def write(self, path, examples):
      return super().write(path, ((key, ordered(record)) for key, record in examples))

  return Writer(file_format=file_format)
