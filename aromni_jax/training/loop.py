"""The training loop: batches in, steps, metrics, evaluations and checkpoints out."""

import contextlib
import dataclasses
import json
import pathlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

# No public name yet; `jax.make_array_from_process_local_data` places rows by it.
from jax._src.sharding_impls import NonUniformShardingError, get_process_index_and_count
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from aromni_jax import model_dir
from aromni_jax.cluster import agreement, watch
from aromni_jax.data.pipeline import DataConfig, TrainIterator, make_train_iterator
from aromni_jax.evaluation.samples import write_samples
from aromni_jax.model import load_model
from aromni_jax.models import decoder as decoder_lib
from aromni_jax.models import sharding
from aromni_jax.training import profiling
from aromni_jax.training import step as step_lib
from aromni_jax.training import writer as metrics_lib
from aromni_jax.training.checkpoint import Checkpoints
from aromni_jax.training.config import TrainConfig
from aromni_jax.training.goodput import Goodput
from aromni_jax.training.optimizer import learning_rate, make_optimizer


def train(
  config: TrainConfig,
  workdir: str,
  *,
  profile_steps: str | None = None,
  began: float | None = None,
) -> nnx.Module:
  """Trains (or goes on training) a decoder, writes it to `workdir/model` and returns it.

  A run goes on from its newest checkpoint: state, data position and step are restored, so that
  it equals an unbroken run (with `max_minutes`, the learning rate follows the clock instead).

  Args:
    config: the run.
    workdir: checkpoints, metrics and the trained model directory go here.
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
  base = load_model(config.base, decoder=False)
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
  _check_batch(config, mesh)
  goodput = Goodput(workdir if jax.process_index() == 0 else None, began)
  watchdog = watch.Watchdog(config.step_timeout, config.phase_timeout)
  with contextlib.closing(watchdog), jax.set_mesh(mesh):
    return _Run(config, workdir, base, mesh, goodput, watchdog, window).run()


class _Run:
  """State of one call of `train`."""

  def __init__(self, config, workdir, base, mesh, goodput, watchdog, window):
    self.config, self.workdir, self.base, self.mesh = config, workdir, base, mesh
    self.goodput, self.watchdog, self.window = goodput, watchdog, window
    self.done = 0  # steps
    self.known: set[tuple[int, str]] = set()  # figures that need not be made again, by step
    image_codec = base.needed("image_codec")
    table = np.asarray(model_dir.perceptual_table(base.path, image_codec))
    placement = sharding.table_sharding(mesh)
    self.table = jax.make_array_from_callback(table.shape, placement, lambda part: table[part])
    optimizer = make_optimizer(config.optimizer)
    abstract = nnx.eval_shape(lambda: decoder_lib.Decoder(config.model, rngs=nnx.Rngs(0)))
    self.step_config = step_lib.StepConfig(
      nnx.graphdef(abstract), base.vocabulary, config.loss, optimizer, config.accumulate
    )

    def init(key):
      state = step_lib.init_state(config.model, optimizer, self.table.shape[1], key)
      std = config.code_embedding_std
      if std:
        speech = base.needed("speech_codec").codebook[...]
        image = image_codec.quantize.embedding[...]
        codebooks = {base.vocabulary.image: image, base.vocabulary.speech: speech}
        key = jax.random.fold_in(key, 1)
        state = step_lib.embed_codebooks(state, codebooks, std, config.model.init_std, key)
      return state

    key = jax.random.key(config.seed)
    self.abstract = jax.eval_shape(init, key)
    self.shardings = sharding.state_shardings(self.abstract, mesh)
    self.init = jax.jit(init, out_shardings=self.shardings)
    self.step_fn = step_lib.make_train_step(self.step_config, mesh, self.shardings)
    self.eval_fn = jax.jit(lambda *args: step_lib.evaluate(*args, self.step_config))
    self.rows = sharding.batch_sharding(mesh)
    self.reader, self.readers = _reader(self.rows)

  def run(self) -> nnx.Module:
    data = self._iterator(self.config.data)
    checkpoints = Checkpoints(self.workdir, self.config.checkpoints_kept)
    with self._doing("restore" if checkpoints.latest_step is not None else "initialisation"):
      state, self.done = self._start(checkpoints, data)
      jax.block_until_ready(state)
    writer = metrics_lib.Writer(self.workdir, self.done)
    self.goodput.begin(self.done)
    profiler = profiling.Profiler(self.window, f"{self.workdir}/profile", self.done)
    try:
      with self._doing("step"):
        state, preempted = self._steps(state, data, checkpoints, writer, profiler)
    finally:
      profiler.close()
      with self._doing("checkpoint"):
        checkpoints.close()  # a save that has begun is finished, whatever happened
    if not preempted:
      with self._doing("export"):
        decoder = self._decoder(state)
        path = f"{self.workdir}/model"
        model_dir.export(path, self.base.path, decoder, self.config.export_dtype)
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
    clock = _Clock(config, start, self.goodput)
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
        state, metrics = self.step_fn(state, batch, self.table, jnp.float32(rate))
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
      self.base.vocabulary,
      batch_size=self.config.batch_size,
      process_index=self.reader,
      process_count=self.readers,
      codecs=self.base.fingerprints,
    )

  def _start(self, checkpoints: Checkpoints, data: TrainIterator) -> tuple[Any, int]:
    """The newest checkpoint, or the base model's decoder, or random parameters."""
    abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      self.abstract,
      self.shardings,
    )
    checkpoints.check_space(abstract)
    if checkpoints.latest_step is not None:
      state, position = checkpoints.restore(abstract, self._saved_config())
      data.set_state(position)
      logging.info("Going on from step %d of %s.", int(state.step), checkpoints.directory)
      return state, int(state.step)
    state = self.init(jax.random.key(self.config.seed))
    if self.config.init_from_base:
      _check_same_function(self.config, self.base.path)
      decoder = model_dir.load_decoder_state(
        self.base.path, abstract.params["decoder"], "config.model"
      )
      state = dataclasses.replace(state, params=state.params | {"decoder": decoder})
    return state, 0

  def _place(self, batch):
    """The processes' rows -> one array over all devices."""
    shape = (self.config.batch_size, self.config.data.sequence_length)
    return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(self.rows, x, shape), batch
    )

  def _saved_config(self) -> dict[str, Any]:
    return dataclasses.asdict(self.config)

  def _decoder(self, state) -> nnx.Module:
    return nnx.merge(self.step_config.graphdef, state.params["decoder"])

  def _report(self, step: int, metrics: Any, clock: "_Clock", writer: metrics_lib.Writer) -> None:
    """Checks and notes the metrics of a step; writes them at every `log_every`th."""
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
    if not np.isfinite([values["loss"], values["grad_norm"]]).all():
      raise FloatingPointError(
        f"the loss is {values['loss']} at step {step}, the norm of its gradient "
        f"{values['grad_norm']}; nothing was saved after it. Lower "
        "config.optimizer.learning_rate, or go on from the last checkpoint with other data"
      )
    self.watchdog.note(step, "step")
    self.watchdog.first_step_is_done()
    clock.count(values["tokens"])
    if step % self.config.log_every:
      return
    speed = clock.speed(step)
    flops = self.config.model.flops_per_token(self.config.data.sequence_length)
    peak = metrics_lib.peak_flops()
    if peak:
      speed["mfu"] = speed["tokens_per_second"] * flops / peak
    values = {k: v for k, v in values.items() if v or not k.startswith(("task/", "modality/"))}
    self.goodput.record(step)
    memory, shares = metrics_lib.memory(), self.goodput.shares()
    writer.write(step, values | speed | memory | shares)
    logging.info(
      "step %d (%.0f %%) loss %.4f, text %.3f image %.3f speech %.3f, rate %.2e, norm %.2f, "
      "%.0f tokens/s, %.3f s/step, data wait %.0f %%%s%s, goodput %.0f %%",
      *(step, 100 * clock.progress(step), values["loss"]),
      *(values.get(f"modality/{m}", 0.0) for m in ("text", "image", "speech")),
      *(values["learning_rate"], values["grad_norm"], speed["tokens_per_second"]),
      *(speed["step_seconds"], 100 * speed["data_wait"]),
      f", MFU {100 * speed['mfu']:.0f} %" if "mfu" in speed else "",
      f", HBM {memory['memory/peak_gib']:.1f} GiB" if "memory/peak_gib" in memory else "",
      100 * shares["goodput"],
    )

  def _figures(self, writer: metrics_lib.Writer) -> set[tuple[int, str]]:
    """What the first process has written of the step that the run goes on from."""
    names = json.loads(agreement.gather("figures", json.dumps(sorted(writer.names)))[0])
    return {(self.done, name) for name in names}

  def _look(self, state: Any, writer: metrics_lib.Writer, final: bool = False) -> None:
    """The evaluation and the samples that are due after the last step and not known yet."""
    config = self.config
    evaluates = config.eval_batches and (final or self._every(config.eval_every))
    if evaluates and (self.done, "validation/loss") not in self.known:
      with self._doing("evaluation"):
        writer.write(self.done, self._evaluate(state))
      self.known.add((self.done, "validation/loss"))
    if self._every(config.sample_every) and (self.done, "samples") not in self.known:
      with self._doing("samples"):
        self._sample(state, writer)
      writer.write(self.done, {"samples": 1.0})  # a mark: they are there
      self.known.add((self.done, "samples"))

  def _sample(self, state: Any, writer: metrics_lib.Writer) -> None:
    """Process 0 draws and speaks, on one device: a few rows cannot be spread over the mesh."""
    everywhere = NamedSharding(self.mesh, PartitionSpec())
    params = jax.jit(lambda x: x, out_shardings=everywhere)(state.params["decoder"])
    if jax.process_index() != 0:
      return
    params = jax.tree.map(lambda x: x.addressable_data(0), params)
    decoder = nnx.merge(self.step_config.graphdef, params)
    with jax.set_mesh(sharding.make_mesh(1, 1, 1, devices=jax.local_devices()[:1])):
      write_samples(self.done, dataclasses.replace(self.base, decoder=decoder), writer)

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
      out = self.eval_fn(state.params, self._place(next(data)), self.table)
      total = out if total is None else jax.tree.map(jnp.add, total, out)
    values = jax.device_get(step_lib.summarise(*total, self.config.loss))
    logging.info("validation loss %.4f", values["loss"])
    return {f"validation/{k}": float(v) for k, v in values.items() if k != "tokens"}


