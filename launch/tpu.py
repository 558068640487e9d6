"""Names of TPU slices in Google Cloud."""

import math

from aromni_jax.cluster.hardware import Topology

_PREFIXES = {"v4": "v4", "v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}
_CORES = {"v4": 2, "v5p": 2}  # their types count TensorCores, those of the others chips
# cloud.google.com/tpu/docs/runtimes
RUNTIME_VERSIONS = {
  "v4": "tpu-ubuntu2204-base",
  "v5e": "v2-alpha-tpuv5-lite",
  "v5p": "v2-alpha-tpuv5",
  "v6e": "v2-alpha-tpuv6e",
}


def require_tpu(topology: Topology, target: str) -> None:
  """Raises ValueError if a topology has no TPU chips."""
  if topology.chip.name not in _PREFIXES:
    raise ValueError(
      f"--topology={topology.name} has no TPU, which --target={target} needs; expected e.g. "
      "v5e:16x16; GPUs run with --target=slurm"
    )


def accelerator_type(topology: Topology) -> str:
  """Returns the type of one slice, e.g. v5litepod-256 for v5e:16x16 or v5p-256 for v5p:4x4x8.

  Raises:
    ValueError: for a shape that is not the one that Google Cloud gives for its number of chips,
      the one nearest to a cube.
  """
  chips = topology.chips_per_slice
  if len(topology.shape) == 3:
    usual = _most_cubic(chips)
    if topology.shape != usual:
      raise ValueError(
        f"--topology={topology.name}: a queued resource of {chips} {topology.chip.name} chips is "
        f"{'x'.join(map(str, usual))}; take that, or --target=xpk, which books other shapes"
      )
  return f"{_PREFIXES[topology.chip.name]}-{chips * _CORES.get(topology.chip.name, 1)}"


def device_type(topology: Topology) -> str:
  """Returns what xpk calls one slice: v5litepod-256, or with its shape, v5p-4x4x8.

  A number of v4 or v5p chips may have several shapes, so their shape is named.
  """
  if len(topology.shape) == 3:
    return f"{_PREFIXES[topology.chip.name]}-{'x'.join(map(str, topology.shape))}"
  return accelerator_type(topology)


def _most_cubic(chips: int) -> tuple[int, ...]:
  if chips < 64:
    return {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}[chips]
  sides = range(4, chips // 16 + 1, 4)
  shapes = [(a, b, chips // (a * b)) for a in sides for b in sides if a <= b]
  shapes = [s for s in shapes if s[1] <= s[2] and s[2] % 4 == 0 and math.prod(s) == chips]
  return min(shapes, key=sum)
