"""A stack of decoder blocks of 7B width on one GPU, forward and backward, ours and the peer's.

  python -m benchmarks.gpu_stack --out=result.json

Measures, each printed as it is done and all in one JSON line at the end: the card's two ceilings
(a bf16 product, a copy) and the products of a block at their own shapes; attention backends,
checked against float32; the step time of the cases; where the time of a case goes. On an H100 this
takes about four minutes. `--stages`, `--case` and `--profile` take parts of it.

A case is `ours` or `peer` and settings, e.g. `--case="ours batch=4 remat_policy=full"`. Settings of
ours are fields of `DecoderConfig`, the peer's are `mode` (eager, compiled) and `policy`: autocast
keeps float32 weights as ours do, bf16 has weights in bfloat16. Both have batch, num_layers,
norm_placement and optimizer (the step then includes clipping and Adam). Ours also have
segments=packed (rows of several samples, as in training) and xla=FLAG:VALUE,... compiler options.

Model FLOPs are 6 per weight in a product and token, plus causal attention over the whole row, also
where packed rows need less of it. Recomputation is not counted. The cases take turns, so that all
see the same card; a time is the median over the turns.
"""

import dataclasses
import functools
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs room beside it

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx

from aromni_jax.cluster import hardware
from aromni_jax.models import attention as attention_lib
from aromni_jax.models import decoder as decoder_lib
from aromni_jax.models.config import DecoderConfig
from aromni_jax.training.optimizer import OptimizerConfig, make_optimizer

Array = jax.Array
Settings = dict[str, str]
Step = Callable[[], Callable]  # starts a step and returns what waits for its end

_CASES = flags.DEFINE_multi_string(
  "case",
  [
    "ours scan_layers=false",
    "ours scan_layers=false segments=packed",
    "ours scan_layers=false segments=packed max_segments=16",
    "ours",
    "peer mode=eager policy=bf16",
    "peer mode=eager policy=autocast",
    "peer mode=compiled policy=bf16",
    "peer mode=compiled policy=autocast",
  ],
  "What to time: ours or peer, and settings.",
)
_DEFAULTS = flags.DEFINE_string(
  "defaults", "batch=2 num_layers=6", "Settings of every case that does not set them."
)
_STAGES = flags.DEFINE_list(
  "stages", ["ceilings", "edges", "attention", "stack"], "Which to run, in which order."
)
_PROFILE = flags.DEFINE_multi_integer("profile", [], "Numbers of the cases of ours to profile.")
_HLO = flags.DEFINE_string("hlo", "", "Folder for the compiled programs of ours.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns of each case.")
_LENGTH = flags.DEFINE_integer("length", 4096, "Sequence length.")
_OUT = flags.DEFINE_string("out", "", "File for the result, rewritten after every stage.")

_MAX_SEGMENTS = (8, 16, 32, 64)
_VOCAB = 4096  # the head is not part of the stack, and the embedding should not count
_STEPS = 3  # steps of a turn
_RATE = 1e-5


# --- timing -------------------------------------------------------------------------------------


def seconds(run: Callable[[], object], sync: Callable[[object], None], repeats: int = 10) -> float:
  """Returns the time of one `run`, the median of three times `repeats` runs in a row."""
  for _ in range(2):
    sync(run())
  times = []
  for _ in range(3):
    began = time.perf_counter()
    for _ in range(repeats):
      out = run()
    sync(out)
    times.append((time.perf_counter() - began) / repeats)
  return float(np.median(times))


def jax_seconds(fn: Callable, *args: Array, repeats: int = 10) -> float:
  """The same of a jitted function."""
  return seconds(lambda: fn(*args), jax.block_until_ready, repeats)


# --- the card -----------------------------------------------------------------------------------


def ceilings(config: DecoderConfig, batch: int) -> dict:
  """Returns what the card reaches: TFLOP/s of products, TB/s (read plus written) of a copy."""
  out = {}
  product = jax.jit(lambda a, b: a @ b)
  n = 8192 if jax.default_backend() == "gpu" else 256
  a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
  out["product_tflops"] = 2 * n**3 / jax_seconds(product, a, b) / 1e12
  x = jax.random.normal(jax.random.key(0), (n * n * 8,), jnp.bfloat16)
  out["copy_tbps"] = 2 * x.nbytes / jax_seconds(jax.jit(lambda x: x + 1), x) / 1e12
  tokens, d, f = batch * _LENGTH.value, config.embed_dim, config.mlp_dim
  layer = 0.0
  for name, count, k, n in (("dxd", 4, d, d), ("dxf", 2, d, f), ("fxd", 1, f, d)):
    x, w, g = (
      jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
      for i, shape in enumerate(((tokens, k), (k, n), (tokens, n)))
    )
    forms = {
      "forward": (lambda x, w, g: x @ w),
      "inputs": (lambda x, w, g: g @ w.T),
      "weights": (lambda x, w, g: x.T @ g),
    }
    for form, fn in forms.items():
      t = jax_seconds(jax.jit(fn), x, w, g)
      out[f"{name}_{form}_tflops"] = 2 * tokens * k * n / t / 1e12
      layer += count * t
  out["layer_products_ms"] = 1e3 * layer
  return {k: round(v, 3) for k, v in out.items()}


