"""Changes the code of training and data, one small thing at a time, and lists what no test notices.

python -m tests.mutation                                all files, hours
python -m tests.mutation --files=step.py --limit=40     a sample of 40 of one file
python -m tests.mutation --named                        the mistakes of named.py

docs/testing.md says how to read it. Nothing here touches the checkout: files are changed in a copy
below --workdir, where the results are, too, one JSON line each. A run that is called again goes on.
"""

import argparse
import collections
import functools
import hashlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[2]
# Nearest tests of a file, the fastest first: the first that fails ends a run. Files that are not
# here have those of their own name, or all of their room.
_LOSS, _STEP = "tests/training/test_production_loss.py", "tests/training/test_step.py"
TESTS = {
  "aromni_jax/training/step.py": (_LOSS, _STEP),
  "aromni_jax/training/setup.py": (_LOSS, _STEP),
  "aromni_jax/training/terms.py": ("tests/training/test_terms.py", _LOSS, _STEP),
  "aromni_jax/training/losses.py": ("tests/training/test_losses.py", _LOSS),
  "aromni_jax/training/optimizer.py": ("tests/training/test_optimizer.py", _LOSS),
  "aromni_jax/data/loss_weights.py": ("tests/data/test_loss_weights.py", _LOSS),
  "aromni_jax/data/packing.py": ("tests/data/test_packing.py", "tests/data/test_pipeline.py"),
  "aromni_jax/data/pipeline.py": ("tests/data/test_pipeline.py", _LOSS),
  "aromni_jax/models/decoder.py": ("tests/models/test_decoder.py", _LOSS),
}
COPIED = ("aromni_jax", "configs", "data_pipelines", "launch", "tests", "pyproject.toml")
_MEMORY = 8 * 2**30  # address space of a run; a change may allocate without end


def nearest(file: str) -> tuple[str, ...]:
  """Returns the tests that a change of a file of `aromni_jax` should make fail."""
  room, name = file.split("/")[-2:]
  own = f"tests/{room}/test_{name}"
  return TESTS.get(file) or ((own,) if (ROOT / own).exists() else (f"tests/{room}",))


