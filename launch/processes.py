"""Runs a training in several processes of this machine, the same way as on several hosts.

  python -m aromni_jax.launch.processes --processes=2 --logs=runs/launch/demo -- \
    --config=demo --workdir=runs/demo

Each process writes process-N.log in --logs, and its lines appear here after [N]. If one is killed,
or leaves with 42, the others are ended too, and all start again, up to --restarts times; the
training goes on from its checkpoint. Any other status is an error that would come again. SIGTERM
and Ctrl-C are passed on: the training saves and leaves.
"""

import argparse
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

from aromni_jax.cluster import watch

_GRACE = 10.0  # seconds from SIGTERM to SIGKILL for those whose peer has died
_LOOK = 0.1  # seconds between looks at the processes


def run(command, count: int, logs: pathlib.Path, restarts: int) -> int:
  """Runs processes until all have ended normally; returns an exit code.

  Args:
    command: function of the coordinator's address and the process number that returns an argv.
    count: how many processes.
    logs: folder of their logs; made if it does not exist.
    restarts: how often all are started again after `watch.RUN_AGAIN` or a kill.

  Returns:
    0 or the first exit code that is not (128 + signal for a killed process).
  """
  logs.mkdir(parents=True, exist_ok=True)
  stopped = threading.Event()
  numbers = (signal.SIGTERM, signal.SIGINT)
  handlers = [signal.signal(number, lambda *_: stopped.set()) for number in numbers]
  try:
    for attempt in range(restarts + 1):
      address = f"localhost:{_free_port()}"
      code = _attempt([command(address, i) for i in range(count)], logs, stopped)
      if stopped.is_set() or not (code == watch.RUN_AGAIN or code >= 128):
        return code
      left = restarts - attempt
      print(f"== ended with exit code {code}; {left} restarts left", flush=True)
    return code
  finally:
    for number, handler in zip(numbers, handlers, strict=True):
      signal.signal(number, handler)


def _attempt(commands, logs, stopped) -> int:
  """Runs each command once, all at the same time; returns the first exit code that is not 0."""
  processes = [_start(argv) for argv in commands]
  readers = [
    threading.Thread(target=_copy, args=(p, i, logs / f"process-{i}.log"))
    for i, p in enumerate(processes)
  ]
  for reader in readers:
    reader.start()
  code, deadline, told = 0, None, False
  while None in (codes := [p.poll() for p in processes]):
    if stopped.is_set() and not told:
      told = True
      _signal(processes, signal.SIGTERM)  # all of them are there to save: no deadline
    bad = [code for code in codes if code and not (told and code == watch.RUN_AGAIN)]
    if bad and deadline is None:
      code, deadline = bad[0], time.monotonic() + _GRACE
      _signal(processes, signal.SIGTERM)
    if deadline and time.monotonic() > deadline:
      _signal(processes, signal.SIGKILL)
    time.sleep(_LOOK)
  for reader in readers:
    reader.join()
  code = code or next((code for code in codes if code), 0)
  return 128 - code if code < 0 else code


def _start(argv) -> subprocess.Popen:
  # A session of its own: Ctrl-C reaches the processes only through us.
  return subprocess.Popen(
    argv,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    errors="replace",
    start_new_session=True,
  )


def _copy(process: subprocess.Popen, number: int, log: pathlib.Path) -> None:
  with log.open("a") as file:
    for line in process.stdout:
      file.write(line)
      file.flush()
      sys.stdout.write(f"[{number}] {line}")
      sys.stdout.flush()


def _signal(processes, number: int) -> None:
  for process in processes:
    if process.poll() is None:
      process.send_signal(number)


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m aromni_jax.launch.processes",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--processes", type=int, default=1, help="How many processes.")
  parser.add_argument("--logs", required=True, help="Folder of the logs.")
  parser.add_argument("--restarts", type=int, default=0, help="Restarts after 42 or a kill.")
  at = argv.index("--") if "--" in argv else len(argv)
  options, line = parser.parse_args(argv[:at]), argv[at + 1 :]

  def command(address: str, number: int) -> list[str]:
    joins = [f"--coordinator={address}", f"--num_processes={options.processes}"]
    joins = [*joins, f"--process_id={number}"] if options.processes > 1 else []
    return [sys.executable, "-m", "aromni_jax.train", *line, *joins]

  return run(command, options.processes, pathlib.Path(options.logs), options.restarts)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