# --- attention ----------------------------------------------------------------------------------


def make_segments(batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns segment ids and positions, int32[B, T], of samples of log-uniform lengths."""
  rng = np.random.default_rng(0)
  ids, positions = np.zeros((2, batch, length), np.int32)
  for row in range(batch):
    at = segment = 0
    while at < length:
      n = int(np.exp(rng.uniform(np.log(length / 64), np.log(length / 2))))
      segment += 1
      ids[row, at : at + n] = segment
      positions[row, at : at + n] = np.arange(n)[: length - at]
      at += n
  return ids, positions


def attention_backends(heads: int, head_dim: int, batch: int) -> dict:
  """Returns milliseconds of forward plus backward, and the errors against float32."""
  shape = (batch, _LENGTH.value, heads, head_dim)
  *qkv, g = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(4))
  segments = jnp.asarray(make_segments(batch, _LENGTH.value)[0])
  candidates = attention_candidates()
  out = {"runs_per_row": [int((np.diff(row) != 0).sum()) + 1 for row in np.asarray(segments)]}

  def gradient(fn, ids):
    def run(q, k, v, g):
      y, pull = jax.vjp(lambda q, k, v: fn(q, k, v, ids), q, k, v)
      return (y, *pull(g.astype(y.dtype)))

    return jax.jit(run)

  def reference(q, k, v, ids):
    return attention_lib.attention(q, k, v, segment_ids=ids, backend="xla")

  for label, ids in (("whole", None), ("packed", segments)):
    with jax.default_matmul_precision("highest"):
      small = [x[:1, :, :4].astype(jnp.float32) for x in (*qkv, g)]
      want = gradient(reference, None if ids is None else ids[:1])(*small)
    for name, fn in candidates.items():
      if ids is None and "max_segments" in name:
        continue
      try:
        run = gradient(fn, ids)
        began = time.perf_counter()
        got = run(*qkv, g)
        compiled = time.perf_counter() - began
        errors = [relative_error(a[:1, :, :4], b) for a, b in zip(got, want, strict=True)]
        ms = 1e3 * jax_seconds(run, *qkv, g)
        forward = 1e3 * jax_seconds(jax.jit(lambda q, k, v, fn=fn, ids=ids: fn(q, k, v, ids)), *qkv)
        out[f"{label} {name}"] = {
          "ms": round(ms, 3),
          "forward_ms": round(forward, 3),
          "errors": [float(f"{e:.2g}") for e in errors],
        }
        progress(f"attention {label} {name}", out[f"{label} {name}"], f"first {compiled:.1f} s")
      except Exception as e:  # a candidate that this card or version cannot run is a result
        out[f"{label} {name}"] = f"{type(e).__name__}: {str(e)[:300]}"
        progress(f"attention {label} {name}", out[f"{label} {name}"])
  return out


def attention_candidates() -> dict[str, Callable]:
  """Returns functions of q, k, v and segment ids."""

  def candidate(backend, max_segments=0):
    return lambda q, k, v, ids: attention_lib.attention(
      q, k, v, segment_ids=ids, max_segments=max_segments, backend=backend
    )

  skipping = {f"cudnn max_segments={n}": candidate("cudnn", n) for n in _MAX_SEGMENTS}
  return {"xla": candidate("xla"), "cudnn": candidate("cudnn"), **skipping}


def check_packed() -> dict:
  """Returns the errors of cuDNN's packed rows where they could go wrong (as many runs as promised,
  runs of one position, padding, one run, grouped heads), and whether too many runs give NaN."""
  length, most = 320, 5
  ids = np.ones((4, length), np.int32)
  for position in (1, 2, 130, 300):
    ids[0, position:] += 1
  ids[1, 200:] = 0
  ids[3, ::2] = 2
  q, k, v, g = (
    jax.random.normal(jax.random.key(i), (4, length, heads, 128), jnp.bfloat16)
    for i, heads in enumerate((4, 2, 2, 4))
  )

  @functools.partial(jax.jit, static_argnums=0)
  def run(backend, q, k, v, g, ids):
    def out(q, k, v):
      return attention_lib.attention(q, k, v, segment_ids=ids, max_segments=most, backend=backend)

    y, pull = jax.vjp(out, q, k, v)
    return (y, *pull(g))

  with jax.default_matmul_precision("highest"):
    want = run("xla", *(x[:3].astype(jnp.float32) for x in (q, k, v, g)), ids[:3])
  got = run("cudnn", *(x[:3] for x in (q, k, v, g)), ids[:3])
  over = run("cudnn", q, k, v, g, ids)[0]
  return {
    "errors": [float(f"{relative_error(a, b):.2g}") for a, b in zip(got, want, strict=True)],
    "rows_with_nan": [bool(jnp.isnan(row).any()) for row in over],
  }


def relative_error(got: Array, want: Array) -> float:
  """|got - want| / |want|."""
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  return float(np.linalg.norm(got - want) / np.linalg.norm(want))


# --- cases --------------------------------------------------------------------------------------


def parse(case: str) -> tuple[str, Settings]:
  """Returns who, and the settings: the default ones, then the case's."""
  who, *words = case.split()
  if who not in ("ours", "peer"):
    raise app.UsageError(f"--case={case!r}: starts with ours or peer")
  return who, dict(word.split("=", 1) for word in (*_DEFAULTS.value.split(), *words))


