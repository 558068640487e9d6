"""The training loop: batches in, steps, metrics, evaluations and checkpoints out."""

import contextlib
import dataclasses
import json
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

# No public name yet; `jax.make_array_from_process_local_data` places rows by it.
from jax.experimental import multihost_utils

from aromni_jax.cluster import agreement, watch
from aromni_jax.data.pipeline import DataConfig, TrainIterator, make_train_iterator
from aromni_jax.models import sharding
from aromni_jax.training import profiling, reporting
from aromni_jax.training import setup as setup_lib
from aromni_jax.training import step as step_lib
from aromni_jax.training.checkpoint import Checkpoints
from aromni_jax.training.config import TrainConfig
from aromni_jax.training.goodput import Goodput
from aromni_jax.training.optimizer import learning_rate
from aromni_jax.training.reporting import Clock
from aromni_jax.training.setup import Setup
from aromni_jax.training.writer import Writer

if TYPE_CHECKING:  # how models are stored is no matter of the loop
  from aromni_jax.model_dir import Base


@dataclasses.dataclass(frozen=True)
class Hook:
  """Something that looks at the model while it trains; the job hands it in.

  Attributes:
    name: of it; a figure of this name marks in metrics.jsonl that it has looked after a step.
    every: steps between two looks; 0 is never.
    look: (step, decoder, writer) -> None. All processes call it alike; the decoder's parameters are
      split over the mesh as they are trained, and no mesh is set.
  """

  name: str
  every: int
  look: Callable[[int, nnx.Module, Writer], None]


def train(
  config: TrainConfig,
  workdir: str,
  base: "Base",
  *,
  hooks: Sequence[Hook] = (),
  profile_steps: str | None = None,
  began: float | None = None,
) -> nnx.Module:
  """Trains (or goes on training) a decoder, writes it to `workdir/model` and returns it.

  A run goes on from its newest checkpoint: state, data position and step are restored, so that
  it equals an unbroken run (with `max_minutes`, the learning rate follows the clock instead).

  Args:
    config: the run.
    workdir: checkpoints, metrics and the trained model directory go here.
    base: the model directory that it begins from, `model_dir.open_base(config.base)`.
    hooks: what looks at the model while it trains.
    profile_steps: START:STOP of the steps whose profile is written to `workdir/profile`.
    began: `time.monotonic()` when the process began, for the goodput; now by default.

  Raises:
    FloatingPointError: if the loss stops being finite; nothing is saved from then on.
    SystemExit: with `watch.RUN_AGAIN` after a preemption, when all is saved.
    ValueError, FileNotFoundError: for wrong input, see the parts.
  """
  window = profiling.parse_window(profile_steps, config.num_steps)
  agreement.agree(agreement.facts(config, pathlib.Path(config.data.shards) / "manifest.json"))
  agreement.check_workdir(workdir)
  if config.model.vocab_size != base.vocabulary.size:
    raise ValueError(
      f"config.model.vocab_size is {config.model.vocab_size}, but the vocabulary of {base.path} "
      f"has {base.vocabulary.size} ids"
    )
  if config.max_minutes and jax.process_count() > 1:
    raise ValueError(
      f"config.max_minutes is {config.max_minutes}, but the clocks of {jax.process_count()} "
      "processes differ; use config.num_steps"
    )
  mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
  setup_lib.check_rows(config, tuple(mesh.shape.values()), "this mesh")
  table = base.perceptual_table() if config.loss.perceptual_weight else None
  shape = None if table is None else table.shape
  setup = setup_lib.build(config, base.vocabulary, shape, mesh)
  goodput = Goodput(workdir if jax.process_index() == 0 else None, began)
  watchdog = watch.Watchdog(config.step_timeout, config.phase_timeout)
  with contextlib.closing(watchdog):
    return _Run(config, workdir, base, setup, table, hooks, goodput, watchdog).run(window)


