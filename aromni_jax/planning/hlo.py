"""Reads the compiler's optimised program: what each operation costs, and how often it runs.

The text of a scheduled HLO module (https://openxla.org/xla/operation_semantics) is walked in the
order in which a chip runs it. Bodies of loops are multiplied by their trip counts, which XLA's own
cost analysis does not do. Three things go on side by side, as on the chip: operations, one after
another, each as long as the larger of its compute and its memory time; asynchronous copies; and
asynchronous collectives. Whoever needs the result of a copy or a collective waits for it.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable

import numpy as np

_BYTES = {
  "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
  "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip
COLLECTIVES = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
  "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
ACROSS = (-1,)  # group of a collective between slices
_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "partition-id",
         "replica-id", "after-all", "opt-barrier", "send", "send-done")  # fmt: skip
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+[0-9a-z]*)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape: where it lies matters, for only main memory takes time.

  Attributes:
    dtype: type of an element, as HLO names it, e.g. bf16.
    dims: sizes of the axes.
    local: whether it lies in the chip's own memory (VMEM and the like) instead of HBM.
  """

  dtype: str
  dims: tuple[int, ...]
  local: bool

  @property
  def nbytes(self) -> float:
    return math.prod(self.dims) * _BYTES.get(self.dtype, 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: name of its result.
    opcode: kind of operation, as HLO names it.
    arrays: the array of the result, or those of its tuple.
    operands: names of the instructions whose results it takes.
    text: its attributes, unparsed.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  text: str

  def attribute(self, name: str) -> str:
    """Returns the name of a computation that an attribute holds, or ""."""
    match = re.search(rf"\b{name}=%?([\w.\-]+)", self.text)
    return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of the program.

  Attributes:
    opcode: kind of collective, one of `COLLECTIVES`.
    group: numbers of the devices of its first group, in the mesh's order; `ACROSS` for slices.
    nbytes: bytes of the whole array that is gathered, reduced or exchanged.
    shape: dtype and sizes of the largest array in it, e.g. bf16[4096,11008].
    channel: number (or name) that all parts of one collective share.
  """

  opcode: str
  group: tuple[int, ...]
  nbytes: float
  shape: str
  channel: str


@dataclasses.dataclass
class Cost:
  """What a chip does in a step.

  Attributes:
    seconds: time of a step, with everything that waits for something else.
    compute: seconds of operations that arithmetic limits.
    memory: seconds of operations that HBM's bandwidth limits.
    copy_waits: seconds in which nothing but a copy is under way.
    wire_waits: seconds in which nothing but a collective is under way.
    flops: FLOPs of products.
    collectives: (collective, number of times in a step, seconds of one on the wire).
  """

  seconds: float = 0.0
  compute: float = 0.0
  memory: float = 0.0
  copy_waits: float = 0.0
  wire_waits: float = 0.0
  flops: float = 0.0
  collectives: list[tuple[Collective, int, float]] = dataclasses.field(default_factory=list)

  def add(self, other: "Cost", times: int) -> None:
    """Adds another cost, so many times."""
    for field in ("seconds", "compute", "memory", "copy_waits", "wire_waits", "flops"):
      setattr(self, field, getattr(self, field) + times * getattr(other, field))
    self.collectives += [(c, times * count, wire) for c, count, wire in other.collectives]


def _parse_arrays(shape: str) -> tuple[Array, ...]:
  found = []
  for dtype, dims, layout in _ARRAY.findall(shape):
    if dtype in _BYTES:
      local = bool(re.search(r"S\([1-9]\)", layout))
      found.append(Array(dtype, tuple(int(d) for d in dims.split(",") if d), local))
  return tuple(found)


def _closing(text: str, start: int) -> int:
  """Returns where the parenthesis at `start` is closed."""
  depth = 0
  for match in re.finditer(r"[()]", text[start:]):
    depth += 1 if match[0] == "(" else -1
    if depth == 0:
      return start + match.start()
  return len(text)


def _parse(line: str) -> Instruction | None:
  match = _INSTRUCTION.match(line)
  if not match:
    return None
  name, rest = match.groups()
  at = _closing(rest, 0) + 1 if rest.startswith("(") else 0  # the shape may be a tuple with spaces
  shape, _, rest = rest.partition(" ") if not at else (rest[:at], "", rest[at + 1 :])
  opcode, _, rest = rest.partition("(")
  end = _closing("(" + rest, 0) - 1
  operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
  text = rest if opcode in ("constant", "parameter") else rest[end + 1 :]  # or its value
  return Instruction(name, opcode, _parse_arrays(shape), operands, text)


class Module:
  """A compiled module.

  Args:
    text: `compiled.as_text()`.
  """

  def __init__(self, text: str):
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.entry, current = "", {}
    for line in _whole_lines(text):
      match = _COMPUTATION.match(line)
      if match:
        current = self.computations.setdefault(match[2], {})
        self.entry = match[2] if match[1] else self.entry
      elif instruction := _parse(line):
        current[instruction.name] = instruction

  def called(self, instruction: Instruction) -> dict[str, Instruction]:
    """Returns the computation that a fusion, call or asynchronous start runs; {} for others."""
    return self.computations.get(instruction.attribute("calls"), {})

  def trip_count(self, loop: Instruction) -> int:
    """Returns how often the body of a while loop runs: what its condition compares with.

    Raises:
      ValueError: if the condition is no comparison with a constant.
    """
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text)
    if known:
      return int(known[1])
    condition = self.computations[loop.attribute("condition")]
    bodies = [condition, *(self.called(i) for i in condition.values())]
    constants = {
      int(i.text.partition(")")[0])
      for body in bodies
      for i in body.values()
      if i.opcode == "constant" and i.arrays and i.arrays[0].dtype in ("s32", "u32", "s64")
    }
    if len(constants) != 1:
      raise ValueError(f"the trip count of the loop {loop.name} is not known: {constants}")
    return constants.pop()

  def flops(self, instruction: Instruction, scope: dict[str, Instruction]) -> float:
    """Returns the FLOPs of the products in an instruction and in what it calls."""
    if instruction.opcode in ("dot", "convolution"):
      return _product_flops(instruction, scope)
    if instruction.opcode == "custom-call":
      return _kernel_flops(instruction, scope)
    called = self.called(instruction)
    return sum(self.flops(inner, called) for inner in called.values())

  def hbm_bytes(self, instruction: Instruction, scope: dict[str, Instruction]) -> float:
    """Returns the bytes that an instruction reads from and writes to main memory.

    Of operands only what is sliced out of them is read, of results in place only what is put into
    them is written.
    """
    called = self.called(instruction)
    if called:
      return self._fusion_bytes(instruction, scope, called)
    total = _hbm(instruction.arrays)
    if instruction.opcode == "dynamic-update-slice":
      return 2 * _hbm(scope[instruction.operands[1]].arrays)
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
      return 2 * total
    return total + sum(_hbm(scope[o].arrays) for o in instruction.operands if o in scope)

  def collectives(self, instruction: Instruction) -> list[tuple[Collective, str]]:
    """Returns the collectives that an instruction starts, runs or waits for, and which of these:
    "start", "run", "done" or "" where it only goes on beside a computation."""
    opcode = instruction.opcode
    if opcode == "recv" and "xla_megascale_runtime" in instruction.text:
      return [(_between_slices(instruction), "start")]  # by way of the hosts; it has a send
    if (base := opcode.removesuffix("-start")) in COLLECTIVES:
      return [(_collective(base, instruction), "start" if opcode != base else "run")]
    found = []
    body = self.called(instruction)
    for inner in body.values():
      found += [c for c, _ in self.collectives(inner)] if inner.opcode != "fusion" else []
    if not found:
      return []
    targets = " ".join(i.text for i in body.values() if i.opcode == "custom-call")
    if opcode == "async-start" or "AsyncCollectiveStart" in targets:
      kind = "start"
    elif "AsyncCollectiveDone" in targets:
      kind = "done"
    else:
      kind = "run" if instruction.attribute("calls").startswith("all-reduce-scatter") else ""
    if "all-reduce-scatter" in instruction.attribute("calls"):
      found = [dataclasses.replace(c, opcode="reduce-scatter") for c in found]
    return [(c, kind) for c in found]

  @functools.cached_property
  def _users(self) -> dict[int, dict[str, list[Instruction]]]:
    users: dict[int, dict[str, list[Instruction]]] = {}
    for body in self.computations.values():
      table = users.setdefault(id(body), collections.defaultdict(list))
      for instruction in body.values():
        for operand in set(instruction.operands):
          table[operand].append(instruction)
    return users

  def _read(self, body: dict[str, Instruction], name: str, size: float) -> float:
    """Bytes of a value of `size` bytes that a fused computation reads."""
    total = 0.0
    for user in self._users[id(body)][name]:
      called = self.called(user)
      if user.opcode == "bitcast":
        total += self._read(body, user.name, size)
      elif called:
        for index, operand in enumerate(user.operands):
          if operand == name:
            total += self._read(called, _parameters(called)[index], size)
      elif user.opcode in ("dynamic-slice", "slice"):
        total += user.arrays[0].nbytes
      elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
        pass  # changed in place
      elif user.opcode != "tuple" and user.opcode not in COLLECTIVES:
        return size
    return min(total, size)

  def _fusion_bytes(self, fusion, scope, called) -> float:
    parameters = _parameters(called)
    total = 0.0
    for index, operand in enumerate(fusion.operands):
      size = _hbm(scope[operand].arrays) if operand in scope else 0.0
      total += self._read(called, parameters[index], size) if size else 0.0
    root = list(called.values())[-1]
    results = [called[o] for o in root.operands] if root.opcode == "tuple" else [root]
    for array, result in zip(fusion.arrays, results, strict=False):
      body = called
      while result.opcode == "bitcast" or self.called(result):
        if inner := self.called(result):
          body, result = inner, list(inner.values())[-1]
        else:
          result = body[result.operands[0]]
      if array.local or result.opcode == "parameter" or result.opcode in COLLECTIVES:
        continue
      if result.opcode == "dynamic-update-slice":
        array = body[result.operands[1]].arrays[0]
      total += array.nbytes
    return total


def cost(
  module: Module,
  peak_flops: float,
  hbm_bandwidth: float,
  wire: Callable[[Collective], tuple[str, float]],
) -> Cost:
  """Returns what one run of the module takes on a chip.

  Args:
    module: the compiled program of one chip.
    peak_flops: FLOPs per second of the chip.
    hbm_bandwidth: bytes per second that it reads from and writes to HBM.
    wire: collective -> name of the network that it uses, and seconds that it takes there.
  """

  @functools.cache
  def run(computation: str) -> Cost:
    scope = module.computations[computation]
    total, now = Cost(), 0.0
    free = collections.defaultdict(float)  # when the copies' and the collectives' ways are free
    ends: dict[str, float] = {}

    def wait(end: float, kind: str) -> None:
      nonlocal now
      if end > now:
        setattr(total, kind, getattr(total, kind) + end - now)
        now = end

    for instruction in scope.values():
      opcode = instruction.opcode
      if opcode in _FREE:
        continue
      if opcode in ("while", "call", "conditional"):
        inner, times = Cost(), 1
        if opcode == "while":
          inner, times = run(instruction.attribute("body")), module.trip_count(instruction)
        elif opcode == "call":
          inner = run(instruction.attribute("to_apply"))
        else:
          inner = max((run(name) for name in _branches(instruction)), key=lambda c: c.seconds)
        total.add(inner, times)
        now += times * inner.seconds
        continue
      going = module.collectives(instruction)
      for collective, kind in going:
        if kind in ("start", "run"):
          name, seconds = wire(collective)
          free[name] = max(free[name], now) + seconds
          total.collectives.append((collective, 1, seconds))
          ends[collective.channel] = ends[instruction.name] = free[name]
        if kind in ("done", "run"):
          wait(ends.pop(collective.channel, 0.0), "wire_waits")
      if going and any(kind for _, kind in going):
        continue
      if opcode in ("copy-start", "slice-start"):
        size = _hbm(instruction.arrays[:2]) if opcode == "copy-start" else 0.0
        size = size or instruction.arrays[1].nbytes
        free["copies"] = max(free["copies"], now) + size / hbm_bandwidth
        ends[instruction.name] = free["copies"]
        continue
      if opcode.endswith("-done"):
        kind = "copy_waits" if opcode in ("copy-done", "slice-done") else "wire_waits"
        wait(ends.pop(instruction.operands[0], 0.0), kind)
        continue
      flops = module.flops(instruction, scope)
      arithmetic = flops / peak_flops
      memory = module.hbm_bytes(instruction, scope) / hbm_bandwidth
      total.flops += flops
      if arithmetic >= memory:
        total.compute += arithmetic
      else:
        total.memory += memory
      now += max(arithmetic, memory)
    total.seconds = now
    return total

  return run(module.entry)


def _whole_lines(text: str) -> list[str]:
  """Lines of the text, with those joined that the attributes of a kernel were broken into."""
  lines: list[str] = []
  for line in text.splitlines():
    if line.startswith(('"', "}}")) and lines:
      lines[-1] += line
    else:
      lines.append(line)
  return lines


def _branches(conditional: Instruction) -> list[str]:
  """Names of the computations that a conditional chooses from: by number, or by a predicate."""
  if match := re.search(r"branch_computations=\{([^}]*)\}", conditional.text):
    return re.findall(r"%?([\w.\-]+)", match[1])
  return [conditional.attribute(f"{name}_computation") for name in ("true", "false")]


def _hbm(arrays: tuple[Array, ...]) -> float:
  return sum(a.nbytes for a in arrays if not a.local)


def _parameters(body: dict[str, Instruction]) -> dict[int, str]:
  """Number -> name of the parameters of a computation."""
  return {int(i.text.partition(")")[0]): i.name for i in body.values() if i.opcode == "parameter"}


def _collective(opcode: str, instruction: Instruction) -> Collective:
  channel = re.search(r"channel_id=(\d+)", instruction.text)
  arrays = [a for a in instruction.arrays if a.dims]
  if instruction.opcode.endswith("-start") and opcode in ("all-gather", "collective-permute"):
    arrays = arrays[1:2]  # the first is the operand
  nbytes = sum(a.nbytes for a in arrays)
  group = _first_group(instruction.text)
  if opcode == "reduce-scatter":
    nbytes *= len(group)
  largest = max(arrays, key=lambda a: a.nbytes, default=Array("f32", (), False))
  shape = f"{largest.dtype}[{','.join(map(str, largest.dims))}]"
  return Collective(opcode, group, nbytes, shape, channel[1] if channel else instruction.name)


def _between_slices(instruction: Instruction) -> Collective:
  """A collective over slices: each chip exchanges its own array with its likes in the others."""
  text = instruction.text
  kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', text)
  name = re.search(r'_xla_host_transfer_rendezvous="([^"]+)"', text)
  opcode = kind[1].lower().replace("_", "-") if kind else "collective-permute"
  array = instruction.arrays[0]
  shape = f"{array.dtype}[{','.join(map(str, array.dims))}]"
  return Collective(opcode, ACROSS, array.nbytes, shape, name[1] if name else instruction.name)


def _first_group(text: str) -> tuple[int, ...]:
  """Devices of the first group of `replica_groups` or `source_target_pairs`, all of its forms."""
  if match := re.search(r"source_target_pairs=\{\{([\d,]*)\}", text):
    return tuple(int(i) for i in match[1].split(","))
  if match := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
    return tuple(int(i) for i in match[1].split(","))
  if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
    shape, sizes = ([int(i) for i in match[n].split(",")] for n in (1, 2))
    order = [int(i) for i in match[3].split(",")] if match[3] else range(len(sizes))
    ids = np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(shape)
    return tuple(int(i) for i in ids[0])
  if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
    axes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    chosen = re.findall(r"'(\w+)'", match[2])
    ids = np.arange(math.prod(int(n) for n in axes.values())).reshape(
      [int(n) for n in axes.values()]
    )
    index = tuple(slice(None) if name in chosen else 0 for name in axes)
    return tuple(int(i) for i in ids[index].reshape(-1))
  return ()


def _product_flops(instruction: Instruction, scope: dict[str, Instruction]) -> float:
  out = math.prod(instruction.arrays[0].dims)
  if instruction.opcode == "dot":
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
    dims = scope[instruction.operands[0]].arrays[0].dims
    return 2.0 * out * math.prod(dims[int(i)] for i in contracted[1].split(",") if i)
  lhs, rhs, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text).groups()
  image, kernel = (scope[o].arrays[0].dims for o in instruction.operands[:2])
  dims = instruction.arrays[0].dims
  total = 2.0 * dims[result.index("b")] * dims[result.index("f")] * kernel[rhs.index("i")]
  window = re.search(r"window=\{([^}]*)\}", instruction.text)
  options = dict(o.split("=") for o in window[1].split()) if window else {}
  for axis in (label for label in rhs if label.isdigit()):
    at = int(axis)

    def option(name: str, default: str, at=at) -> list[int]:
      values = options[name].split("x") if name in options else [default] * (at + 1)
      return [int(n) for n in values[at].split("_")]

    (stride,), (low, _) = option("stride", "1"), option("pad", "0_0")
    (dilation,), (spread,) = option("rhs_dilate", "1"), option("lhs_dilate", "1")
    places = np.arange(dims[result.index(axis)])[:, None] * stride - low  # [results, 1]
    places = places + np.arange(kernel[rhs.index(axis)]) * dilation  # [results, window]
    last = (image[lhs.index(axis)] - 1) * spread
    # Of a window that hangs over, only what lies inside is computed.
    total *= int(((places >= 0) & (places <= last) & (places % spread == 0)).sum())
  return total


def _kernel_flops(instruction: Instruction, scope: dict[str, Instruction]) -> float:
  """FLOPs of splash attention under a causal mask: of the blocks that are not skipped."""
  kind = re.search(r"splash_mh[aq]_(fwd|dkv|dq)", instruction.text)
  if not kind:
    return 0.0
  products = {"fwd": 2, "dkv": 4, "dq": 3}[kind[1]]
  block = int(re.search(r'block_q\w*\\?": (\d+)', instruction.text)[1])
  operands = [a for o in instruction.operands for a in scope[o].arrays]
  *outer, length, width = next(a.dims for a in operands if a.dtype == "bf16")  # q [.., N, T, H]
  return products * 2.0 * math.prod(outer) * width * length * (length + block) / 2
