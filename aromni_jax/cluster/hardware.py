"""Chips and the ways they are wired: the figures that plans and utilisation are reckoned with.

Figures are the makers' data sheets (cloud.google.com/tpu/docs, nvidia.com), but for the links
between TPU chips, which are what is reached: 0.9 of the data sheet ("How to Scale Your Model",
chapter 2).
"""

import dataclasses
import math
import re

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator.

  Attributes:
    name: name of the chip in topologies, e.g. v5e.
    platform: "tpu" or "gpu".
    device_kinds: beginnings of the names that JAX has for it.
    peak_flops: bfloat16 FLOPs per second.
    hbm_bytes: bytes of memory.
    hbm_bandwidth: bytes per second between chip and memory.
    link_bandwidth: bytes per second and direction of one ICI link, or of a GPU's NVLink.
    torus_axes: number of torus axes along which a chip has links, both ways; 0 is a switch.
    network_bandwidth: bytes per second and direction that a chip has of the network between
      slices or nodes (DCN, InfiniBand).
    chips_per_host: chips of a host in a slice of several hosts, or GPUs of a node.
  """

  name: str
  platform: str
  device_kinds: tuple[str, ...]
  peak_flops: float
  hbm_bytes: int
  hbm_bandwidth: float
  link_bandwidth: float
  torus_axes: int
  network_bandwidth: float
  chips_per_host: int


CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v4", "tpu", ("TPU v4",), 275e12, 32 * GIB, 1.23e12, 4.5e10, 3, 6.25e9, 4),
    Chip(
      "v5e", "tpu", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 8.19e11, 4.5e10, 2, 3.125e9, 4
    ),
    Chip("v5p", "tpu", ("TPU v5", "TPU v5p"), 459e12, 95 * GIB, 2.765e12, 9e10, 3, 6.25e9, 4),
    Chip("v6e", "tpu", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1.64e12, 9e10, 2, 1.25e10, 4),
    Chip("a100", "gpu", ("NVIDIA A100",), 312e12, 80 * 10**9, 2.04e12, 3e11, 0, 2.5e10, 8),
    Chip("h100", "gpu", ("NVIDIA H100",), 989e12, 80 * GIB, 3.35e12, 4.5e11, 0, 5e10, 8),
    Chip("h200", "gpu", ("NVIDIA H200",), 989e12, 141 * 10**9, 4.8e12, 4.5e11, 0, 5e10, 8),
  )
}

# v5e and v6e: one VM has up to this many chips of a slice, but 4 of each larger one.
_FLAT_HOST = 8
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # v5e and v6e


@dataclasses.dataclass(frozen=True)
class Topology:
  """Chips as they are booked.

  Attributes:
    chip: kind of the chips.
    shape: sizes (in chips) of the axes of a TPU slice, or (GPUs per node,).
    slices: number of slices, or of nodes of GPUs.
  """

  chip: Chip
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def slice_name(self) -> str:
    """Name of one slice, e.g. v5e:16x16 or h100:8."""
    return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

  @property
  def name(self) -> str:
    """Name of the whole, which `parse_topology` reads, e.g. 2xv5e:16x16."""
    return f"{self.slices}x{self.slice_name}" if self.slices > 1 else self.slice_name

  @property
  def chips_per_slice(self) -> int:
    return math.prod(self.shape)

  @property
  def num_chips(self) -> int:
    return self.slices * self.chips_per_slice

  @property
  def hosts_per_slice(self) -> int:
    if self.chip.torus_axes == 2 and self.chips_per_slice <= _FLAT_HOST:
      return 1
    return -(-self.chips_per_slice // self.chip.chips_per_host)

  @property
  def num_hosts(self) -> int:
    return self.slices * self.hosts_per_slice


def parse_topology(name: str) -> Topology:
  """Returns the topology of a name.

  Args:
    name: CHIP:SHAPE of a TPU slice (v5e:16x16, v5p:4x4x8), CHIP:COUNT of GPUs (h100:8; more than a
      node are whole nodes of 8), and COUNTx before it for several slices or nodes (2xv5e:16x16).

  Raises:
    ValueError: if there is no such thing to book, saying what there is.
  """
  match = re.fullmatch(r"(?:(\d+)x)?(\w+):(\d+(?:x\d+)*)", name)
  if not match or match[2] not in CHIPS:
    raise ValueError(
      f"topology {name!r}; expected e.g. v5e:16x16, 2xv5e:16x16, v5p:4x4x8 or h100:8, with one of "
      f"the chips {', '.join(CHIPS)}"
    )
  chip = CHIPS[match[2]]
  slices = int(match[1] or 1)
  shape = tuple(int(n) for n in match[3].split("x"))
  if slices < 1:
    raise ValueError(f"topology {name!r} has no slices")
  if chip.platform == "gpu":
    if len(shape) != 1 or shape[0] < 1:
      raise ValueError(f"topology {name!r}; GPUs are counted, e.g. {chip.name}:8")
    if shape[0] > chip.chips_per_host:
      if shape[0] % chip.chips_per_host or slices > 1:
        raise ValueError(
          f"topology {name!r}; a node has {chip.chips_per_host} {chip.name}: take a multiple of it"
        )
      slices, shape = shape[0] // chip.chips_per_host, (chip.chips_per_host,)
  elif chip.torus_axes == 2 and match[3] not in _FLAT:
    raise ValueError(
      f"topology {name!r} does not exist; {chip.name} slices are {', '.join(_FLAT)}; for more "
      f"chips take several slices, e.g. 2x{chip.name}:16x16"
    )
  elif chip.torus_axes == 3 and not _is_cuboid(shape):
    raise ValueError(
      f"topology {name!r} does not exist; {chip.name} slices are 2x2x1, 2x2x2, 2x2x4, 2x4x4 or "
      "AxBxC of multiples of 4 with A <= B <= C, e.g. 4x4x8"
    )
  return Topology(chip, shape, slices)


def _is_cuboid(shape: tuple[int, ...]) -> bool:
  if shape in ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)):
    return True
  return len(shape) == 3 and list(shape) == sorted(shape) and all(n and n % 4 == 0 for n in shape)


def chip_of(device_kind: str) -> Chip | None:
  """Returns the chip that JAX calls by a name, or None where no data sheet is known."""
  kinds = [(kind, chip) for chip in CHIPS.values() for kind in chip.device_kinds]
  kinds = [(kind, chip) for kind, chip in kinds if device_kind.startswith(kind)]
  return max(kinds, key=lambda pair: len(pair[0]))[1] if kinds else None
