"""Trains a decoder.

  aromni train --config=configs/demo.py --workdir=DIR [--config.model.num_layers=2 ...]

The same command goes on from the newest checkpoint of --workdir. The trained model directory is
DIR/model, losses are in DIR/metrics.jsonl and DIR/tensorboard.
"""

from absl import app, flags, logging
from ml_collections import config_flags

from aromni_jax import logs
from aromni_jax.config import TrainConfig, to_dataclass

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Configuration file, with :argument if it takes one.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; made if it does not exist.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  from aromni_jax import train_loop  # after the flags: it starts the devices

  with logs.clear_errors():
    config = to_dataclass(TrainConfig, _CONFIG.value.to_dict())
    logging.info("Training %d parameters.", config.model.num_params())
    train_loop.train(config, _WORKDIR.value)


def run() -> None:
  logs.setup()
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)


if __name__ == "__main__":
  run()