def run(test: str, tree: pathlib.Path, timeout: float) -> tuple[str, str]:
  """Returns how a test file ends in a copy of the checkout: "passed", "failed" or "timeout", and
  which test failed.

  Libraries are imported once, before this process is copied; JAX opens its devices after it.
  """
  log = tree.parent / "pytest.log"
  pid = os.fork()
  if not pid:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    with open(log, "w") as out:
      os.dup2(out.fileno(), 1)
      os.dup2(out.fileno(), 2)
    os.chdir(tree)
    for name in list(sys.modules):
      if name.split(".")[0] in ("tests", "aromni_jax"):
        del sys.modules[name]
    sys.path[:] = [str(tree), *(p for p in sys.path if p not in ("", str(ROOT)))]
    import pytest

    code = pytest.main(["-x", "-q", "-n0", "-p", "no:cacheprovider", "--tb=line", test])
    sys.stdout.flush()
    os._exit(code)
  end, done = time.monotonic() + timeout, 0
  try:
    while not done and time.monotonic() < end:
      time.sleep(0.05)
      done, status = os.waitpid(pid, os.WNOHANG)
  finally:  # also if somebody interrupts
    if not done:
      os.killpg(pid, signal.SIGKILL)
      os.waitpid(pid, 0)
  if not done:
    return "timeout", ""
  failed = [line for line in log.read_text().splitlines() if line.startswith(("FAILED", "ERROR"))]
  name = failed[0].split(" - ")[0].split(" ", 1)[-1] if failed else ""
  return ("passed" if status == 0 else "failed"), name


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--files", default="", help="only files whose path ends in one of these, a,b")
  parser.add_argument("--limit", type=int, default=0, help="changes of each file; 0 is all")
  parser.add_argument("--seed", type=int, default=0, help="of the sample that --limit takes")
  parser.add_argument("--named", action="store_true", help="only the mistakes of named.py")
  parser.add_argument("--workdir", default="runs/mutation", help="of the copy and the results")
  flags = parser.parse_args()
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the tests that run, too

  work = pathlib.Path(flags.workdir).resolve()
  tree = work / "tree"
  shutil.rmtree(tree, ignore_errors=True)
  tree.mkdir(parents=True)
  for name in COPIED:
    if (ROOT / name).is_dir():
      shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
      shutil.copy(ROOT / name, tree / name)
  os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "PYTHONDONTWRITEBYTECODE": "1",
    # A change leaves most programs as they are.
    "JAX_COMPILATION_CACHE_DIR": str(work / "programs"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  import flax.nnx  # noqa: F401
  import grain  # noqa: F401
  import optax.contrib  # noqa: F401
  import pytest  # noqa: F401
  import tensorflow_datasets  # noqa: F401

  from tests.mutation.mutants import mutants

  results = work / "results.jsonl"
  known = {}
  if results.exists():
    known = {r["id"]: r for r in map(json.loads, results.read_text().splitlines())}
  everything = []
  for file, changes in chosen(flags, mutants):
    outcomes = [
      try_one(file, *change, tree=tree, results=results, known=known) for change in changes
    ]
    everything += outcomes
    count = collections.Counter(r["outcome"] for r in outcomes)
    print(
      f"{file}: {len(outcomes)} changes, {count['passed']} survive, {count['timeout']} time out"
    )
  survivors = [r for r in everything if r["outcome"] == "passed"]
  print(f"{len(everything)} changes, {len(survivors)} survive")
  if flags.named and survivors:
    sys.exit("each of these should make a test fail")


def chosen(flags: argparse.Namespace, mutants) -> Iterator[tuple[str, list[tuple[int, str, str]]]]:
  """Yields the files and their changes, (line, what, changed source), that flags ask for."""
  ends = tuple(flags.files.split(","))
  if flags.named:
    from tests.mutation.named import NAMED

    for name, (file, code, mistake) in NAMED.items():
      source = (ROOT / file).read_text()
      line = source[: source.index(code)].count("\n") + 1
      if file.endswith(ends):
        yield file, [(line, name, source.replace(code, mistake))]
    return
  for room in ("training", "data"):
    for path in sorted(ROOT.glob(f"aromni_jax/{room}/*.py")):
      file = str(path.relative_to(ROOT))
      changes = list(mutants(path.read_text())) if file.endswith(ends) else []
      if flags.limit and flags.limit < len(changes):
        changes = sorted(random.Random(flags.seed).sample(changes, flags.limit))
      if changes:
        yield file, changes


def try_one(file, line, what, text, *, tree, results, known) -> dict:
  """Returns the result of one change, from `results` if it was tried before."""
  key = hashlib.sha256(f"{file}\n{text}".encode()).hexdigest()[:12]
  if key not in known:
    start, source = time.monotonic(), (tree / file).read_text()
    for test in nearest(file):
      limit = 60 + 5 * seconds_unchanged(test, tree)
      (tree / file).write_text(text)
      outcome, name = run(test, tree, limit)
      (tree / file).write_text(source)
      if outcome != "passed":
        break
    known[key] = {"id": key, "file": file, "line": line, "what": what, "outcome": outcome}
    known[key] |= {"test": name, "seconds": round(time.monotonic() - start, 1)}
    with open(results, "a") as out:
      out.write(json.dumps(known[key]) + "\n")
  result = known[key]
  found = {"passed": "SURVIVES", "failed": result["test"], "timeout": "timeout"}[result["outcome"]]
  print(f"{file}:{line}  {what}  {found}", flush=True)
  return result


@functools.cache
def seconds_unchanged(test: str, tree: pathlib.Path) -> float:
  """Returns how long a test file takes without a change; its programs are compiled afterwards."""
  start = time.monotonic()
  outcome, name = run(test, tree, 3600)
  if outcome != "passed":
    sys.exit(f"{name or test} fails without a change; see {tree.parent}/pytest.log")
  return time.monotonic() - start


if __name__ == "__main__":
  main()
