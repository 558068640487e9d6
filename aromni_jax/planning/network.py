"""How long collectives take on the wires of a topology.

The usual bounds of tori whose links carry both ways at once ("How to Scale Your Model", chapter 3)
and of switches: what a chip must send or receive, over what it can send in a second.
"""

import math

from aromni_jax.cluster.hardware import Topology

ICI, DCN = "ICI", "DCN"


def torus_of(topology: Topology, size: int) -> tuple[int, ...]:
  """Returns the sizes (in chips) of the torus axes that neighbours of a mesh axis lie on.

  The last axes of a slice are filled first, as `jax.make_mesh` does.

  Args:
    topology: the chips.
    size: number of devices along the mesh axis.
  """
  dims: list[int] = []
  for length in reversed(topology.shape):
    if size <= 1:
      break
    dims.append(math.gcd(size, length) if size % length else length)
    size //= dims[-1]
  return tuple(d for d in dims if d > 1)


def _is_ring(topology: Topology, size: int) -> bool:
  """Whether an axis closes: only whole ones do, of 16 chips in a plane, of multiples of 4 in space.
  In a line everything passes one way through one link."""
  whole = 16 if topology.chip.torus_axes == 2 else 4
  return size in topology.shape and size % whole == 0


def collective_seconds(
  topology: Topology, opcode: str, nbytes: float, dims: tuple[int, ...], slices: int = 1
) -> tuple[str, float]:
  """Returns the network that limits a collective, and its seconds.

  Args:
    topology: the chips.
    opcode: kind of collective, as HLO names it.
    nbytes: bytes of the whole array that is gathered, reduced or scattered; for an exchange
      (all-to-all, collective-permute), bytes of a chip's own part.
    dims: sizes (in chips) of the torus axes that the group spans inside a slice, or (GPUs of a
      node,).
    slices: number of slices (or nodes) that the group spans.
  """
  chip = topology.chip
  inside = math.prod(dims)
  seconds = 0.0
  times = 2.0 if opcode == "all-reduce" else 1.0
  exchange = opcode in ("all-to-all", "collective-permute")
  if inside > 1:
    if chip.torus_axes:
      width = sum((2 if _is_ring(topology, d) else 1) * chip.link_bandwidth for d in dims)
    else:
      width = chip.link_bandwidth
    if opcode == "all-to-all":
      hops = sum(d / 4 for d in dims) if chip.torus_axes else 1.0
      seconds = nbytes * hops / width
    elif exchange:
      seconds = nbytes / chip.link_bandwidth
    else:
      seconds = times * nbytes * (inside - 1) / inside / width
  if slices == 1:
    return ICI, seconds
  # Between slices goes what is left of the array when the chips of a slice have shared it.
  part = nbytes if exchange else nbytes / inside
  across = times * part * (slices - 1) / slices / chip.network_bandwidth
  return (DCN, across) if across > seconds else (ICI, seconds)
