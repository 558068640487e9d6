"""What we rely on in the private names of `compat`: a new JAX, Orbax or TFDS breaks here first."""

import asyncio
import hashlib
import inspect
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorflow_datasets as tfds
import tensorstore as ts

from aromni_jax import compat
from aromni_jax.data import token_shards
from aromni_jax.sample import Sample
from aromni_jax.vocabulary import get_vocabulary

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("aromni_jax", "configs", "data_pipelines", "launch")
PRIVATE = re.compile(
  r"\b_src\b|unittest\.mock|from unittest import mock|tensorflow_datasets\.proto|"
  r"fused_attention_stablehlo|_open_and_write|dot_product_attention_fwd"
)


def test_private_names_stand_in_compat_alone():
  files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
  assert len(files) > 100
  found = {path.relative_to(ROOT) for path in files if PRIVATE.search(path.read_text())}
  assert found == {pathlib.Path("aromni_jax/compat.py")}


def test_names_are_imported_when_they_are_needed():
  code = "import sys, aromni_jax.compat; print(*sys.modules)"
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert not {"jax", "orbax", "tensorflow_datasets"} & {*out.stdout.split()}


def test_every_name_has_its_test():
  names = [name for name, value in vars(compat).items() if inspect.isfunction(value)]
  own = pathlib.Path(__file__).read_text()
  assert len(names) == 4 and all(f"compat.{name}(" in own for name in names)


def traced():
  q = jax.ShapeDtypeStruct((2, 256, 4, 128), jnp.bfloat16)
  offsets, sizes = (jax.ShapeDtypeStruct((2, n), jnp.int32) for n in (4, 3))

  def total(q, k, v, offsets, sizes):
    out = compat.cudnn_attention(q, k, v, offsets, sizes)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    return out.astype(jnp.float32).sum()

  return jax.jit(jax.grad(total)).trace(q, q, q, offsets, sizes)


@pytest.fixture
def cudnn(monkeypatch):
  """cuDNN's version and a card's generation, which JAX asks the machine for: an H100's."""
  from jax._src.cudnn import fused_attention_stablehlo

  for name, answer in (
    ("check_cudnn_version", 91500),
    ("check_compute_capability", True),
    ("is_cuda_compute_capability_equal", False),
  ):
    monkeypatch.setattr(fused_attention_stablehlo, name, lambda *_, answer=answer: answer)


def test_cudnn_attention(cudnn):
  """It takes our segments, causally, scaled, and skips from one to the next."""
  text = traced().lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("custom_call @__cudnn$fmha") == 2
  assert text.count("max_seg_per_batch\\22: 3") == 2
  assert text.count("PADDING_CAUSAL") == 2
  assert text.count("scale\\22: 0.0883883") == 2  # 128 ** -0.5


def test_cudnn_forward_is_the_name_that_remat_policies_see(cudnn):
  names = set()

  def policy(primitive, *_, **__):
    names.add(primitive.name)
    return False

  def attend(q, offsets, sizes):
    return compat.cudnn_attention(q, q, q, offsets, sizes).astype(jnp.float32).sum()

  q = jax.ShapeDtypeStruct((2, 256, 4, 128), jnp.bfloat16)
  offsets, sizes = (jax.ShapeDtypeStruct((2, n), jnp.int32) for n in (4, 3))
  jax.eval_shape(jax.grad(jax.checkpoint(attend, policy=policy)), q, offsets, sizes)
  assert compat.CUDNN_FORWARD in names


def test_coordination_of_one_process():
  state = compat.coordination()
  assert (state.client, state.process_id, state.num_processes) == (None, 0, 1)


# What `cluster` does with the client, in a process of its own: a run that is joined stays joined.
_CLIENT = """
import sys
import jax
from aromni_jax import compat

jax.distributed.initialize(sys.argv[1], num_processes=1, process_id=0)
state = compat.coordination()
assert (state.process_id, state.num_processes) == (0, 1)
state.client.key_value_set("folder/0", "one")
state.client.key_value_set("folder/0", "two", allow_overwrite=True)
assert state.client.key_value_dir_get("folder/") == [("folder/0", "two")]
state.client.wait_at_barrier("folder/", 10_000)
try:
  state.client.key_value_set("folder/0", "three")
except jax.errors.JaxRuntimeError as e:
  assert "ALREADY_EXISTS" in str(e), e
jax.distributed.shutdown()
"""


def test_coordination_of_a_run():
  with socket.socket() as s:
    s.bind(("localhost", 0))
    address = f"localhost:{s.getsockname()[1]}"
  subprocess.run([sys.executable, "-c", _CLIENT, address], check=True, timeout=120, cwd=ROOT)


class Thing:
  """What Orbax takes for an array."""

  shape, dtype, size, nbytes = (3, 2), np.dtype("float32"), 6, 24


def test_array_handler(tmp_path):
  """It is asked to write what the registry gives it, as a TensorStore that Orbax can read."""
  seen = []

  async def write(value, tspec, ts_context):
    seen.append(value)
    await asyncio.sleep(0)
    array = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
    await array.write(np.arange(6, dtype=np.float32).reshape(3, 2))

  registry = ocp.type_handlers.create_type_handler_registry((Thing, compat.array_handler(write)))
  thing = Thing()
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as saver:
    saver.save(tmp_path / "out", {"a": {"b": thing}}, save_args={"a": {"b": ocp.SaveArgs()}})
  assert seen == [thing]
  with ocp.PyTreeCheckpointer() as reader:
    restored = reader.restore(tmp_path / "out")
  np.testing.assert_array_equal(restored["a"]["b"], np.arange(6).reshape(3, 2))


def records(folder):
  """The raw records of the only split of token shards, in their order."""
  from array_record.python.array_record_module import ArrayRecordReader

  (file,) = folder.rglob("*.array_record-*")
  reader = ArrayRecordReader(str(file))
  return reader.read_all()


# sha256 over the records of 20 samples, as they were written before `compat` was there.
RECORDS = "f9ad64ed9009c74b0afb362d2e9040b9ed00e02beff28a1db62701b48f53caf2"


def test_deterministic_writer(tmp_path):
  """Records are the same bytes in every process and for ever: checksums of data sets hold."""
  assert issubclass(type(compat.deterministic_writer("array_record")), tfds.core.ExampleWriter)

  def samples():
    for i in range(20):
      spans = np.array([[1, 3], [4, 5 + i]], np.int32) if i % 2 else None
      task = "text_to_image" if i % 3 else "text_to_speech"
      yield Sample(np.arange(5 + i, dtype=np.int32), task, 2, f"item{i}", spans)

  token_shards.write(tmp_path / "a", {"train": samples()}, get_vocabulary("demo"), {})
  got = records(tmp_path / "a")
  assert len(got) == 20
  assert hashlib.sha256(b"".join(got)).hexdigest() == RECORDS
