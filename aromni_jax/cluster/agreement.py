"""Joins the processes of a run, and lets them compare notes before anything is computed.

Messages go through the coordination service that `jax.distributed` starts in process 0, see
`compat.coordination`.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import logging

import aromni_jax
from aromni_jax import compat
from aromni_jax.cluster import watch

_calls: Counter[str] = Counter()  # how often a name was used, the same in all processes
_timeout = 300.0  # seconds that processes wait for each other, see `join`


def join(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  *,
  join_timeout: int,
  host_timeout: int,
) -> None:
  """Joins this process to the others of the run, and begins to watch them.

  Args:
    coordinator: "auto", HOST:PORT of process 0, or None for a run of one process.
    num_processes, process_id: how many, and which one this is; found by JAX with "auto".
    join_timeout: seconds to wait for the others.
    host_timeout: seconds without a sign of life after which a process is given up.

  Raises:
    ValueError: for flags that do not fit, naming them. A process that cannot reach the others ends
      with status `watch.RUN_AGAIN`: they may only be late.
  """
  global _timeout
  _timeout = float(join_timeout)
  if not coordinator:
    if num_processes is not None or process_id is not None:
      raise ValueError("--num_processes and --process_id need --coordinator=HOST:PORT")
    return
  for flag, value in (("join_timeout", join_timeout), ("host_timeout", host_timeout)):
    if value < 1:
      raise ValueError(f"--{flag} is {value}; it must be at least 1 second")
  address = {}
  if coordinator != "auto":
    _check_address(coordinator, num_processes, process_id)
    address = {
      "coordinator_address": coordinator,
      "num_processes": num_processes,
      "process_id": process_id,
    }
  with _deadline(coordinator, process_id, num_processes, join_timeout):
    try:
      # JAX aborts without a word at its own limits, so ours come first.
      jax.distributed.initialize(
        **address,
        initialization_timeout=join_timeout + 60,
        heartbeat_timeout_seconds=host_timeout + 60,
        shutdown_timeout_seconds=host_timeout + 60,
      )
    except ValueError as e:
      if coordinator == "auto":
        raise ValueError(
          f"--coordinator=auto: JAX finds no cluster here ({e}); expected a TPU pod, SLURM, Open "
          "MPI or GKE. Give --coordinator=HOST:PORT, --num_processes and --process_id"
        ) from e
      raise
  state = compat.coordination()
  watch.start(state.client, state.process_id, state.num_processes, host_timeout)
  logging.info("Process %d of %d has joined.", state.process_id, state.num_processes)


def _check_address(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
  if num_processes is None or process_id is None:
    raise ValueError("--coordinator=HOST:PORT also needs --num_processes and --process_id")
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 65536:
    raise ValueError(f"--coordinator is {coordinator!r}; expected auto or HOST:PORT of process 0")
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f"--process_id is {process_id}, with --num_processes={num_processes}; expected 0 to "
      f"{num_processes - 1}"
    )
  if process_id == 0:
    with socket.socket() as s:
      s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      try:
        s.bind(("", int(port)))
      except OSError as e:
        raise ValueError(
          f"--coordinator={coordinator}: port {port} of this machine cannot be had ({e}); end what "
          "uses it, or take another port in all processes"
        ) from e


@contextlib.contextmanager
def _deadline(
  coordinator: str, process_id: int | None, num_processes: int | None, seconds: int
) -> Iterator[None]:
  """Ends the process if the others are not there in time; JAX itself would abort it."""

  def give_up():
    if process_id == 0:
      what = (
        f"not all of --num_processes={num_processes} processes came to this one; see their logs"
      )
    elif coordinator == "auto":
      what = "the others did not come; see their logs"
    else:
      what = (
        f"{_reach(coordinator)}; check that process 0 runs there, and that no firewall is between"
      )
    print(
      f"error: --coordinator={coordinator}: no run after {seconds} s (--join_timeout): {what}",
      file=sys.stderr,
      flush=True,
    )
    os._exit(watch.RUN_AGAIN)

  timer = threading.Timer(seconds, give_up)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _reach(address: str) -> str:
  host, _, port = address.rpartition(":")
  try:
    socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
  except OSError as e:
    return f"{address} cannot be reached ({e})"
  return f"{address} answers, but not all processes have joined it"


def gather(name: str, value: str) -> list[str]:
  """Returns what every process has given, by process; all of them must call it.

  Args:
    name: of what is gathered, the same in all.
    value: of this process.

  Raises:
    TimeoutError: if not all have come after `--join_timeout`.
  """
  state = compat.coordination()
  if state.client is None:
    return [value]
  _calls[name] += 1
  folder = f"aromni_jax/{name}/{_calls[name]}/"
  state.client.key_value_set(f"{folder}{state.process_id}", value)
  try:
    state.client.wait_at_barrier(folder, int(1000 * _timeout))
  except jax.errors.JaxRuntimeError as e:
    if "DEADLINE_EXCEEDED" not in str(e):
      raise
    raise TimeoutError(f"not all processes came to {name!r} in {_timeout:g} s: {e}") from e
  found = {int(k.rsplit("/", 1)[1]): v for k, v in state.client.key_value_dir_get(folder)}
  return [found[i] for i in range(state.num_processes)]


def facts(config: Any, manifest: pathlib.Path) -> dict[str, str]:
  """Returns what must be the same in all processes, by name.

  Args:
    config: the resolved configuration, a dataclass.
    manifest: file that describes the data.
  """
  out = dict(_flatten(dataclasses.asdict(config), "config"))
  out["python"] = ".".join(map(str, sys.version_info[:2]))
  for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
    out[f"{package} version"] = importlib.metadata.version(package)
  out["aromni_jax"] = f"{aromni_jax.__version__}, source files {_source_hash()}"
  out[str(manifest)] = _hash(manifest.read_bytes()) if manifest.is_file() else "missing"
  for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
    flags = os.environ.get(name, "").split()
    out[name] = " ".join(sorted(f for f in flags if not f.startswith("--xla_dump")))
  return out


def agree(mine: Mapping[str, str]) -> None:
  """Compares the facts of all processes.

  Raises:
    ValueError: in all of them if they differ, naming processes and facts.
  """
  values = gather("facts", _hash(json.dumps(mine, sort_keys=True).encode()))
  differ = [i for i, value in enumerate(values) if value != values[0]]
  if not differ:
    return
  chosen = [0, *differ[:3]]
  index = compat.coordination().process_id
  whole = gather("differing facts", json.dumps(mine) if index in chosen else "")
  first = json.loads(whole[0])
  lines = []
  for i in chosen[1:]:
    other = json.loads(whole[i])
    names = [n for n in sorted(first.keys() | other.keys()) if first.get(n) != other.get(n)]
    lines += [f"{n} is {other.get(n)!r} in process {i}, {first.get(n)!r} in 0" for n in names[:5]]
  more = f"; {len(differ) - 3} more processes differ" if len(differ) > 3 else ""
  raise ValueError(
    f"the processes of this run differ: {'; '.join(lines)}{more}. Start all of them with the same "
    "command, code and packages"
  )


def local_folder(workdir: str) -> pathlib.Path:
  """Returns the folder of a run. Raises ValueError if it is the address of a bucket."""
  if "://" in workdir:
    raise ValueError(
      f"--workdir {workdir} is an address; expected a folder that all hosts share. Mount the "
      "bucket (gcsfuse; or use Filestore, NFS) and give its folder"
    )
  return pathlib.Path(workdir)


def check_workdir(workdir: str) -> None:
  """Writes a probe into the folder of the run, from every process, and deletes it.

  Raises:
    ValueError: in all processes, if one cannot write, or the folder is not the same for all.
  """
  folder, index = local_folder(workdir), compat.coordination().process_id
  nonce = gather("nonce", uuid.uuid4().hex)[0]
  mine, first = folder / f".probe-{nonce}-{index}", folder / f".probe-{nonce}-0"
  error = ""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    mine.write_text(nonce)
  except OSError as e:
    error = f"{socket.gethostname()}: {e}"
  try:
    _all_without("can write into it", error, f"--workdir {workdir} cannot be written")
    error = (
      "" if _reads(first, nonce) else f"{socket.gethostname()} does not see what process 0 wrote"
    )
    _all_without("see it", error, f"--workdir {workdir} is not one folder that all hosts share")
  finally:
    with contextlib.suppress(OSError):
      mine.unlink()


def _all_without(name: str, error: str, message: str) -> None:
  """Raises ValueError with the errors of all processes, if there are any."""
  found = [f"process {i} on {e}" for i, e in enumerate(gather(name, error)) if e]
  if found:
    more = f", and {len(found) - 4} more" if len(found) > 4 else ""
    raise ValueError(f"{message}: {'; '.join(found[:4])}{more}")


def _reads(path: pathlib.Path, text: str) -> bool:
  """Whether a file has a text; shared folders may show it some seconds late."""
  for wait in (0.0, 0.5, 1.5, 3.0):
    time.sleep(wait)
    with contextlib.suppress(OSError):
      if path.read_text() == text:
        return True
  return False


def _flatten(values: Mapping[str, Any], where: str) -> Iterator[tuple[str, str]]:
  for key, value in values.items():
    if isinstance(value, Mapping) and value:
      yield from _flatten(value, f"{where}.{key}")
    else:
      yield f"{where}.{key}", str(value)


def _source_hash() -> str:
  """Of the package's Python files: what runs, committed or not."""
  folder = pathlib.Path(aromni_jax.__file__).parent
  digest = hashlib.sha256()
  for path in sorted(folder.rglob("*.py")):
    digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
  return digest.hexdigest()[:12]


def _hash(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()[:16]
