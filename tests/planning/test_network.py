"""Seconds of collectives against sums done by hand. GB is 1e9 bytes."""

import pytest

from aromni_jax.cluster.hardware import parse_topology
from aromni_jax.planning.network import DCN, ICI, collective_seconds, torus_of

POD = parse_topology("v5e:16x16")  # 45 GB/s a link and direction, two axes, 3.125 GB/s to DCN


@pytest.mark.parametrize(
  "topology, opcode, dims, seconds",
  [
    # A ring of 16: 15/16 of 1 GB comes in, over two links: 0.9375 / 90.
    ("v5e:16x16", "all-gather", (16,), 0.9375 / 90),
    ("v5e:16x16", "reduce-scatter", (16,), 0.9375 / 90),
    ("v5e:16x16", "all-reduce", (16,), 2 * 0.9375 / 90),  # a scatter, then a gather
    # The whole pod: 255/256 of it, over four links: 0.99609375 / 180.
    ("v5e:16x16", "all-gather", (16, 16), 0.99609375 / 180),
    # A pair has one link: half of 1 GB over 45.
    ("v5e:16x16", "all-gather", (2,), 0.5 / 45),
    # 2 x 16: one link and two: 31/32 over 135.
    ("v5e:16x16", "all-gather", (2, 16), 0.96875 / 135),
    # A cube: 63/64 over six links of 90.
    ("v5p:4x4x4", "all-reduce", (4, 4, 4), 2 * 0.984375 / 540),
    # Exchange on a ring of 16: 16/4 = 4 links far on average, 4 GB of traffic over two links.
    ("v5e:16x16", "all-to-all", (16,), 4 / 90),
    # On 16 x 16 eight links far, over four links.
    ("v5e:16x16", "all-to-all", (16, 16), 8 / 180),
    # To a neighbour: one link.
    ("v5e:16x16", "collective-permute", (16,), 1 / 45),
    # NVLink is a switch of 450 GB/s: 7/8 of 1 GB; an exchange passes once.
    ("h100:8", "all-gather", (8,), 0.875 / 450),
    ("h100:8", "all-reduce", (8,), 2 * 0.875 / 450),
    ("h100:8", "all-to-all", (8,), 1 / 450),
    # Nobody to talk to.
    ("v5e:16x16", "all-reduce", (), 0.0),
  ],
)
def test_inside_a_slice(topology, opcode, dims, seconds):
  network, got = collective_seconds(parse_topology(topology), opcode, 1e9, dims)
  assert network == ICI
  assert got == pytest.approx(seconds, rel=1e-12)


def test_between_slices():
  two, eight = parse_topology("2xv5e:16x16"), parse_topology("8xv5e:16x16")
  # One chip of each of two slices: half of 1 GB out and in, twice: 1 / 3.125.
  assert collective_seconds(two, "all-reduce", 1e9, (), 2) == (DCN, pytest.approx(1 / 3.125))
  # Of eight slices: 2 * 7/8.
  assert collective_seconds(eight, "all-reduce", 1e9, (), 8) == (DCN, pytest.approx(1.75 / 3.125))
  # When 256 chips of a slice share the array, each sends 1/256 of it: 0.00125 s. Inside, the same
  # chips take 2 * 255/256 / 180 = 0.0110677 s, which is more: the link is what limits it.
  limit = collective_seconds(two, "all-reduce", 1e9, (16, 16), 2)
  assert limit == (ICI, pytest.approx(2 * 0.99609375 / 180))
  # An exchange is not shared: half of a chip's 1 GB leaves its slice.
  assert collective_seconds(two, "all-to-all", 1e9, (16, 16), 2) == (
    DCN,
    pytest.approx(0.5 / 3.125),
  )
  # Two nodes of 8 GPUs: 1/8 of it each, 2 * 1/2 * 0.125 / 50 = 0.0025 s; NVLink 0.00389 s.
  nodes = parse_topology("h100:16")
  assert collective_seconds(nodes, "all-reduce", 1e9, (8,), 2) == (
    ICI,
    pytest.approx(2 * 0.875 / 450),
  )


@pytest.mark.parametrize(
  "topology, size, dims",
  [
    ("v5e:16x16", 1, ()),
    ("v5e:16x16", 4, (4,)),
    ("v5e:16x16", 16, (16,)),
    ("v5e:16x16", 64, (16, 4)),
    ("v5e:16x16", 256, (16, 16)),
    ("v5p:4x4x8", 8, (8,)),
    ("v5p:4x4x8", 128, (8, 4, 4)),
    ("v5p:2x2x1", 4, (2, 2)),
    ("h100:8", 8, (8,)),
  ],
)
def test_mesh_axes_fill_the_last_axes_first(topology, size, dims):
  assert torus_of(parse_topology(topology), size) == dims
