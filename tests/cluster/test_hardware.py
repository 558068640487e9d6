import pytest

from aromni_jax.cluster.hardware import CHIPS, chip_of, parse_topology


@pytest.mark.parametrize(
  "name, chips, hosts",
  [
    ("v5e:1x1", 1, 1),
    ("v5e:2x2", 4, 1),
    ("v5e:2x4", 8, 1),  # v5litepod-8 is one VM
    ("v5e:4x4", 16, 4),  # 4 chips of a larger slice
    ("v5e:16x16", 256, 64),
    ("v6e:2x4", 8, 1),
    ("v6e:4x8", 32, 8),
    ("2xv5e:2x4", 16, 2),
    ("2xv5e:16x16", 512, 128),
    ("v4:2x2x1", 4, 1),
    ("v4:2x2x2", 8, 2),
    ("v5p:2x4x4", 32, 8),
    ("v5p:4x4x8", 128, 32),
    ("v5p:8x8x12", 768, 192),
    ("h100:1", 1, 1),
    ("a100:8", 8, 1),
    ("2xh100:8", 16, 2),
  ],
)
def test_names_chips_and_hosts(name, chips, hosts):
  topology = parse_topology(name)
  assert topology.name == name
  assert (topology.num_chips, topology.num_hosts) == (chips, hosts)
  assert topology.slices * topology.hosts_per_slice == hosts
  assert topology.slices * topology.chips_per_slice == chips


def test_gpus_beyond_a_node_are_whole_nodes():
  topology = parse_topology("h200:24")
  assert (topology.name, topology.slices, topology.shape) == ("3xh200:8", 3, (8,))
  assert topology == parse_topology("3xh200:8")


@pytest.mark.parametrize(
  "name, message",
  [
    ("v5e", "expected e.g. v5e:16x16, 2xv5e:16x16"),
    ("v5e:", "expected e.g."),
    ("v5e:16x", "expected e.g."),
    ("v5e 16x16", "expected e.g."),
    ("tpu:2x2", "with one of the chips v4, v5e"),
    ("0xv5e:2x2", "has no slices"),
    ("v5e:3x3", "does not exist; v5e slices are 1x1, 2x2, 2x4"),
    ("v5e:16x8", "does not exist"),  # it is 8x16
    ("v6e:16x32", "take several slices, e.g. 2xv6e:16x16"),
    ("v5e:4x4x4", "does not exist"),
    ("v5p:4x4", "does not exist; v5p slices are 2x2x1"),
    ("v5p:4x8x4", "A <= B <= C"),
    ("v4:2x2x8", "multiples of 4"),
    ("v5p:0x4x4", "does not exist"),
    ("h100:0", "GPUs are counted, e.g. h100:8"),
    ("h100:2x2", "GPUs are counted"),
    ("h100:12", "a node has 8 h100: take a multiple of it"),
    ("2xh100:16", "take a multiple"),
  ],
)
def test_what_cannot_be_booked_is_refused(name, message):
  with pytest.raises(ValueError, match=message):
    parse_topology(name)


def test_chips_by_the_names_of_jax():
  """The longest name counts: a v5e is not a v5p, whose name begins alike."""
  kinds = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA A100-SXM4-80GB": "a100",
  }
  assert {kind: chip_of(kind).name for kind in kinds} == kinds
  assert chip_of("cpu") is None and chip_of("TPU v2") is None
  for name, chip in CHIPS.items():
    assert all(chip_of(kind) is chip for kind in chip.device_kinds), name
