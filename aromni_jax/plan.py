"""Tells what a training run needs before anything is booked.

  aromni plan --config=pretrain_7b --topology=v5e:16x16
  aromni plan --config=pretrain_7b:v5p:4x4x8 --topology=v5p:4x4x8 --compile

Memory of a chip by part, how parameters are split, collectives, the roofline of a step, and how
long the run takes. --topology is CHIP:SHAPE of a TPU slice, COUNTxCHIP:SHAPE of several, CHIP:COUNT
of GPUs. --compile asks the TPU compiler instead of reckoning (needs libtpu: pip install
'aromni_jax[tpu]', no TPU): minutes. A run that does not fit is refused, with what would.
"""

import json
import pathlib

from absl import flags

from aromni_jax import config_files, logs

config_files.define()
_TOPOLOGY = flags.DEFINE_string("topology", None, "Chips, e.g. v5e:16x16, 2xv5e:16x16, h100:8.")
_COMPILE = flags.DEFINE_bool("compile", False, "Asks the TPU compiler: minutes.")
_JSON = flags.DEFINE_string("json", "", "Also writes all figures to this file.")
_HLO = flags.DEFINE_string("hlo", "", "With --compile, writes the compiled program to this file.")


def main(argv: list[str]) -> None:
  del argv
  import jax

  from aromni_jax.cluster.hardware import parse_topology
  from aromni_jax.planning import compiled, estimate, report
  from aromni_jax.training.config import TrainConfig, to_dataclass

  jax.config.update("jax_platforms", "cpu")  # nothing is computed
  config = to_dataclass(TrainConfig, flags.FLAGS.config.to_dict())
  topology = parse_topology(_TOPOLOGY.value)
  if _COMPILE.value and topology.chip.platform != "tpu":
    raise ValueError(f"--compile is for TPUs; {topology.name} is estimated only")
  found = estimate.estimate(config, topology)
  step = None
  print(report.estimated(config, found))
  if not _COMPILE.value:
    estimate.require_fit(config, found)
  else:
    print("\nCompiling: some minutes.", flush=True)
    step = compiled.compile_step(config, topology)
    print(report.compiled(config, found, step))
  if _HLO.value and step:
    pathlib.Path(_HLO.value).write_text(step.text)
  if _JSON.value:
    figures = report.figures(config, found, step)
    pathlib.Path(_JSON.value).write_text(json.dumps(figures, indent=1))


def run() -> None:
  logs.run(main, required=["config", "topology"])


if __name__ == "__main__":
  run()
