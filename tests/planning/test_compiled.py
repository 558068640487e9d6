"""One small training step, compiled for TPUs that are not here."""

import dataclasses
import re

import numpy as np
import pytest

from aromni_jax.cluster.hardware import parse_topology
from aromni_jax.configs import base
from aromni_jax.models import sharding
from aromni_jax.planning import compiled, estimate, hlo, report
from aromni_jax.planning.network import DCN, ICI
from aromni_jax.training.config import TrainConfig, to_dataclass
from aromni_jax.vocabulary import get_vocabulary

pytestmark = pytest.mark.tpu

VOCABULARY = get_vocabulary("demo").size  # 2944
LENGTH, ROWS = 384, 4  # tokens, rows of a chip
TOPOLOGY = parse_topology("v5e:2x4")


def config():
  run = to_dataclass(TrainConfig, base.get_config().to_dict())
  model = dataclasses.replace(
    run.model,
    vocab_size=VOCABULARY,
    embed_dim=256,
    mlp_dim=512,
    num_layers=3,
    num_heads=2,
    num_kv_heads=2,
    remat_policy="norms",
  )
  return dataclasses.replace(
    run,
    model=model,
    batch_size=8 * ROWS,
    loss=dataclasses.replace(run.loss, vocab_block=368),
    data=dataclasses.replace(run.data, sequence_length=LENGTH),
  )


@pytest.fixture(scope="module")
def step():
  return compiled.compile_step(config(), TOPOLOGY)


def test_memory(step):
  """State and batch are what a chip's part of them is; the rest is the compiler's."""
  run = config()
  found = estimate.estimate(run, TOPOLOGY)
  state = found.memory["parameters"] + found.memory["optimiser"]
  table, batch = 4 * np.prod(compiled.TABLE_SHAPE) / 8, 6 * 4 * ROWS * LENGTH
  assert step.memory["state and batch"] == pytest.approx(state + table + batch, rel=0.01)
  assert step.memory["temporaries"] > run.model.num_layers * ROWS * LENGTH * 256 * 2
  assert step.memory["results that take no argument's place"] < 10**5  # the state is donated


def test_operations(step):
  """Products of the model, loops counted as often as they run, and what is computed twice."""
  m = config().model
  products = 6 * (m.num_params() - VOCABULARY * m.embed_dim)
  head_again = 2 * VOCABULARY * m.embed_dim
  projection = 6 * m.embed_dim * compiled.TABLE_SHAPE[1]
  # Splash in blocks of the whole length: two products forward, seven backward.
  attention = 9 * 2 * m.num_layers * m.num_heads * m.head_dim * LENGTH
  want = ROWS * LENGTH * (products + head_again + projection + attention)
  assert step.cost.flops == pytest.approx(want, rel=0.01)
  assert step.cost.seconds >= step.cost.flops / TOPOLOGY.chip.peak_flops


def test_the_kernels_are_in_it(step):
  kernels = [line for line in step.text.splitlines() if "tpu_custom_call" in line]
  assert {re.search(r"splash_mh\w_(fwd|dq|dkv)", line)[1] for line in kernels} >= {"fwd", "dkv"}


def test_logits_never_exist_in_full(step):
  """Neither logits nor anything that chips exchange has the whole vocabulary as an axis."""
  arrays = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", step.text)
  arrays = {tuple(map(int, dims.split(","))) for dims in arrays}
  assert any(368 in dims for dims in arrays)  # blocks
  tokens = {LENGTH, ROWS * LENGTH, 8 * ROWS * LENGTH}
  assert not [dims for dims in arrays if VOCABULARY in dims and tokens & {*dims}]
  shapes = [collective.shape for collective, _, _ in step.cost.collectives]
  assert shapes and not [shape for shape in shapes if str(VOCABULARY) in shape]


def test_parameters_are_gathered_in_bfloat16(step):
  m = config().model
  gathers = {}
  for collective, count, _ in step.cost.collectives:
    if collective.opcode == "all-gather":
      dtype, dims = collective.shape.rstrip("]").split("[")
      gathers[dtype] = gathers.get(dtype, 0) + count * np.prod([int(d) for d in dims.split(",")])
  layers = m.num_params() - 2 * VOCABULARY * m.embed_dim
  # In each pass every kernel of the layers, and the head.
  assert gathers["bf16"] >= 0.95 * 2 * (layers + VOCABULARY * m.embed_dim)
  # The table of the perceptual loss and its projection are float32.
  assert gathers["f32"] <= np.prod(compiled.TABLE_SHAPE) + 2 * m.embed_dim * 256


def test_collectives_are_counted_in_every_layer(step):
  m = config().model
  counts = {}
  for collective, count, _ in step.cost.collectives:
    if collective.opcode == "all-gather" and collective.shape.endswith("256,512]"):
      counts[count] = counts.get(count, 0) + 1
  assert counts and all(count == m.num_layers for count in counts), counts


def test_the_report_has_the_compilers_figures(step):
  run = config()
  found = estimate.estimate(run, TOPOLOGY)
  text = report.compiled(run, found, step)
  assert "memory of a chip, GiB (compiler)" in text and "all-gather" in text
  figures = report.figures(run, found, step)
  assert figures["compiled"]["total"] == sum(step.memory.values())
  seconds = step.cost.seconds
  assert figures["compiled"]["mfu"] == pytest.approx(found.model_flops / 8 / 197e12 / seconds)


@pytest.fixture(scope="module")
def two_slices():
  return compiled.topology_devices(parse_topology("2xv5e:2x4"))


def test_only_data_crosses_slices(two_slices):
  topology = parse_topology("2xv5e:2x4")
  mesh = sharding.make_mesh(4, -1, 2, devices=two_slices)
  assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 2}
  slices = np.vectorize(lambda d: d.slice_index)(mesh.devices)
  assert (slices == slices[:, :1, :1]).all() and {*slices[:, 0, 0]} == {0, 1}
  wire = compiled.wire(topology, mesh)
  numbers = np.arange(16).reshape(mesh.devices.shape)
  for group, network in (
    (numbers[:, 0, 0], DCN),
    (numbers[0, :, 0], ICI),
    (numbers[0, 0], ICI),
    ((), DCN),  # all of them
  ):
    collective = hlo.Collective("all-reduce", tuple(map(int, group)), 1e9, "f32[]", "1")
    assert wire(collective)[0] == network


def test_a_copy_for_each_slice_is_demanded(two_slices):
  with pytest.raises(ValueError, match="mesh.data 1 is not a multiple of the 2 slices"):
    sharding.make_mesh(1, -1, 1, devices=two_slices)


def test_one_chip_is_a_topology():
  assert len(compiled.topology_devices(parse_topology("v5e:1x1"))) == 1


def test_a_vocabulary_that_does_not_exist_is_named():
  run = config()
  run = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=2945))
  with pytest.raises(ValueError, match="config.model.vocab_size 2945 is of no known vocabulary"):
    compiled.compile_step(run, TOPOLOGY)
