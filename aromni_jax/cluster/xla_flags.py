"""Compiler flags and environment variables that training runs with, each with its reason.

The launcher exports them (`launch/`), and `aromni plan --compile` compiles with them.

Sources: MaxText's benchmarks/xla_flags_library.py and what the compiled 7B step shows with and
without each (TPU, docs/scale.md), NVIDIA's "Tips for High-Performance LLMs with JAX and XLA" and
JAX's "GPU performance tips" (GPU).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Flag:
  """A flag of XLA or libtpu: --name=value, why it is set, and the chips that it is not for."""

  name: str
  value: str
  reason: str
  not_on: tuple[str, ...] = ()

  def __str__(self) -> str:
    return f"--{self.name}={self.value}"


@dataclasses.dataclass(frozen=True)
class Variable:
  """An environment variable, and why it is set."""

  name: str
  value: str
  reason: str


FLAGS: dict[str, tuple[Flag, ...]] = {
  "tpu": (
    Flag(
      "xla_tpu_enable_async_collective_fusion",
      "true",
      "fuses collectives with the computation that hides them",
    ),
    Flag(
      "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
      "true",
      "the same for the gathers of parameters that fsdp splits",
    ),
    Flag("xla_enable_async_all_gather", "true", "gathers start early and end when they are needed"),
    Flag("xla_enable_async_all_reduce", "true", "the same for sums of gradients"),
    Flag(
      "xla_tpu_enable_async_collective_fusion_fuse_all_reduce",
      "true",
      "hides sums of gradients, too; without it 10 % of a step on v5e:16x16 waits for them",
    ),
    Flag(
      "xla_tpu_async_collective_fusion_fuse_multiple_collectives",
      "true",
      "a product may hide several collectives: a backward pass that keeps activations has fewer "
      "products than collectives; libtpu 0.0.42.1 aborts with it for v6e",
      not_on=("v6e",),
    ),
    Flag(
      "xla_jf_crs_combiner_threshold_in_bytes",
      "1048576",
      "sums of matrices are not joined, since joined ones cannot be hidden",
    ),
  ),
  "gpu": (
    Flag(
      "xla_gpu_enable_latency_hiding_scheduler",
      "true",
      "moves collectives so that computation hides them",
    ),
    Flag(
      "xla_gpu_enable_pipelined_all_gather",
      "true",
      "fsdp: a layer's parameters are gathered while the layer before computes",
    ),
    Flag(
      "xla_gpu_enable_pipelined_reduce_scatter",
      "true",
      "fsdp: a layer's gradients are scattered while the next layer computes",
    ),
  ),
}

VARIABLES: dict[str, tuple[Variable, ...]] = {
  "tpu": (
    Variable("JAX_PLATFORMS", "tpu,cpu", "a worker without its TPU fails at once"),
    Variable("PYTHONUNBUFFERED", "1", "lines reach the log when they are written"),
  ),
  "gpu": (
    Variable("JAX_PLATFORMS", "cuda,cpu", "a node without its GPUs fails at once"),
    Variable(
      "XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9", "0.75 is the default; NCCL and cuBLAS need the rest"
    ),
    Variable("PYTHONUNBUFFERED", "1", "lines reach the log when they are written"),
  ),
}

# The variable that flags are read from.
FLAGS_VARIABLE = {"tpu": "LIBTPU_INIT_ARGS", "gpu": "XLA_FLAGS"}


def flags(platform: str, chip: str = "") -> tuple[Flag, ...]:
  """Returns the flags of "tpu" or "gpu", for a chip as `hardware.CHIPS` names it."""
  return tuple(flag for flag in FLAGS[platform] if chip not in flag.not_on)


def flags_value(platform: str, chip: str = "") -> str:
  """Returns the value of `FLAGS_VARIABLE[platform]`. Raises KeyError for an unknown platform."""
  return " ".join(map(str, flags(platform, chip)))
