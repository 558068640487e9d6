"""Plans as text and as figures."""

import collections
from typing import Any

from aromni_jax.cluster.hardware import GIB
from aromni_jax.planning.compiled import Compiled
from aromni_jax.planning.estimate import Estimate
from aromni_jax.planning.hlo import ACROSS
from aromni_jax.planning.network import DCN, ICI
from aromni_jax.planning.sampling import kv_cache_bytes
from aromni_jax.training.config import TrainConfig

PAPER_TOKENS = 140_000 * 480 * 1300  # of pre-training, facts of arXiv 2601.17761 section 3
_DAY = 24 * 3600


def estimated(config: TrainConfig, found: Estimate) -> str:
  """Returns the plan of an estimate as text."""
  topology, (data, fsdp, tensor) = found.topology, found.mesh
  rows = config.batch_size // (data * fsdp * config.accumulate)
  lines = [
    f"{topology.name}: {topology.num_chips} chips, {topology.num_hosts} hosts",
    f"mesh: data {data}, fsdp {fsdp}, tensor {tensor}; {config.batch_size} rows of "
    f"{config.data.sequence_length} tokens a step, {rows} at once on a chip"
    + (f", {config.accumulate} times" if config.accumulate > 1 else ""),
    "",
    f"{'parameters':36s} {'shape':18s} {'type':9s} {'split by':22s} MiB/chip",
  ]
  for group in found.parameters:
    spec = ", ".join(_axis(a) for a in group.spec) or "-"
    shape = " x ".join(map(str, group.shape))
    size = f"{group.local_bytes / (1 << 20):.2f}"
    lines.append(
      f"  {group.name[8:] if group.name.startswith('decoder.') else group.name:34s} "
      f"{shape:18s} {group.dtype:9s} {spec:22s} {size:>6s}"
    )
  lines += ["", "memory of a chip, GiB (estimate)"]
  lines += [f"  {name:55s} {size / GIB:7.2f}" for name, size in found.memory.items()]
  lines.append(f"  {f'in all, of {found.usable / GIB:.2f}':55s} {found.total_memory / GIB:7.2f}")
  if found.sampling:
    lines += ["memory of a chip while samples are made, GiB (estimate)"]
    lines += [f"  {name:55s} {size / GIB:7.2f}" for name, size in found.sampling.items()]
    lines.append(f"  {'in all':55s} {sum(found.sampling.values()) / GIB:7.2f}")
  lines.append(
    f"largest step that fits: {found.largest_batch} rows"
    if found.largest_batch
    else "no batch fits"
  )
  lines += [
    "",
    "collectives of a step                 what           times   MB each  over   seconds",
  ]
  for t in found.traffic:
    lines.append(
      f"  {t.what:35s} {t.opcode:15s} {t.count:4d} {t.nbytes / 1e6:9.1f}  {t.network:4s} "
      f"{t.seconds:9.4f}"
    )
  lines += ["", *_speed(config, found, found.seconds, "estimate")]
  lines.append(
    f"  products {found.compute:.3f} s, limited by memory {found.passes:.3f} s, waiting for "
    f"collectives {found.waits:.3f} s; the limit is {_limit(found)}"
  )
  cache = kv_cache_bytes(config.model)
  weights = 2 * config.model.num_params() / tensor / fsdp
  lines += [
    "",
    "generation with this mesh, bfloat16: "
    f"{weights / GIB:.2f} GiB of parameters on a chip, keys and values {cache / (1 << 20):.3f} MiB "
    f"per token and row ({cache * config.data.sequence_length / GIB:.2f} GiB for a row of "
    f"{config.data.sequence_length})",
  ]
  return "\n".join(lines)


