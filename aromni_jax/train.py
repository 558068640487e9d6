"""Trains a decoder.

  aromni train --config=configs/demo.py --workdir=DIR [--config.model.num_layers=2 ...]

The same command goes on from the newest checkpoint of --workdir. The trained model directory is
DIR/model, losses are in DIR/metrics.jsonl and DIR/tensorboard.

A run of several processes (hosts) has the same command in each, with --coordinator=auto where JAX
finds the others itself (TPU pod, SLURM, GKE), else with --coordinator=HOST:PORT of the first one,
--num_processes and --process_id. They share --workdir.
"""

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from aromni_jax import logs
from aromni_jax.config import TrainConfig, to_dataclass

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Configuration file, with :argument if it takes one.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; made if it does not exist.")

_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "Joins several processes to one run: auto, or HOST:PORT of the first."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many, with HOST:PORT.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  with logs.clear_errors():
    _join_processes()
    from aromni_jax import train_loop  # after the processes have met: it starts the devices

    config = to_dataclass(TrainConfig, _CONFIG.value.to_dict())
    logging.info("Training %d parameters.", config.model.num_params())
    train_loop.train(config, _WORKDIR.value)


def _join_processes() -> None:
  if _COORDINATOR.value == "auto":
    jax.distributed.initialize()
  elif _COORDINATOR.value:
    if _NUM_PROCESSES.value is None or _PROCESS_ID.value is None:
      raise ValueError("--coordinator=HOST:PORT also needs --num_processes and --process_id")
    jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)


def run() -> None:
  logs.setup()
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)


if __name__ == "__main__":
  run()