def _check_same_function(config: TrainConfig, base: pathlib.Path) -> None:
  """Raises ValueError if the base's decoder is missing, or would compute another function here.

  Shapes are checked when they are loaded; these fields do not show in them.
  """
  try:
    theirs = model_dir.decoder_config(base)
  except FileNotFoundError as e:
    raise ValueError(f"config.init_from_base: {e}") from e
  for field in ("norm_placement", "norm_eps", "rope_theta"):
    was, now = getattr(theirs, field), getattr(config.model, field)
    if was != now and not (field == "norm_placement" and config.change_norm_placement):
      hint = ", or set config.change_norm_placement" if field == "norm_placement" else ""
      raise ValueError(
        f"config.model.{field} is {now}, but the decoder of {base} has {was}: the same parameters "
        f"would compute another function. Set --config.model.{field}={was}{hint}"
      )


class _Clock:
  """Progress and speed of a run."""

  def __init__(self, config: TrainConfig, step: int, goodput: Goodput):
    self._config, self._began, self._goodput = config, time.monotonic(), goodput
    self._start = self._step = step
    self._tokens, self._since, self._waited = 0.0, *self._seconds()

  def progress(self, step: int) -> float:
    """Share of the run that is done, by steps or, with `max_minutes`, by the clock if that is more.

    The clock starts after the first step, which compiles.
    """
    done = step / self._config.num_steps
    if not self._config.max_minutes:
      return done
    if step <= self._start + 1:
      self._began = time.monotonic()
    return max(done, (time.monotonic() - self._began) / (60 * self._config.max_minutes))

  def count(self, tokens: float) -> None:
    self._tokens += tokens

  def speed(self, step: int) -> dict[str, float]:
    """Real tokens per second, seconds of a step and share of waiting for data since the last call,
    without compiling, saves, evaluations and the like."""
    steps, waited = self._seconds()
    spent = max(steps - self._since, 1e-9)
    out = {
      "tokens_per_second": self._tokens / spent,
      "step_seconds": spent / max(step - self._step, 1),
      "data_wait": (waited - self._waited) / spent,
    }
    self._tokens, self._step, self._since, self._waited = 0.0, step, steps, waited
    return out

  def _seconds(self) -> tuple[float, float]:
    """In steps, and of these waiting for data."""
    seconds = self._goodput.seconds
    return seconds("step", "data_wait"), seconds("data_wait")


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


def _reader(rows: NamedSharding) -> tuple[int, int]:
  """Returns which part of a batch this process reads, and how many parts there are.

  Processes whose devices share rows (config.mesh.tensor beyond one of them) read the same part.

  Raises:
    ValueError: if processes share some of their rows, but not all.
  """
  try:
    return get_process_index_and_count(rows, 0, 2)
  except NonUniformShardingError as e:
    raise ValueError(
      f"config.mesh {dict(rows.mesh.shape)} gives processes parts of a batch that overlap: "
      "config.mesh.tensor must divide the devices of a process, or be a multiple of them"
    ) from e


def _check_batch(config: TrainConfig, mesh: jax.sharding.Mesh) -> None:
  """Raises ValueError if rows cannot be divided over micro-batches and devices."""
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  if config.batch_size % (shards * config.accumulate):
    raise ValueError(
      f"config.batch_size {config.batch_size} is not a multiple of {shards * config.accumulate}: "
      f"config.mesh.data {mesh.shape['data']} * config.mesh.fsdp {mesh.shape['fsdp']} * "
      f"config.accumulate {config.accumulate}. Change one of them"
    )
