"""Orbax checkpoints of a run (state, data position, configuration) and of bare parameters."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp


class Checkpoints:
  """The checkpoints of one run; saving is asynchronous, a torn save is never the newest.

  Args:
    workdir: folder of the run.
    keep: how many are kept.

  Raises:
    ValueError: if the folder cannot be written.
  """

  def __init__(self, workdir: str, keep: int = 2):
    directory = pathlib.Path(workdir).absolute() / "checkpoints"
    try:
      directory.mkdir(parents=True, exist_ok=True)
    except OSError as e:
      raise ValueError(f"--workdir {workdir} cannot be written: {e}") from e
    options = ocp.CheckpointManagerOptions(max_to_keep=keep)
    self._manager = ocp.CheckpointManager(directory, options=options)
    self.directory = directory

  @property
  def latest_step(self) -> int | None:
    """Step of the newest whole checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, data: dict[str, Any], config: dict[str, Any]) -> None:
    """Starts saving; returns once the arrays are copied."""
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=ocp.args.JsonSave(data),
        config=ocp.args.JsonSave(config),
      ),
    )

  def restore(self, abstract_state: Any, config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the newest state, placed as `abstract_state` says, and the data position.

    Args:
      abstract_state: shapes, dtypes and shardings.
      config: the configuration of this run.

    Raises:
      ValueError: if the model section or the optimizer differs from the checkpoint's, naming the
        fields.
    """
    step = self.latest_step
    saved = self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
    _check_same_model(saved["config"]["model"], config["model"], self.directory)
    was, now = (c["optimizer"]["name"] for c in (saved["config"], config))
    if was != now:
      raise ValueError(
        f"the checkpoint in {self.directory} has the state of optimizer.name {was}, not {now}. Use "
        "it, or another --workdir"
      )
    out = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()
      ),
    )
    return out["state"], out["data"]

  def close(self) -> None:
    """Waits for the last save."""
    self._manager.wait_until_finished()
    self._manager.close()


def _check_same_model(saved: dict[str, Any], ours: dict[str, Any], directory: Any) -> None:
  # How a model is computed may change between runs; what it is may not.
  free = {"remat_policy", "scan_layers", "attention", "dtype", "init_std"}
  names = sorted(saved.keys() | ours.keys())
  changed = [n for n in names if n not in free and saved.get(n) != ours.get(n)]
  if changed:
    fields = ", ".join(f"model.{n} is {ours.get(n)}, was {saved.get(n)}" for n in changed)
    raise ValueError(
      f"the checkpoint in {directory} is of another model: {fields}. Use its configuration, or "
      "another --workdir"
    )


def save_params(directory: str | pathlib.Path, params: dict, dtype: str | None = None) -> None:
  """Writes nested dicts of arrays; the directory appears only once it is whole.

  Args:
    directory: is replaced if it exists.
    params: nested dicts of arrays.
    dtype: floating-point arrays are stored in it if given, e.g. "bfloat16".
  """
  if dtype is not None:
    params = jax.tree.map(
      lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params
    )
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(pathlib.Path(directory).absolute(), params, force=True)


def load_params(directory: str | pathlib.Path) -> dict:
  """Returns the nested dicts as NumPy arrays, float32 where they were stored in bfloat16.

  Raises:
    FileNotFoundError: if there is no such checkpoint.
    ValueError: if it cannot be read.
  """
  directory = pathlib.Path(directory).absolute()
  if not directory.is_dir():
    raise FileNotFoundError(f"{directory} does not exist; expected an Orbax checkpoint")
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      metadata = checkpointer.metadata(directory).item_metadata.tree
      args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
      params = checkpointer.restore(directory, restore_args=args)
  except Exception as e:
    raise ValueError(f"{directory} is not a whole Orbax checkpoint: {e}") from e
  return jax.tree.map(
    lambda x: x.astype(np.float32) if x.dtype == jnp.bfloat16 else np.asarray(x), params
  )
