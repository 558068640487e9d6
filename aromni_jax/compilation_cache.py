"""Keeps compiled programs on disk for the next process: JAX's persistent compilation cache.

AROMNI_CACHE=off keeps none; AROMNI_CACHE=FOLDER keeps them there instead of in $XDG_CACHE_HOME or
~/.cache. JAX_COMPILATION_CACHE_DIR, if it is set, is left to JAX. The folder may be deleted at any
time.
"""

import hashlib
import os
import pathlib
import platform
import stat
import tempfile

from absl import logging

VARIABLE = "AROMNI_CACHE"
LIMIT = 1 << 30  # bytes; a demo's training, evaluation and answers are about 30 MB


def enable() -> pathlib.Path | None:
  """Turns the cache on for this process, before anything is compiled.

  Returns:
    its folder, or None if it is off or cannot be written.
  """
  wanted = os.environ.get(VARIABLE, "")
  if wanted == "off" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return None
  folder = (pathlib.Path(wanted).expanduser() if wanted else _default()) / _machine()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
    _shrink(folder, LIMIT)
  except OSError as e:
    logging.warning(
      "Compiled programs are not kept: %s. %s=FOLDER keeps them there, off ends this warning.",
      *(e, VARIABLE),
    )
    return None
  import jax

  jax.config.update("jax_compilation_cache_dir", str(folder))
  # Small programs, too: there are dozens.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  return folder


def _default() -> pathlib.Path:
  home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return pathlib.Path(home) / "aromni_jax"


def _machine() -> str:
  """Returns a name of this type of machine: programs for a CPU hold its instructions, and a home
  may be shared by machines of several types."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    words = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
  except OSError:  # not Linux
    words = {platform.processor()}
  digest = hashlib.sha256("\n".join(sorted(words)).encode()).hexdigest()
  return f"{platform.machine()}-{digest[:12]}"


def _shrink(folder: pathlib.Path, limit: int) -> None:
  """Removes the oldest programs of a folder that holds more bytes than its limit, to half of it."""
  files = []
  for file in folder.rglob("*"):
    try:
      status = file.stat()
    except FileNotFoundError:  # another process does the same
      continue
    if stat.S_ISREG(status.st_mode):
      files.append((status.st_mtime, status.st_size, file))
  total = sum(size for _, size, _ in files)
  if total <= limit:
    return
  for _, size, file in sorted(files):
    file.unlink(missing_ok=True)
    total -= size
    if total <= limit // 2:
      return