class _Run:
  """State of one call of `train`."""

  def __init__(
    self,
    config: TrainConfig,
    workdir: str,
    base: "Base",
    setup: Setup,
    table: np.ndarray | None,
    hooks: Sequence[Hook],
    goodput: Goodput,
    watchdog: watch.Watchdog,
  ):
    self.config, self.workdir, self.base, self.setup = config, workdir, base, setup
    self.hooks, self.goodput, self.watchdog = hooks, goodput, watchdog
    self.done = 0  # steps
    self.known: set[tuple[int, str]] = set()  # figures that need not be made again, by step
    self.table = None
    if setup.table is not None:
      self.table = jax.make_array_from_callback(
        table.shape, setup.table.sharding, lambda part: table[part]
      )
    self.rows = setup.batch.tokens.sharding
    self.reader, self.readers = sharding.reader_of(self.rows)

  def run(self, window: profiling.Window | None) -> nnx.Module:
    data = self._iterator(self.config.data)
    checkpoints = Checkpoints(self.workdir, self.config.checkpoints_kept)
    with self._doing("restore" if checkpoints.latest_step is not None else "initialisation"):
      state, self.done = self._start(checkpoints, data)
      jax.block_until_ready(state)
    writer = Writer(self.workdir, self.done)
    self.goodput.begin(self.done)
    profiler = profiling.Profiler(window, f"{self.workdir}/profile", self.done)
    try:
      with self._doing("step"):
        state, preempted = self._steps(state, data, checkpoints, writer, profiler)
    finally:
      profiler.close()
      with self._doing("checkpoint"):
        checkpoints.close()  # a save that has begun is finished, whatever happened
    decoder = self.setup.decoder(state.params)
    if not preempted:
      with self._doing("export"):
        path = f"{self.workdir}/model"
        self.base.export(path, decoder, self.config.export_dtype)
      logging.info("Wrote the model directory %s.", path)
    self.goodput.record(self.done, "preempted" if preempted else "finished")
    writer.close()
    logging.info("%s", self.goodput.table())
    if preempted:
      logging.info("Preempted: saved step %d; the same command goes on from it.", self.done)
      raise SystemExit(watch.RUN_AGAIN)
    return decoder

  def _steps(self, state, data, checkpoints, writer, profiler) -> tuple[Any, bool]:
    """All steps that are left; returns the state, and whether a preemption ended them."""
    config, start = self.config, self.done
    preemption = _Preemption()
    self.known = self._figures(writer)
    clock = Clock(config, start, self.goodput)
    # A run that was killed between a checkpoint and what was due after it makes up for that.
    self._look(state, writer)
    pending = None  # metrics of the step before, fetched while the next one runs
    preempted = False
    while clock.progress(self.done) < 1.0 and not (preempted := preemption.reached(self.done)):
      batch = self._next(data, pending)
      rate = learning_rate(config.optimizer, self.done, clock.progress(self.done))
      profiler.before(self.done + 1)
      trace = jax.profiler.StepTraceAnnotation("train", step_num=self.done + 1)
      with self._doing("compile" if self.done == start else "step"), trace:
        state, metrics = self.setup.step(state, batch, self.table, jnp.float32(rate))
      self.done += 1
      checkpoints.check()
      with self._doing("profile"):
        profiler.after(self.done, metrics)
      if pending is not None:
        self._report(*pending, clock, writer)
      pending = self.done, metrics
      save = self.done % config.checkpoint_every == 0
      if save or self.done % config.log_every == 0:
        self._report(*pending, clock, writer)
        pending = None
      if save:
        self._save(checkpoints, state, data)
      self._look(state, writer)
    if pending is not None:
      self._report(*pending, clock, writer)
    if checkpoints.latest_step != self.done:
      self._save(checkpoints, state, data)
    if not preempted:
      self._look(state, writer, final=True)
    return state, preempted

  @contextlib.contextmanager
  def _doing(self, activity: str) -> Iterator[None]:
    """Counts the time of an activity, and tells the watchdog that it begins and ends."""
    before = self.watchdog.activity
    self.watchdog.note(self.done, activity)
    with self.goodput.measure(activity):
      yield
    self.watchdog.note(self.done, before)

  def _next(self, data: TrainIterator, pending: tuple[int, Any] | None):
    """The next batch on the devices. What they waited for it is counted, at most."""
    began = time.monotonic()
    batch = self._place(next(data))
    if pending is None or pending[1]["loss"].is_ready():
      self.goodput.move(time.monotonic() - began, "data_wait")
    return batch

  def _save(self, checkpoints: Checkpoints, state: Any, data: TrainIterator) -> None:
    with self._doing("checkpoint"):
      checkpoints.save(self.done, state, data.get_state(), self._saved_config())
    self.goodput.record(self.done)

  def _iterator(self, config: DataConfig) -> TrainIterator:
    return make_train_iterator(
      config,
      self.setup.step_config.vocabulary,
      batch_size=self.config.batch_size,
      process_index=self.reader,
      process_count=self.readers,
      codecs=self.base.fingerprints,
    )

  def _start(self, checkpoints: Checkpoints, data: TrainIterator) -> tuple[Any, int]:
    """The newest checkpoint, or the base model's decoder, or random parameters."""
    abstract = self.setup.state
    checkpoints.check_space(abstract)
    if checkpoints.latest_step is not None:
      state, position = checkpoints.restore(abstract, self._saved_config())
      data.set_state(position)
      logging.info("Going on from step %d of %s.", int(state.step), checkpoints.directory)
      return state, int(state.step)
    codebooks = self.base.codebooks() if self.config.code_embedding_std else {}
    state = self.setup.init(jax.random.key(self.config.seed), codebooks)
    if self.config.init_from_base:
      _check_same_function(self.config, self.base)
      decoder = self.base.load_decoder(abstract.params["decoder"])
      state = dataclasses.replace(state, params=state.params | {"decoder": decoder})
    return state, 0

  def _place(self, batch):
    """The processes' rows -> one array over all devices."""
    shape = self.setup.batch.tokens.shape
    return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(self.rows, x, shape), batch
    )

  def _saved_config(self) -> dict[str, Any]:
    return dataclasses.asdict(self.config)

  def _report(self, step: int, metrics: Any, clock: Clock, writer: Writer) -> None:
    """Checks and counts the metrics of a step; writes them at every `log_every`th."""
    values = reporting.fetch(step, metrics)
    self.watchdog.note(step, "step")
    self.watchdog.first_step_is_done()
    clock.count(values["tokens"])
    if step % self.config.log_every == 0:
      reporting.write_line(self.config, step, values, clock, self.goodput, writer)

  def _figures(self, writer: Writer) -> set[tuple[int, str]]:
    """What the first process has written of the step that the run goes on from."""
    names = json.loads(agreement.gather("figures", json.dumps(sorted(writer.names)))[0])
    return {(self.done, name) for name in names}

  def _look(self, state: Any, writer: Writer, final: bool = False) -> None:
    """The validation loss and the hooks that are due after the last step and not known yet."""
    config = self.config
    evaluates = config.eval_batches and (final or self._every(config.eval_every))
    if evaluates and (self.done, "validation/loss") not in self.known:
      with self._doing("evaluation"):
        writer.write(self.done, self._evaluate(state))
      self.known.add((self.done, "validation/loss"))
    for hook in self.hooks:
      if self._every(hook.every) and (self.done, hook.name) not in self.known:
        with self._doing("samples"):
          hook.look(self.done, self.setup.decoder(state.params), writer)
        writer.write(self.done, {hook.name: 1.0})  # a mark: it has looked
        self.known.add((self.done, hook.name))

  def _every(self, steps: int) -> bool:
    return bool(steps and self.done and self.done % steps == 0)

  def _evaluate(self, state) -> dict[str, float]:
    """Means over the first batches of the validation split, whose samples are whole and clean."""
    clean = dataclasses.replace(
      self.config.data, split="validation", drop_prompt=0.0, code_noise=0.0
    )
    data, total = self._iterator(clean), None
    for _ in range(self.config.eval_batches):
      self.watchdog.note(self.done, "evaluation")
      out = self.setup.evaluate(state.params, self._place(next(data)), self.table)
      total = out if total is None else jax.tree.map(jnp.add, total, out)
    values = jax.device_get(step_lib.summarise(*total, self.config.loss))
    logging.info("validation loss %.4f", values["loss"])
    return {f"validation/{k}": float(v) for k, v in values.items() if k != "tokens"}