def model_config(settings: Settings) -> DecoderConfig:
  """Returns the shapes of a case, the 7B model's but for what it sets."""
  config = DecoderConfig(vocab_size=_VOCAB, remat_policy="none")
  changes = {}
  for field in dataclasses.fields(DecoderConfig):
    if field.name in settings:
      default, word = getattr(config, field.name), settings[field.name]
      changes[field.name] = word == "true" if isinstance(default, bool) else type(default)(word)
  return dataclasses.replace(config, **changes)


def make_inputs(config: DecoderConfig, batch: int, packed: bool) -> dict[str, np.ndarray]:
  """Returns ids, positions, segment ids and the gradient of the hidden states."""
  rng = np.random.default_rng(0)
  shape = (batch, _LENGTH.value)
  segments, positions = make_segments(*shape)
  if not packed:
    segments, positions = None, np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
  return {
    "tokens": rng.integers(10, config.vocab_size, shape, dtype=np.int32),
    "positions": positions,
    "segment_ids": segments,
    "cotangent": rng.standard_normal((*shape, config.embed_dim), np.float32),
  }


def ours(settings: Settings, shared: dict) -> tuple[Step, dict]:
  """Returns the step of a case, compiled, and what is known of it."""
  config, batch = model_config(settings), int(settings.get("batch", 1))
  inputs = make_inputs(config, batch, settings.get("segments") == "packed")
  inputs = {k: v if v is None else jnp.asarray(v) for k, v in inputs.items()}
  inputs["cotangent"] = inputs["cotangent"].astype(config.compute_dtype)
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: decoder_lib.Decoder(config, rngs=nnx.Rngs(0))))
  optimizer = make_optimizer(OptimizerConfig())
  key = ("ours", config.num_layers, config.norm_placement, config.param_dtype)
  if settings.get("optimizer"):  # its parameters are donated
    key += ("optimizer", str(settings))
  if key not in shared:
    shared[key] = jax.jit(lambda k: decoder_lib.init_params(config, k)[1])(jax.random.key(0))
  state = {"params": shared[key]}

  def gradient(params, x):
    def hidden(params):
      return nnx.merge(graphdef, params)(x["tokens"], x["positions"], x["segment_ids"])

    return jax.vjp(hidden, params)[1](x["cotangent"])[0]

  def train(state, x):
    grads = gradient(state["params"], x)
    updates, moments = optimizer.update(grads, state["moments"], state["params"])
    return {"params": optax.apply_updates(state["params"], scaled(updates)), "moments": moments}

  def scaled(updates):
    return jax.tree.map(lambda u: -_RATE * u, updates)

  options = dict(word.split(":") for word in settings.get("xla", "").split(",") if word)
  options = {k: {"true": True, "false": False}.get(v, v) for k, v in options.items()}
  began = time.perf_counter()
  if settings.get("optimizer"):
    state["moments"] = jax.jit(optimizer.init)(state["params"])
    lowered = jax.jit(train, donate_argnums=0).lower(state, inputs)
  else:
    lowered = jax.jit(gradient).lower(state["params"], inputs)
  compiled = lowered.compile(compiler_options=options)
  facts = {"compile_seconds": round(time.perf_counter() - began, 1)}
  if _HLO.value:
    with open(os.path.join(_HLO.value, case_file(settings)), "w") as f:
      f.write(compiled.as_text())
  if memory := compiled.memory_analysis():
    facts["gib"] = {
      k: round(getattr(memory, f"{k}_size_in_bytes") / hardware.GIB, 2)
      for k in ("argument", "output", "temp")
    }

  def step():
    if settings.get("optimizer"):
      shared.pop(key, None)
      state.update(compiled(state, inputs))
      return lambda: jax.block_until_ready(state["params"])
    out = compiled(state["params"], inputs)
    return lambda: jax.block_until_ready(out)

  return step, facts