def compiled(config: TrainConfig, found: Estimate, step: Compiled) -> str:
  """Returns what the compiler says, beside the estimate, as text."""
  cost, total = step.cost, sum(step.memory.values())
  lines = [f"compiled in {step.seconds:.0f} s", "", "memory of a chip, GiB (compiler)"]
  lines += [f"  {name:55s} {size / GIB:7.2f}" for name, size in step.memory.items()]
  lines.append(f"  {'in all':55s} {total / GIB:7.2f}")
  lines.append(f"  {'the estimate is, times that':55s} {found.total_memory / total:7.3f}")
  lines += ["", "collectives of a step (compiler)      largest part             over  times      s"]
  for (opcode, shape, network), (count, seconds) in collectives(step)[:16]:
    lines.append(f"  {opcode:35s} {shape:24s} {network:4s} {count:6d} {seconds:7.4f}")
  lines += ["", *_speed(config, found, cost.seconds, "compiler's program")]
  lines.append(
    f"  products {cost.compute:.3f} s, limited by memory {cost.memory:.3f} s, waiting for copies "
    f"{cost.copy_waits:.3f} s, waiting for collectives {cost.wire_waits:.3f} s"
  )
  return "\n".join(lines)


def collectives(step: Compiled) -> list[tuple[tuple[str, str, str], tuple[int, float]]]:
  """Returns (opcode, shape, network) -> (times, seconds on the wire), longest first."""
  sums: dict[Any, list] = collections.defaultdict(lambda: [0, 0.0])
  for collective, count, seconds in step.cost.collectives:
    network = DCN if collective.group == ACROSS else ICI
    entry = sums[collective.opcode, collective.shape, network]
    entry[0] += count
    entry[1] += count * seconds
  return sorted(((k, tuple(v)) for k, v in sums.items()), key=lambda item: -item[1][1])


def figures(config: TrainConfig, found: Estimate, step: Compiled | None) -> dict[str, Any]:
  """Returns everything as JSON-ready figures: bytes, seconds."""
  out = {
    "topology": found.topology.name,
    "mesh": dict(zip(("data", "fsdp", "tensor"), found.mesh, strict=True)),
    "rows": config.batch_size,
    "sequence_length": config.data.sequence_length,
    "remat_policy": config.model.remat_policy,
    "estimate": {
      "memory": found.memory,
      "total": found.total_memory,
      "sampling": found.sampling,
      "usable": found.usable,
      "largest_batch": found.largest_batch,
      "seconds": found.seconds,
      "mfu": found.mfu,
    },
  }
  if step:
    cost = step.cost
    out["compiled"] = {
      "memory": step.memory,
      "total": sum(step.memory.values()),
      "seconds": cost.seconds,
      "mfu": found.mfu_of(cost.seconds),
      "products": cost.compute,
      "memory_bound": cost.memory,
      "copy_waits": cost.copy_waits,
      "wire_waits": cost.wire_waits,
      "collectives": [[*key, *value] for key, value in collectives(step)],
      "compile_seconds": step.seconds,
    }
  return out


def _speed(config: TrainConfig, found: Estimate, seconds: float, source: str) -> list[str]:
  per_day = found.tokens / seconds * _DAY
  days = PAPER_TOKENS / per_day
  run = config.num_steps * seconds / _DAY
  return [
    f"roofline of a step ({source}), a lower bound: {seconds:.3f} s, so MFU <= "
    f"{found.mfu_of(seconds):.3f}",
    f"  {found.tokens / seconds:,.0f} tokens/s, {per_day / 1e9:.2f} billion a day; this run of "
    f"{config.num_steps:,} steps >= {run:.1f} days",
    f"  the paper's 87 billion tokens: >= {days:.1f} days, "
    f"{days * 24 * found.topology.num_chips:,.0f} chip-hours",
  ]


def _limit(found: Estimate) -> str:
  terms = {"arithmetic": found.compute, "memory": found.passes, "the network": found.waits}
  return max(terms, key=terms.get)


def _axis(axis: Any) -> str:
  if isinstance(axis, tuple):
    return "+".join(axis)
  return axis or "-"
