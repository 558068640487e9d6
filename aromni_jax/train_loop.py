"""The training loop: batches in, steps, metrics, evaluations and checkpoints out."""

import dataclasses
import pathlib
import signal
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from aromni_jax import metrics as metrics_lib
from aromni_jax import model_dir, sharding
from aromni_jax import train_step as step_lib
from aromni_jax.checkpoint import Checkpoints
from aromni_jax.config import TrainConfig
from aromni_jax.data.pipeline import DataConfig, TrainIterator, make_train_iterator
from aromni_jax.models import decoder as decoder_lib
from aromni_jax.optimizer import learning_rate, make_optimizer
from aromni_jax.samples import write_samples


def train(config: TrainConfig, workdir: str) -> nnx.Module:
  """Trains (or goes on training) a decoder, writes it to `workdir/model` and returns it.

  A run goes on from its newest checkpoint: state, data position and step are restored, so that
  it equals an unbroken run (with `max_minutes`, the learning rate follows the clock instead).

  Args:
    config: the run.
    workdir: checkpoints, metrics and the trained model directory go here.

  Raises:
    FloatingPointError: if the loss stops being finite; nothing is saved from then on.
    ValueError, FileNotFoundError: for wrong input, see the parts.
  """
  base = model_dir.load_model(config.base, decoder=False)
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
  with jax.set_mesh(mesh):
    return _Run(config, workdir, base, mesh).run()


class _Run:
  """State of one call of `train`."""

  def __init__(self, config, workdir, base, mesh):
    self.config, self.workdir, self.base, self.mesh = config, workdir, base, mesh
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

  def run(self) -> nnx.Module:
    data = self._iterator(self.config.data)
    checkpoints = Checkpoints(self.workdir, self.config.checkpoints_kept)
    state, step = self._start(checkpoints, data)
    writer = metrics_lib.Writer(self.workdir, step)
    try:
      state, step, stopped = self._steps(state, step, data, checkpoints, writer)
    finally:
      checkpoints.close()  # a save that has begun is finished, whatever happened
    if stopped:
      logging.info("SIGTERM: saved step %d and left; the same command goes on from it.", step)
      raise SystemExit(0)
    if self.config.eval_batches:
      writer.write(step, self._evaluate(state))
    writer.close()
    decoder = self._decoder(state)
    model_dir.export(f"{self.workdir}/model", self.base.path, decoder, self.config.export_dtype)
    logging.info("Wrote the model directory %s/model.", self.workdir)
    return decoder

  def _steps(self, state, step, data, checkpoints, writer) -> tuple[Any, int, bool]:
    """All steps from `step` on; returns the state, the step, and whether SIGTERM ended them."""
    config = self.config
    stop = _stop_on_sigterm()
    clock = _Clock(config, step)
    pending = None  # metrics of the step before, fetched while the next one runs
    while clock.progress(step) < 1.0 and not stop.is_set():
      batch = self._place(next(data))
      rate = learning_rate(config.optimizer, step, clock.progress(step))
      state, metrics = self.step_fn(state, batch, self.table, jnp.float32(rate))
      step += 1
      checkpoints.check()
      if pending is not None:
        self._report(*pending, clock, writer)
      pending = step, metrics
      if step % config.checkpoint_every == 0 or step % config.log_every == 0:
        self._report(*pending, clock, writer)
        pending = None
      if step % config.checkpoint_every == 0:
        checkpoints.save(step, state, data.get_state(), self._saved_config())
      if config.eval_every and step % config.eval_every == 0:
        writer.write(step, self._evaluate(state))
      if config.sample_every and step % config.sample_every == 0:
        model = dataclasses.replace(self.base, decoder=self._decoder(state))
        write_samples(step, model, writer)
    if pending is not None:
      self._report(*pending, clock, writer)
    if checkpoints.latest_step != step:
      checkpoints.save(step, state, data.get_state(), self._saved_config())
    return state, step, stop.is_set()

  def _iterator(self, config: DataConfig) -> TrainIterator:
    return make_train_iterator(
      config,
      self.base.vocabulary,
      batch_size=self.config.batch_size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
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
    clock.count(values["tokens"])
    if step % self.config.log_every:
      return
    speed = clock.speed()
    flops = self.config.model.flops_per_token(self.config.data.sequence_length)
    peak = metrics_lib.peak_flops()
    if peak:
      speed["mfu"] = speed["tokens_per_second"] * flops / peak
    values = {k: v for k, v in values.items() if v or not k.startswith(("task/", "modality/"))}
    writer.write(step, values | speed)
    logging.info(
      "step %d (%.0f %%) loss %.4f, text %.3f image %.3f speech %.3f, rate %.2e, norm %.2f, "
      "%.0f tokens/s",
      *(step, 100 * clock.progress(step), values["loss"]),
      *(values.get(f"modality/{m}", 0.0) for m in ("text", "image", "speech")),
      *(values["learning_rate"], values["grad_norm"], speed["tokens_per_second"]),
    )

  def _evaluate(self, state) -> dict[str, float]:
    """Means over the first batches of the validation split, whose samples are whole and clean."""
    clean = dataclasses.replace(
      self.config.data, split="validation", drop_prompt=0.0, code_noise=0.0
    )
    data, total = self._iterator(clean), None
    for _ in range(self.config.eval_batches):
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

  def __init__(self, config: TrainConfig, step: int):
    self._config, self._began = config, time.time()
    self._start = step
    self._tokens, self._since = 0.0, time.time()

  def progress(self, step: int) -> float:
    """Share of the run that is done, by steps or, with `max_minutes`, by the clock if that is more.

    The clock starts after the first step, which compiles.
    """
    done = step / self._config.num_steps
    if not self._config.max_minutes:
      return done
    if step <= self._start + 1:
      self._began = time.time()
    return max(done, (time.time() - self._began) / (60 * self._config.max_minutes))

  def count(self, tokens: float) -> None:
    self._tokens += tokens

  def speed(self) -> dict[str, float]:
    """Real tokens per second since the last call."""
    now = time.time()
    out = {"tokens_per_second": self._tokens / max(now - self._since, 1e-9)}
    self._tokens, self._since = 0.0, now
    return out


def _stop_on_sigterm() -> threading.Event:
  """Returns an event that SIGTERM sets; outside the main thread nothing can be caught."""
  stop = threading.Event()
  if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
  return stop