def case_file(settings: Settings) -> str:
  return "-".join(f"{k}_{v}" for k, v in sorted(settings.items())).replace(":", "_") + ".txt"


def theirs(settings: Settings, shared: dict) -> tuple[Step, dict]:
  """The same of the peer: the layers of `transformers`' Chameleon, called as its model does with no
  padding, so that SDPA is causal without a mask."""
  import torch

  from benchmarks import peer

  config, batch = model_config(settings), int(settings.get("batch", 1))
  device = "cuda" if torch.cuda.is_available() else "cpu"
  policy = settings.get("policy", "bf16")
  dtype = {"bf16": torch.bfloat16, "autocast": torch.float32}[policy]
  key = ("peer", config.num_layers, config.norm_placement, policy)
  if key not in shared:
    with torch.device(device):
      shared[key] = peer.make_chameleon(config).to(device, dtype).train()
    shared[key].lm_head = None
  model = shared[key].model
  inputs = make_inputs(config, batch, packed=False)
  tokens = torch.from_numpy(inputs["tokens"].astype(np.int64)).to(device)
  positions = torch.arange(_LENGTH.value, device=device)[None]

  def hidden(tokens):
    x = model.embed_tokens(tokens)
    rotary = model.rotary_emb(x, position_ids=positions)
    for layer in model.layers:
      x = layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotary)
      x = x[0] if isinstance(x, tuple) else x
    return model.norm(x)

  run = torch.compile(hidden) if settings.get("mode") == "compiled" else hidden
  autocast = torch.autocast(device, torch.bfloat16, enabled=policy == "autocast")
  weights = [*model.layers.parameters(), *model.norm.parameters(), *model.embed_tokens.parameters()]
  optimizer = torch.optim.AdamW(weights, lr=_RATE, betas=(0.9, 0.95), fused=device == "cuda")
  with torch.no_grad(), autocast:
    dtype = model.norm(model.embed_tokens(tokens)).dtype
    cotangent = torch.from_numpy(inputs["cotangent"]).to(device, dtype)

  def step():
    with autocast:
      y = run(tokens)
    y.backward(cotangent)
    if settings.get("optimizer"):
      torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
      optimizer.step()
    for w in weights:
      w.grad = None
    return torch.cuda.synchronize if device == "cuda" else (lambda: None)

  began = time.perf_counter()
  step()()
  facts = {"compile_seconds": round(time.perf_counter() - began, 1)}
  return step, facts


def flops(settings: Settings) -> float:
  """Model FLOPs of a step of a case, without the head."""
  config = model_config(settings)
  per_token = config.flops_per_token(_LENGTH.value) - 6.0 * config.vocab_size * config.embed_dim
  return per_token * int(settings.get("batch", 1)) * _LENGTH.value


def time_cases(cases: list[str], result: dict) -> None:
  """Adds each case's times to the result; the cases take turns."""
  shared, steps = {}, {}
  for case in cases:
    who, settings = parse(case)
    try:
      step, facts = {"ours": ours, "peer": theirs}[who](settings, shared)
      step()()
      facts["first_ms"] = round(1e3 * turn(step), 2)
    except Exception as e:  # one that does not fit must not cost the others
      result["cases"][case] = {"error": f"{type(e).__name__}: {str(e)[:300]}"}
      progress(case, result["cases"][case])
      continue
    finally:
      release(who)
    steps[case], result["cases"][case] = step, facts
    progress(case, facts)
  turns = {case: [] for case in steps}
  for _ in range(_ROUNDS.value):
    for case, step in steps.items():
      step()()
      turns[case].append(turn(step))
      release(case.split()[0])
  for case, times in turns.items():
    _, settings = parse(case)
    ms = 1e3 * float(np.median(times))
    facts = result["cases"][case]
    facts["ms"], facts["ms_range"] = round(ms, 2), [round(1e3 * f(times), 2) for f in (min, max)]
    facts["tflops"] = round(flops(settings) / ms / 1e9, 1)
    if result["peak_tflops"]:
      facts["mfu"] = round(facts["tflops"] / result["peak_tflops"], 4)
    progress(case, facts)
  for case in (cases[i] for i in _PROFILE.value if cases[i] in steps):
    result["cases"][case]["profile"] = profile(steps[case])
    progress(case, json.dumps(result["cases"][case]["profile"], indent=1))


