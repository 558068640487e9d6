"""How parameters are split on every machine, and products over split kernels."""

import dataclasses
import difflib
import functools
import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aromni_jax.cluster.hardware import parse_topology
from aromni_jax.configs import base, finetune_7b, pods, pretrain_7b
from aromni_jax.models import attention as attention_lib
from aromni_jax.models import decoder as decoder_lib
from aromni_jax.models import sharding
from aromni_jax.models.config import DecoderConfig
from aromni_jax.planning.estimate import abstract_mesh
from aromni_jax.training import setup
from aromni_jax.training.config import TrainConfig, to_dataclass
from aromni_jax.vocabulary import get_vocabulary

GOLDEN = pathlib.Path(__file__).parents[1] / "fixtures/shardings"
MODULES = {"pretrain_7b": pretrain_7b, "finetune_7b": finetune_7b}
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)]


def shardings_of(name, topology):
  """Path -> shape and sharding of every parameter and of the optimiser's state."""
  config = to_dataclass(TrainConfig, MODULES[name].get_config(topology).to_dict())
  mesh = abstract_mesh(config, parse_topology(topology))
  state = setup.abstract_state(config, (8192, 256), mesh)
  return {
    jax.tree_util.keystr(path).removesuffix(".value"): (leaf, leaf.sharding)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }


def golden(name, topology):
  """Of the golden file: its path, and what it should hold."""
  rows = {
    path: {"shape": list(leaf.shape), "spec": list(one.spec)}
    for path, (leaf, one) in shardings_of(name, topology).items()
  }
  lines = ",\n".join(f"  {json.dumps(path)}: {json.dumps(row)}" for path, row in rows.items())
  return GOLDEN / f"{name}-{topology.replace(':', '-')}.json", f"{{\n{lines}\n}}\n"


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("topology", pods.PODS)
def test_parameters_are_split_as_the_golden_file_says(name, topology):
  path, text = golden(name, topology)
  if os.environ.get("UPDATE_GOLDEN"):
    path.write_text(text)
  before = path.read_text().splitlines() if path.exists() else []
  difference = difflib.unified_diff(before, text.splitlines(), str(path), "now", lineterm="", n=0)
  assert text.splitlines() == before, "\n".join(
    [*difference, "if that is right: UPDATE_GOLDEN=1 python -m pytest tests/test_sharding.py"]
  )


def test_no_golden_file_is_left_over():
  assert set(GOLDEN.iterdir()) == {golden(name, pod)[0] for name in MODULES for pod in pods.PODS}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("topology", pods.PODS)
def test_every_large_tensor_is_split(name, topology):
  large = 0
  for path, (leaf, one) in shardings_of(name, topology).items():
    size = math.prod(leaf.shape) * leaf.dtype.itemsize
    if size > 10**6:
      large += 1
      inner = one.mesh.shape["fsdp"] * one.mesh.shape["tensor"]
      part = math.prod(one.shard_shape(leaf.shape)) * leaf.dtype.itemsize
      # The projection of the perceptual loss, 4 MB, has nothing to be split over tensor.
      inner = one.mesh.shape["fsdp"] if "projection" in path else inner
      assert part * inner == size, (path, one.spec)
  assert large == 3 * (2 + 7 + 1)  # embedding and head, kernels, projection; of Adam the same


class Recording(dict):
  """Rules that remember which of them were asked for."""

  def __init__(self, rules):
    super().__init__(rules)
    self.read = set()

  def __getitem__(self, name):
    self.read.add(name)
    return super().__getitem__(name)


@pytest.fixture
def recorded(monkeypatch):
  rules = Recording(sharding.RULES)
  monkeypatch.setattr(sharding, "RULES", rules)
  monkeypatch.setattr(decoder_lib, "RULES", rules)
  return rules


def trace_step(mesh, attention):
  """Traces a tiny training step on a mesh, as the training loop makes it."""
  vocabulary = get_vocabulary("demo")
  model = DecoderConfig(
    vocab_size=vocabulary.size,
    embed_dim=32,
    mlp_dim=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=128,
    attention=attention,
  )
  run = to_dataclass(TrainConfig, base.get_config().to_dict())
  run = dataclasses.replace(
    run,
    model=model,
    loss=dataclasses.replace(run.loss, vocab_block=368),
    data=dataclasses.replace(run.data, sequence_length=128),
    batch_size=16,
    accumulate=2,
  )
  mesh = sharding.make_mesh(*mesh)
  built = setup.build(run, vocabulary, (1024, 8), mesh)
  rate = jax.ShapeDtypeStruct((), jnp.float32)
  with jax.set_mesh(mesh):
    built.step.__wrapped__.trace(built.state, built.batch, built.table, rate)


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 8, 1)])
@pytest.mark.parametrize("attention, platform", [("xla", "cpu"), ("splash", "tpu")])
def test_no_rule_is_dead(recorded, monkeypatch, mesh, attention, platform):
  """Every machine's step asks for every rule, with and without tensor parallelism."""
  monkeypatch.setattr(attention_lib, "platform_of_mesh", lambda: platform)
  trace_step(mesh, attention)
  assert set(recorded) - recorded.read == set()


