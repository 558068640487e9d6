"""From `ml_collections.ConfigDict` (files, command line) to frozen dataclasses (the library)."""

import dataclasses

from aromni_jax.data.pipeline import DataConfig
from aromni_jax.fields import to_dataclass as to_dataclass
from aromni_jax.models.config import DecoderConfig
from aromni_jax.training.optimizer import OptimizerConfig
from aromni_jax.training.terms import LossConfig


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; one may be -1, "the rest"."""

  data: int = 1
  fsdp: int = -1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A whole training run; see configs/base.py for what each field means."""

  seed: int
  base: str
  init_from_base: bool
  change_norm_placement: bool
  code_embedding_std: float
  batch_size: int
  accumulate: int
  num_steps: int
  max_minutes: float
  log_every: int
  eval_every: int
  eval_batches: int
  checkpoint_every: int
  checkpoints_kept: int
  sample_every: int
  export_dtype: str
  step_timeout: float
  phase_timeout: float
  model: DecoderConfig
  data: DataConfig
  loss: LossConfig
  optimizer: OptimizerConfig
  mesh: MeshConfig

  def __post_init__(self):
    for name in ("batch_size", "accumulate", "num_steps", "log_every", "checkpoint_every"):
      if getattr(self, name) < 1:
        raise ValueError(f"config.{name} is {getattr(self, name)}; it must be at least 1")
    for name in ("step_timeout", "phase_timeout"):
      if getattr(self, name) < 0:
        raise ValueError(f"config.{name} is {getattr(self, name)}; it must be >= 0, 0 is any time")
    if self.batch_size % self.accumulate:
      raise ValueError(
        f"config.batch_size {self.batch_size} is not a multiple of config.accumulate "
        f"{self.accumulate}"
      )
    if self.model.max_segments and not 0 < self.data.max_samples < self.model.max_segments:
      raise ValueError(
        f"config.model.max_segments is {self.model.max_segments}, which promises that no row has "
        f"more samples and padding; config.data.max_samples is {self.data.max_samples}, but must "
        f"be 1 to {self.model.max_segments - 1} for that"
      )
    if self.data.code_noise and self.loss.perceptual_pairing == "own_position":
      raise ValueError(
        f"config.data.code_noise is {self.data.code_noise}, but "
        "config.loss.perceptual_pairing=own_position compares states with the codes that were "
        "read; set code_noise to 0 or the pairing to predicting"
      )
