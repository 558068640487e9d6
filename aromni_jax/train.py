"""Trains a decoder.

  aromni train --config=configs/demo.py --workdir=DIR [--config.model.num_layers=2 ...]

The same command goes on from the newest checkpoint of --workdir. The trained model directory is
DIR/model, losses are in DIR/metrics.jsonl and DIR/tensorboard.

A run of several processes (hosts) has the same command in each, with --coordinator=auto where JAX
finds the others itself (TPU pod, SLURM, GKE), else with --coordinator=HOST:PORT of the first one,
--num_processes and --process_id. They share --workdir. docs/running.md says what happens when one
of them dies, hangs or is preempted. Exit status: 0 done; 42, or 128 and more: start the same
command again; 1: an error that would come again.
"""

import time

_BEGAN = time.monotonic()  # before the imports that take seconds

from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from aromni_jax import logs  # noqa: E402
from aromni_jax.cluster import agreement, watch  # noqa: E402
from aromni_jax.training.config import TrainConfig, to_dataclass  # noqa: E402


def define_flags(values: flags.FlagValues = flags.FLAGS, sys_argv: list[str] | None = None) -> None:
  """Defines the job's flags. The launcher reads training lines with them, too.

  Args:
    values: where they are defined.
    sys_argv: words that name configuration fields; the program's own if None.
  """
  into = {"flag_values": values}
  config_flags.DEFINE_config_file(
    "config",
    None,
    "Configuration file, with :argument if it takes one.",
    lock_config=True,
    sys_argv=sys_argv,
    **into,
  )
  flags.DEFINE_string("workdir", None, "Folder of the run; made if it does not exist.", **into)
  flags.DEFINE_string(
    "profile_steps",
    None,
    "START:STOP, steps whose profile is written to WORKDIR/profile.",
    **into,
  )
  flags.DEFINE_string(
    "coordinator",
    None,
    "Joins several processes to one run: auto, or HOST:PORT of the first.",
    **into,
  )
  flags.DEFINE_integer("num_processes", None, "How many, with HOST:PORT.", **into)
  flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", **into)
  flags.DEFINE_integer(
    "join_timeout", 300, "Seconds that processes wait for each other at the start.", **into
  )
  flags.DEFINE_integer(
    "host_timeout",
    60,
    "Seconds without a sign of life after which a process is given up.",
    **into,
  )


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  given = flags.FLAGS
  with logs.clear_errors(), watch.ending_together():
    agreement.join(
      given.coordinator,
      given.num_processes,
      given.process_id,
      join_timeout=given.join_timeout,
      host_timeout=given.host_timeout,
    )
    from aromni_jax.training import loop

    config = to_dataclass(TrainConfig, given.config.to_dict())
    logging.info("Training %d parameters.", config.model.num_params())
    loop.train(config, given.workdir, profile_steps=given.profile_steps, began=_BEGAN)


def run() -> None:
  define_flags()
  logs.setup()
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)


if __name__ == "__main__":
  run()
