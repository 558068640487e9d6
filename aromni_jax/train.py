"""Trains a decoder.

  aromni train --config=demo --workdir=DIR [--config.model.num_layers=2 ...]
  aromni train --config=mine.py --workdir=DIR

--config names a configuration of the package, with an argument in demo:tiny, or a file of your own;
--config.FIELD changes a field of it. The same command goes on from the newest checkpoint of
--workdir. The trained model directory is DIR/model, losses are in DIR/metrics.jsonl and
DIR/tensorboard.

A run of several processes (hosts) has the same command in each, with --coordinator=auto where JAX
finds the others itself (TPU pod, SLURM, GKE), else with --coordinator=HOST:PORT of the first one,
--num_processes and --process_id. They share --workdir. docs/running.md says what happens when one
of them dies, hangs or is preempted. Exit status: 0 done; 42, or 128 and more: start the same
command again; 1: an error that would come again.
"""

import time

_BEGAN = time.monotonic()  # before the imports that take seconds

from absl import flags, logging  # noqa: E402

from aromni_jax import compilation_cache, config_files, logs  # noqa: E402


def define_flags(values: flags.FlagValues = flags.FLAGS, sys_argv: list[str] | None = None) -> None:
  """Defines the job's flags. The launcher reads training lines with them, too.

  Args:
    values: where they are defined.
    sys_argv: words that name configuration fields; the program's own if None.
  """
  into = {"flag_values": values}
  config_files.define(values, sys_argv)
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
  del argv
  from aromni_jax.cluster import agreement, watch
  from aromni_jax.training.config import TrainConfig, to_dataclass

  given = flags.FLAGS
  compilation_cache.enable()
  with watch.ending_together():
    agreement.join(
      given.coordinator,
      given.num_processes,
      given.process_id,
      join_timeout=given.join_timeout,
      host_timeout=given.host_timeout,
    )
    from aromni_jax import model_dir
    from aromni_jax.evaluation.hooks import make_hooks
    from aromni_jax.training import loop

    config = to_dataclass(TrainConfig, given.config.to_dict())
    logging.info("Training %d parameters.", config.model.num_params())
    hooks = make_hooks(config)
    base = model_dir.open_base(config.base)
    loop.train(
      config, given.workdir, base, hooks=hooks, profile_steps=given.profile_steps, began=_BEGAN
    )


def run() -> None:
  define_flags()
  logs.run(main, required=["config", "workdir"])


if __name__ == "__main__":
  run()