def test_rules_name_axes_of_the_mesh():
  for name in sharding.RULES:
    assert set(sharding._axes(name)) <= set(sharding.MESH_AXES)
  with pytest.raises(KeyError, match="lenght"):
    sharding.spec("lenght")


# Names of the kernels of the decoder.
NAMES = [
  ("embed", "heads"),
  ("embed", "kv_heads"),
  ("embed", "mlp"),
  ("heads", "embed"),
  ("mlp", "embed"),
]


def test_these_are_the_decoders_products():
  model = DecoderConfig(vocab_size=64, num_layers=1)
  decoder = nnx.eval_shape(lambda: decoder_lib.Decoder(model, rngs=nnx.Rngs(0)))
  found = {m.names for _, m in nnx.iter_graph(decoder) if isinstance(m, decoder_lib.Linear)}
  assert found == set(NAMES)


def operands(dtype=jnp.float32):
  x, kernel, dy = (
    jax.random.normal(jax.random.key(i), shape)
    for i, shape in enumerate(((8, 4, 16), (16, 24), (8, 4, 24)))
  )
  return x.astype(dtype), kernel, dy.astype(dtype)


@functools.partial(jax.jit, static_argnums=3)
def product_and_gradients(x, kernel, dy, names):
  y, pull = jax.vjp(lambda x, kernel: sharding.product(x, kernel, names), x, kernel)
  return y, pull(dy)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("names", NAMES)
def test_products_over_split_kernels_equal_whole_ones(names, mesh):
  x, kernel, dy = operands()
  want = x @ kernel, (dy @ kernel.T, jnp.einsum("bti,bto->io", x, dy))
  mesh = sharding.make_mesh(*mesh)
  with jax.set_mesh(mesh):
    placed = jax.device_put(kernel, jax.NamedSharding(mesh, sharding.spec(*names)))
    got = product_and_gradients(x, placed, dy, names)
    assert got[1][1].sharding.is_equivalent_to(placed.sharding, 2)  # the gradient is split alike
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_products_have_the_dtype_of_their_input():
  """And kernels keep theirs, whose gradient comes in it."""
  x, kernel, dy = operands(jnp.bfloat16)
  want = product_and_gradients(x, kernel, dy, ("embed", "mlp"))
  with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
    got = product_and_gradients(x, kernel, dy, ("embed", "mlp"))
  for y, (dx, d_kernel) in (want, got):
    assert (y.dtype, dx.dtype, d_kernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=0.02, atol=0.1)


@pytest.mark.parametrize("names", [("embed", "mlp"), ("vocab", "embed"), ("head_dim", "norm")])
def test_gather_and_scatter_undo_what_fsdp_splits(names):
  """A gathered weight is whole but for tensor; a scattered gradient is the sum over the batch."""
  weight = jnp.arange(8 * 12, dtype=jnp.float32).reshape(8, 12)
  with jax.set_mesh(sharding.make_mesh(2, 2, 2)):

    def local(part):
      whole = sharding.gather(part, *names)
      return sharding.scatter(whole, *names)

    summed = sharding.on_devices(local, (names,), names)(weight)
  devices = 4 if any("fsdp" in sharding._axes(n) for n in names) else 2  # that share a batch
  np.testing.assert_array_equal(summed, devices * weight)


@dataclasses.dataclass(frozen=True)
class Device:
  id: int
  process_index: int


class Rows:
  """Stands for the sharding of a batch whose 8 devices belong to several processes.

  Args:
    sizes: of the mesh.
    processes: of each device, in the mesh's order.
  """

  def __init__(self, sizes, processes):
    self.mesh = sharding.make_mesh(*sizes)
    self.num_devices = len(processes)
    self.processes = processes

  def devices_indices_map(self, shape):
    indices = sharding.batch_sharding(self.mesh).devices_indices_map(shape)
    devices = self.mesh.devices.reshape(-1)
    return {
      Device(device.id, process): indices[device]
      for process, device in zip(self.processes, devices, strict=True)
    }


