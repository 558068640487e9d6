"""Orbax checkpoints of a run: state, data position, configuration."""

import dataclasses
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from aromni_jax.cluster import agreement
from aromni_jax.models.config import DecoderConfig


class Checkpoints:
  """The checkpoints of one run, in WORKDIR/checkpoints/STEP; all processes call it alike.

  Saving is asynchronous. A checkpoint appears under its name only once it is whole (Orbax renames
  its folder), and older ones are deleted only then. So a save that is killed or finds the disk full
  leaves the newest whole one in use; what it had written is removed at the next start. A save that
  fails ends the run with an error, at the next call of `check`, `save` or `close`: training on
  without checkpoints would put more at stake every step, and nothing is lost by starting again once
  there is room.

  A checkpoint that was damaged afterwards shows when it is read: `restore` then goes on from the
  one before. Missing and shortened files show; a flipped bit in an array does not, since neither
  zarr nor OCDBT has a checksum of it.

  There are no copies on the hosts' own disks. Orbax's emergency manager, which is experimental,
  keeps them only where slices hold the whole state (mesh.data over slices), and for all of these
  but the first; it is not wired here.

  Args:
    workdir: folder of the run, which `agreement.check_workdir` has tried from every process.
    keep: how many are kept; one more is there while it is written.

  Raises:
    ValueError: if the folder cannot be made, or is an address.
  """

  def __init__(self, workdir: str, keep: int = 2):
    self.directory = epath.Path(agreement.local_folder(workdir).absolute()) / "checkpoints"
    self._keep = keep
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
    except OSError as e:
      raise ValueError(f"--workdir {workdir} cannot be written: {e}") from e
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      cleanup_tmp_directories=True,
      single_host_load_and_broadcast=True,  # all processes see the steps that process 0 sees
    )
    self._manager = ocp.CheckpointManager(self.directory, options=options)
    self._saving: tuple[int, int, int | None] | None = None  # step, its bytes, the newest before

  def check_space(self, abstract_state: Any) -> None:
    """Makes sure that the checkpoints of a run fit, before it starts.

    Args:
      abstract_state: shapes and dtypes of the state.

    Raises:
      ValueError: if `keep` + 1 checkpoints do not fit beside what else is there.
    """
    free = shutil.disk_usage(self.directory).free
    size = _num_bytes(abstract_state)
    needed = (self._keep + 1 - min(self._keep, len(self._manager.all_steps()))) * size
    if not _all_agree(free >= needed):
      raise ValueError(
        f"{self.directory} has {free / 1e9:.2f} GB free, but {needed / 1e9:.2f} GB more are "
        f"needed: a checkpoint takes up to {size / 1e9:.2f} GB, and with config.checkpoints_kept "
        f"{self._keep} one more is written before the oldest is deleted. Make room, lower "
        "config.checkpoints_kept, or use another --workdir"
      )

  @property
  def latest_step(self) -> int | None:
    """Step of the newest checkpoint, whole or being written, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, data: dict[str, Any], config: dict[str, Any]) -> None:
    """Starts saving; returns once the arrays are copied, so the state may be donated.

    Waits for the save before, if that is still being written.

    Raises:
      OSError: if this save cannot begin, or the one before has failed.
    """
    self._finish()
    self._saving = step, _num_bytes(state), self.latest_step
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          data=ocp.args.JsonSave(data),
          config=ocp.args.JsonSave(config),
        ),
      )
    except Exception as e:
      raise self._not_written(e) from e

  def check(self) -> None:
    """Raises OSError if the save in the background has failed; does not wait. For every step."""
    if self._saving is not None and not self._manager.is_saving_in_progress():
      self._finish()

  def _finish(self) -> None:
    """Waits for the save in the background."""
    if self._saving is None:
      return
    try:
      self._manager.wait_until_finished()
    except Exception as e:
      raise self._not_written(e) from e
    self._saving = None

  def _not_written(self, cause: Exception) -> OSError:
    (step, size, before), self._saving = self._saving, None
    free = shutil.disk_usage(self.directory).free
    again = (
      "There is no earlier one"
      if before is None
      else f"The checkpoint of step {before} is whole: the same command goes on from it"
    )
    return OSError(
      f"the checkpoint of step {step} could not be written to {self.directory}: it takes up to "
      f"{size / 1e9:.2f} GB; {free / 1e9:.2f} GB are free there. {again}. Reason: {_brief(cause)}"
    )

  def restore(self, abstract_state: Any, config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the newest state that can be read, placed as `abstract_state` says, and the data
    position.

    A checkpoint with missing or damaged files is set aside as STEP.damaged, with a warning that
    says what is wrong, if an older one can be read. Processes decide so together.

    Args:
      abstract_state: shapes, dtypes and shardings.
      config: the configuration of this run.

    Raises:
      ValueError: if the model section or the optimizer differs from the checkpoint's, naming the
        fields; or if no checkpoint can be read.
    """
    damaged: dict[int, str] = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      info = self._read(step, damaged, self._read_info)
      if info is None:
        continue
      self._check_same_run(info["config"], config)
      state = self._read(step, damaged, self._read_state, abstract_state)
      if state is None:
        continue
      if damaged:
        self._set_aside(damaged, step)
      return state, info["data"]
    found = "".join(f"\n  step {step}: {problem}" for step, problem in damaged.items())
    raise ValueError(
      f"no checkpoint in {self.directory} can be read:{found or ' there is none'}\nRestore the "
      "files, or start anew in another --workdir"
    )

  def _read(self, step: int, damaged: dict[int, str], read: Callable, *args: Any) -> Any:
    """Returns what a reader finds; None, and a line in `damaged`, if a process cannot read it.

    Nothing here may wait for other processes, since they may have failed.
    """
    found = problem = None
    try:
      found = read(self.directory / str(step), *args)
    except Exception as e:  # damage shows in many ways
      problem = _brief(e)
    if _all_agree(problem is None):
      return found
    damaged[step] = problem or "another process could not read it, see there"
    return None

  def _read_info(self, path: epath.Path) -> dict[str, Any]:
    handler = ocp.JsonCheckpointHandler()
    return {
      name: handler.restore(path / name, args=ocp.args.JsonRestore()) for name in ("config", "data")
    }

  def _read_state(self, path: epath.Path, abstract_state: Any) -> Any:
    # Runs of version 0.1 also have the optimizer's state of frozen parameters; it is left out.
    args = ocp.args.PyTreeRestore(
      item=abstract_state,
      restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state),
      partial_restore=True,
    )
    return ocp.PyTreeCheckpointHandler().restore(path / "state", args=args)

  def _check_same_run(self, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    _check_same_model(saved["model"], ours["model"], self.directory)
    was, now = saved["optimizer"]["name"], ours["optimizer"]["name"]
    if was != now:
      raise ValueError(
        f"the checkpoint in {self.directory} has the state of optimizer.name {was}, not {now}. Use "
        "it, or another --workdir"
      )

  def _set_aside(self, damaged: dict[int, str], good: int) -> None:
    """Renames damaged checkpoints, so that the run can save these steps again."""
    for step, problem in damaged.items():
      path = self.directory / str(step)
      logging.error(
        "CHECKPOINT DAMAGED: %s cannot be read; going on from step %d instead. The damaged one is "
        "now %s.damaged; rename it back if the reason was a passing one. Reason: %s",
        *(path, good, path, problem),
      )
      if jax.process_index() == 0:
        aside = path.parent / f"{step}.damaged"
        if aside.exists():
          aside.rmtree()
        path.rename(aside)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("checkpoints were set aside")
    self._manager.reload()

  def close(self) -> None:
    """Waits for the last save. Raises OSError if it failed."""
    try:
      self._finish()
    finally:
      self._manager.close()


def _brief(error: Exception) -> str:
  """Returns what the first error of a chain says, without TensorStore's long descriptions."""
  while error.__cause__ is not None:
    error = error.__cause__
  text = f"{type(error).__name__}: {error}".split(" [tensorstore_spec")[0]
  return text if len(text) < 500 else f"{text[:200]} ... {text[-250:]}"


def _num_bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _all_agree(ok: bool) -> bool:
  """Returns whether all processes say yes; every process must ask."""
  if jax.process_count() == 1:
    return ok
  return bool(multihost_utils.process_allgather(np.array([ok])).all())


def _check_same_model(saved: dict[str, Any], ours: dict[str, Any], directory: Any) -> None:
  # Models from before a field existed were computed as its default says.
  defaults = {field.name: field.default for field in dataclasses.fields(DecoderConfig)}
  # How a model is computed may change between runs; what it is may not.
  free = {"remat_policy", "scan_layers", "attention", "dtype", "init_std"}
  names = sorted(saved.keys() | ours.keys())
  was, now = ({n: values.get(n, defaults.get(n)) for n in names} for values in (saved, ours))
  changed = [n for n in names if n not in free and was[n] != now[n]]
  if changed:
    fields = ", ".join(f"model.{n} is {now[n]}, was {was[n]}" for n in changed)
    raise ValueError(
      f"the checkpoint in {directory} is of another model: {fields}. Use its configuration, or "
      "another --workdir"
    )
