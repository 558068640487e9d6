"""How long a person waits for `aromni generate`, cold and with a cache, beside the bare imports.

  python -m benchmarks.first_answer

`peer` is an interpreter that imports jax, flax.nnx and orbax.checkpoint, and nothing else. `first`
is the answer of text_to_speech with the shipped model and an empty cache of compiled programs,
`second` the same call again, `off` without a cache. Each is a process of its own; they take turns,
and medians of wall and CPU seconds count. Ratios are of CPU seconds, which other work on the
machine disturbs less.
"""

import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app, flags

_RUNS = flags.DEFINE_integer("runs", 5, "Measured runs of each.")

_PEER = (sys.executable, "-c", "import jax, flax.nnx, orbax.checkpoint")
_OURS = (sys.executable, "-m", "aromni_jax.cli", "generate", "--task=text_to_speech")
_OURS = (*_OURS, "--text=two dogs on blue", "--out=answer.wav")


def seconds(command: tuple[str, ...], folder: str, cache: str) -> tuple[float, float]:
  """Runs a command in a folder; returns its wall seconds and its CPU seconds of all threads."""
  env = os.environ | {"JAX_PLATFORMS": "cpu", "AROMNI_CACHE": cache}
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  began = time.perf_counter()
  subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
  wall = time.perf_counter() - began
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main(argv: list[str]) -> None:
  del argv
  measured: dict[str, list[tuple[float, float]]] = {}
  answers = set()
  with tempfile.TemporaryDirectory() as folder:
    seconds(_PEER, folder, "off")  # files of the packages are in memory from here on
    for run in range(_RUNS.value):
      cache = str(pathlib.Path(folder) / f"cache{run}")
      turns = {"peer": (_PEER, "off"), "first": (_OURS, cache), "second": (_OURS, cache)}
      turns["off"] = (_OURS, "off")
      for name, (command, kept) in turns.items():
        measured.setdefault(name, []).append(seconds(command, folder, kept))
        if command is _OURS:
          answers.add((pathlib.Path(folder) / "answer.wav").read_bytes())
  result: dict[str, object] = {"benchmark": "first_answer", "runs": _RUNS.value}
  cpu = {}
  for name, values in measured.items():
    walls, cpus = zip(*values, strict=True)
    cpu[name] = statistics.median(cpus)
    result[name] = {"wall_s": round(statistics.median(walls), 2), "cpu_s": round(cpu[name], 2)}
  for name in ("first", "second", "off"):
    result[f"{name}_of_peer"] = round(cpu[name] / cpu["peer"], 2)
  result["same_answer"] = len(answers) == 1
  result["cores"] = os.cpu_count()
  print(json.dumps(result))


if __name__ == "__main__":
  app.run(main)
