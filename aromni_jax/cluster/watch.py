"""Ends a process that no longer gets on: another one fell silent or failed, or nothing moves.

Processes of a run write a short line ("beat") into the key-value store of JAX's coordination
service, which process 0 holds, and read the others'. It says which step they are at, so whoever
ends first can name who is to blame. Without other processes only the watchdog is left.

Exit statuses tell a supervisor what to do: 0 is done, `RUN_AGAIN` (or 128 and more: killed by a
signal) is "start the same command again", 1 is an error that would come again.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import NoReturn

from absl import logging

# With 127 to 255 the statuses after which xpk restarts a workload by itself; not 1, which Python
# and absl leave with after an error of the user.
RUN_AGAIN = 42

_BEATS = "aromni_jax/beat/"

# How errors of JAX begin that no other process is to blame for: no memory, a wrong program.
_OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")


@dataclasses.dataclass
class _Beat:
  """What a process says of itself.

  Attributes:
    count: grows with every beat.
    host: name of its machine.
    step, activity: where it is.
    failure: why it is about to end, if it is.
    status: its exit status then.
    left: whether it has ended as it should.
  """

  count: int = 0
  host: str = dataclasses.field(default_factory=socket.gethostname)
  step: int = 0
  activity: str = "starting"
  failure: str = ""
  status: int = 0
  left: bool = False


class Peers:
  """The other processes of a run; two threads watch them until `leave`.

  Args:
    client: of JAX's coordination service.
    index, count: this process and how many there are.
    host_timeout: seconds without a beat after which a process is given up, and this one ends.
  """

  def __init__(self, client, index: int, count: int, host_timeout: float):
    self._client, self.index, self.count = client, index, count
    self.host_timeout = host_timeout
    self.interval = max(0.2, host_timeout / 10)
    self._mine, self._theirs = _Beat(), {}  # index -> (beat, when it changed)
    self._lock, self._stop = threading.Lock(), threading.Event()
    self._contact = 0  # exchanges that the coordinator has answered
    for name, target in (("beats", self._exchange), ("coordinator", self._watch_coordinator)):
      threading.Thread(target=target, name=f"aromni {name}", daemon=True).start()

  def note(self, step: int, activity: str) -> None:
    """Says where this process is."""
    self._mine.step, self._mine.activity = step, activity

  def describe(self) -> str:
    """Returns who was last seen where, those behind first; 8 of them at most."""
    seen = {self.index: self._mine} | {i: beat for i, (beat, _) in self._theirs.items()}
    order = sorted(seen, key=lambda i: (seen[i].step, i))
    lines = [
      f"process {i} ({seen[i].host}) at step {seen[i].step}, {seen[i].activity}" for i in order[:8]
    ]
    more = f", and {len(order) - 8} more" if len(order) > 8 else ""
    return "; ".join(lines) + more

  def fail(self, message: str, status: int) -> None:
    """Tells the others that this process is about to end, and gives them the time to read it."""
    self._stop.set()
    self._mine.failure, self._mine.status = message[:2000], status
    with contextlib.suppress(Exception):  # the service may be what is gone
      self._send()
    self.linger()

  def linger(self) -> None:
    """Waits in process 0, which holds the service, until the others have read what there is."""
    if self.index == 0:
      time.sleep(2 * self.interval + 1)

  def leave(self) -> None:
    """Ends the watch, at the end of a run."""
    self._stop.set()
    self._mine.left = True
    with contextlib.suppress(Exception):
      self._send()

  def _send(self) -> None:
    with self._lock:
      self._mine.count += 1
      value = json.dumps(dataclasses.asdict(self._mine))
      self._client.key_value_set(f"{_BEATS}{self.index}", value, allow_overwrite=True)

  def _exchange(self) -> None:
    began = time.monotonic()
    while not self._stop.is_set():
      try:
        self._send()
        found = self._client.key_value_dir_get(_BEATS)
      except Exception as e:  # the service is gone; JAX, or the other thread, ends the process
        logging.log_first_n(logging.WARNING, "The coordinator does not answer: %s", 1, e)
      else:
        self._contact += 1
        self._judge(found, began)
      self._stop.wait(self.interval)

  def _judge(self, found: list[tuple[str, str]], began: float) -> None:
    """Ends this process if another one failed or has been silent for too long."""
    now, silent = time.monotonic(), []
    for key, value in found:
      index, beat = int(key.rsplit("/", 1)[1]), _Beat(**json.loads(value))
      last = self._theirs.get(index)
      if index != self.index and (last is None or last[0].count != beat.count):
        self._theirs[index] = (beat, now)
    for index in set(range(self.count)) - {self.index}:
      beat, changed = self._theirs.get(index, (None, began))
      if beat is not None and beat.failure and not self._stop.is_set():
        self._stop.set()
        end(f"process {index} ({beat.host}) failed: {beat.failure}", beat.status, self)
      if now - changed > self.host_timeout and not (beat is not None and beat.left):
        where = (
          f"last seen on {beat.host} at step {beat.step}, {beat.activity}" if beat else "never"
        )
        silent.append(f"process {index} ({where})")
    if silent and not self._stop.is_set():
      self._stop.set()
      end(
        f"nothing was heard for {self.host_timeout:g} s of {', '.join(silent[:8])}: it died, was "
        "stopped, or cannot be reached; see its log. The same command goes on from the last "
        "checkpoint",
        RUN_AGAIN,
        self,
      )

  def _watch_coordinator(self) -> None:
    """Ends this process if an exchange hangs. Counts the seconds that it lives itself, so that a
    process that was stopped for a while does not blame process 0."""
    silent, last = 0.0, self._contact
    while not self._stop.wait(1.0):
      silent, last = (silent + 1.0 if last == self._contact else 0.0), self._contact
      if silent > self.host_timeout + self.interval:
        self._stop.set()
        end(
          f"process 0, which holds the coordinator, has not answered for {silent:.0f} s: it died, "
          f"was stopped, or cannot be reached; see its log. Last seen: {self.describe()}. The same "
          "command goes on from the last checkpoint",
          RUN_AGAIN,
          self,
        )


class Watchdog:
  """Ends the process if a step, or whatever else it does, takes too long.

  Args:
    step_timeout: seconds that a step may take, once the first one is done; 0 is any time.
    phase_timeout: seconds that anything else may take; 0 is any time.

  Attributes:
    activity: what is being done.
  """

  def __init__(self, step_timeout: float, phase_timeout: float):
    self._limits = step_timeout, phase_timeout
    self._moved, self._step, self.activity = time.monotonic(), 0, "starting"
    self._warm = False
    self._stop = threading.Event()
    if step_timeout or phase_timeout:
      threading.Thread(target=self._watch, name="aromni watchdog", daemon=True).start()

  def note(self, step: int, activity: str) -> None:
    """Says that something has moved: `activity` begins or goes on after `step` steps."""
    self._step, self.activity, self._moved = step, activity, time.monotonic()
    if _peers is not None:
      _peers.note(step, activity)

  def first_step_is_done(self) -> None:
    """From now on steps have their own limit: nothing is compiled any more."""
    self._warm = True

  def close(self) -> None:
    self._stop.set()

  def _watch(self) -> None:
    while not self._stop.wait(0.5):
      in_step = self._warm and self.activity == "step"
      limit = self._limits[0 if in_step else 1]
      if limit and time.monotonic() - self._moved > limit:
        field = "config.step_timeout" if in_step else "config.phase_timeout"
        where = f" Last seen: {_peers.describe()}." if _peers else ""
        message = (
          f"nothing has moved for {limit:g} s ({field}) in activity {self.activity!r} after step "
          f"{self._step}: a device, another process or storage hangs.{where} The stacks of all "
          "threads are above. The same command goes on from the last checkpoint"
        )
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        if _peers is not None:
          _peers.fail(message, RUN_AGAIN)
        _exit(message, RUN_AGAIN)


_peers: Peers | None = None


def start(client, index: int, count: int, host_timeout: float) -> None:
  """Begins to watch the other processes."""
  global _peers
  _peers = Peers(client, index, count, host_timeout)


def end(message: str, status: int, peers: Peers) -> NoReturn:
  """Ends the process at once for a reason that the others know, or will find out, themselves."""
  print(f"error: {message}", file=sys.stderr, flush=True)
  peers.linger()
  _exit("", status)


def _exit(message: str, status: int) -> NoReturn:
  """Leaves without the handlers of Python and JAX, which wait for processes that are gone."""
  if message:
    print(f"error: {message}", file=sys.stderr, flush=True)
  logging.flush()
  sys.stdout.flush()
  os._exit(status)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Makes an error of one process end all of them, each with a message that names it.

  An error of the user (as `logs.clear_errors` knows them) has status 1. A failed collective is
  what the death of another process looks like, so the watch has time to say which.
  """
  try:
    yield
  except SystemExit:  # after a preemption, which all processes leave by
    if _peers is not None:
      _peers.leave()
    raise
  except (Exception, KeyboardInterrupt) as e:
    if _peers is None:
      raise
    import jax  # here: launchers need this module's exit codes alone

    if isinstance(e, jax.errors.JaxRuntimeError) and not str(e).startswith(_OWN_FAULTS):
      print(f"An operation over all processes failed: {e}", file=sys.stderr, flush=True)
      time.sleep(_peers.host_timeout + 3 * _peers.interval + 2)
      traceback.print_exc()
      _peers.fail(f"{type(e).__name__}: {e}", RUN_AGAIN)
      _exit("an operation over all processes failed, though all of them are there", RUN_AGAIN)
    message = str(e)
    if not isinstance(e, (ValueError, OSError, ImportError, FloatingPointError)):
      traceback.print_exc()
      message = f"{type(e).__name__}: {e}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    _peers.fail(message, 1)
    _exit("", 1)
  if _peers is not None:
    _peers.leave()