def _check_same_function(config: TrainConfig, base: "Base") -> None:
  """Raises ValueError if the base's decoder is missing, or would compute another function here.

  Shapes are checked when they are loaded; these fields do not show in them.
  """
  try:
    theirs = base.decoder_config()
  except FileNotFoundError as e:
    raise ValueError(f"config.init_from_base: {e}") from e
  for field in ("norm_placement", "norm_eps", "rope_theta"):
    was, now = getattr(theirs, field), getattr(config.model, field)
    if was != now and not (field == "norm_placement" and config.change_norm_placement):
      hint = ", or set config.change_norm_placement" if field == "norm_placement" else ""
      raise ValueError(
        f"config.model.{field} is {now}, but the decoder of {base.path} has {was}: the same "
        f"parameters would compute another function. Set --config.model.{field}={was}{hint}"
      )


class _Preemption:
  """Whether the run was told to leave, by SIGTERM to any of its processes.

  With several processes JAX catches the signal, and all agree on the next step that none has passed
  yet; a handler of our own would take the signal away from it.
  """

  def __init__(self):
    self._told = threading.Event()
    alone = not jax.distributed.is_initialized()
    # Outside the main thread nothing can be caught.
    if alone and threading.current_thread() is threading.main_thread():
      signal.signal(signal.SIGTERM, lambda *_: self._told.set())

  def reached(self, step: int) -> bool:
    """Whether to save and leave after `step` steps; called after every step, in all processes."""
    return multihost_utils.reached_preemption_sync_point(step) or self._told.is_set()