def turn(step: Step) -> float:
  """Returns the seconds of a step, over a few in a row."""
  began = time.perf_counter()
  for _ in range(_STEPS):
    wait = step()
  wait()
  return (time.perf_counter() - began) / _STEPS


def release(who: str) -> None:
  """Hands the memory that PyTorch keeps back, for JAX to have."""
  gc.collect()
  if who == "peer":
    import torch

    torch.cuda.empty_cache()


# --- profile ------------------------------------------------------------------------------------

_KINDS = (
  ("attention", ("sdpa", "flash", "fmha", "attention", "cudnn::fusion")),
  ("products", ("gemm", "nvjet", "cutlass", "xmma", "cublas")),
  ("copies", ("memcpy", "memset", "copy", "dynamic-update", "dynamic_update", "transpose")),
)


def profile(step: Step) -> dict:
  """Returns milliseconds per step by kind of kernel, and the longest kernels."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(_STEPS):
        wait = step()
      wait()
    files = [os.path.join(d, n) for d, _, names in os.walk(folder) for n in names]
    space = jax.profiler.ProfileData.from_file(next(f for f in files if f.endswith("xplane.pb")))
  kernels: dict[str, list[float]] = {}
  first, last = float("inf"), 0.0
  for plane in space.planes:
    if not plane.name.startswith("/device:GPU"):
      continue
    for line in plane.lines:
      if "Stream" not in line.name:
        continue
      for event in line.events:
        total = kernels.setdefault(event.name, [0.0, 0])
        total[0] += event.duration_ns / 1e6 / _STEPS
        total[1] += 1
        first = min(first, event.start_ns)
        last = max(last, event.start_ns + event.duration_ns)
  kinds = {"attention": 0.0, "products": 0.0, "copies": 0.0, "other": 0.0}
  for name, (ms, _) in kernels.items():
    kind = next((k for k, words in _KINDS if any(w in name.lower() for w in words)), "other")
    kinds[kind] += ms
  longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:40]
  return {
    "ms": {k: round(v, 2) for k, v in kinds.items()},
    "wall_ms": round((last - first) / 1e6 / _STEPS, 2),
    "kernels": {name[:90]: [round(ms, 3), n // _STEPS] for name, (ms, n) in longest},
  }


# --- main ---------------------------------------------------------------------------------------


def progress(*words: object) -> None:
  print(f"[{time.perf_counter() - _BEGAN:6.1f} s]", *words, flush=True)


_BEGAN = time.perf_counter()


def versions() -> dict[str, str]:
  """Returns the versions that a result depends on."""
  from importlib import metadata

  found = {d.name: d.version for d in metadata.distributions()}
  return {name: found.get(name, "") for name in ("jax", "flax", "torch", "transformers")}


def main(argv: list[str]) -> None:
  del argv
  cases = _CASES.value
  for case in cases:
    model_config(parse(case)[1])
  device = jax.devices()[0]
  chip = hardware.chip_of(device.device_kind)
  result = {
    "benchmark": "gpu_stack",
    "device": device.device_kind,
    "peak_tflops": chip and chip.peak_flops / 1e12,
    "length": _LENGTH.value,
    **versions(),
    "cases": {},
  }
  progress(result)
  settings = dict(word.split("=", 1) for word in _DEFAULTS.value.split())
  config, batch = model_config(settings), int(settings.get("batch", 1))
  for stage in _STAGES.value:
    if stage == "ceilings":
      result["ceilings"] = ceilings(config, batch)
      progress(result["ceilings"])
    elif stage == "attention":
      result["attention"] = attention_backends(config.num_heads, config.head_dim, batch)
    elif stage == "edges":
      result["edges"] = check_packed()
      progress(result["edges"])
    else:
      time_cases(cases, result)
    if _OUT.value:
      with open(_OUT.value, "w") as f:
        json.dump(result, f)
  print(json.dumps(result))


if __name__ == "__main__":
  app.run(main)