def readers(monkeypatch, sizes, processes):
  """What `reader_of` gives each process."""
  out = []
  for process in range(max(processes) + 1):
    monkeypatch.setattr(jax, "process_index", lambda process=process: process)
    out.append(sharding.reader_of(Rows(sizes, processes)))
  return out


@pytest.mark.parametrize(
  "sizes, processes, want",
  [
    ((1, 8, 1), [0] * 8, [(0, 1)]),
    ((1, 8, 1), [0, 0, 1, 1, 2, 2, 3, 3], [(0, 4), (1, 4), (2, 4), (3, 4)]),
    ((1, 8, 1), [1, 1, 0, 0, 3, 3, 2, 2], [(1, 4), (0, 4), (3, 4), (2, 4)]),  # by their rows
    ((2, 4, 1), [0, 0, 1, 1, 0, 0, 1, 1], [(0, 2), (1, 2)]),  # two pieces each
    ((1, 2, 4), [0, 0, 1, 1, 2, 2, 3, 3], [(0, 2), (0, 2), (1, 2), (1, 2)]),  # pairs share rows
    ((1, 1, 8), [0, 0, 0, 0, 1, 1, 1, 1], [(0, 1), (0, 1)]),  # all share all rows
    ((2, 2, 2), [0, 0, 0, 0, 1, 1, 1, 1], [(0, 2), (1, 2)]),
  ],
)
def test_processes_read_their_devices_rows(monkeypatch, sizes, processes, want):
  assert readers(monkeypatch, sizes, processes) == want


@pytest.mark.parametrize(
  "sizes, processes",
  [
    ((1, 4, 2), [0, 0, 0, 1, 1, 1, 2, 2]),  # tensor 2 over processes of 3 devices
    ((1, 8, 1), [0, 0, 0, 1, 1, 1, 2, 2]),  # nothing overlaps, but 2 of 8 rows are not a third
    ((1, 8, 1), [0, 0, 1, 2, 2, 2, 3, 3]),
    ((1, 4, 2), [0, 1, 1, 2, 2, 3, 3, 0]),
  ],
)
def test_processes_that_share_some_rows_are_refused(monkeypatch, sizes, processes):
  with pytest.raises(ValueError, match="parts of a batch that overlap: config.mesh.tensor must"):
    readers(monkeypatch, sizes, processes)


@pytest.mark.parametrize("sizes", MESHES)
def test_one_process_reads_everything(sizes):
  assert sharding.reader_of(sharding.batch_sharding(sharding.make_mesh(*sizes))) == (0, 1)


def test_the_platform_is_that_of_the_mesh(monkeypatch):
  assert sharding.platform_of_mesh() == "cpu"
  with jax.set_mesh(sharding.make_mesh()):
    assert sharding.platform_of_mesh() == "cpu"
  tpu = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
  mesh = jax.sharding.AbstractMesh((1, 8, 1), sharding.MESH_AXES, abstract_device=tpu)
  with jax.sharding.use_abstract_mesh(mesh):
    assert sharding.platform_of_mesh() == "tpu"
    jax.jit(lambda x: x * (sharding.platform_of_mesh() == "tpu")).trace(1.0)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert sharding.platform_of_mesh() == "gpu"


def test_on_devices_without_a_mesh_has_one_device():
  whole = sharding.on_devices(lambda x: sharding.gather(x, "embed"), (("embed",),), ("norm",))
  np.testing.assert_array_equal(whole(jnp.arange(6.0)), np.arange(6.0))


@pytest.mark.parametrize(
  "devices, sizes, want",
  [
    (8, {}, (1, 8, 1)),
    (8, {"data": 2, "tensor": 2}, (2, 2, 2)),
    (8, {"data": -1, "fsdp": 1}, (8, 1, 1)),
    (512, {"data": 2}, (2, 256, 1)),
    (1, {}, (1, 1, 1)),
  ],
)
def test_mesh_sizes(devices, sizes, want):
  assert sharding.mesh_sizes(devices, **sizes) == want


@pytest.mark.parametrize(
  "sizes", [(3, -1, 1), (-1, -1, 1), (0, -1, 1), (2, 2, 1), (16, 1, 1), (-2, -4, 1)]
)
def test_meshes_that_do_not_cover_the_devices_are_refused(sizes):
  with pytest.raises(ValueError, match="does not cover 8 devices"):
    sharding.mesh_sizes(8, *sizes)
