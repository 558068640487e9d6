"""SLURM with GPUs: one task per GPU.

JAX reads SLURM's variables (--coordinator=auto) and then gives each process the one GPU of its
local rank, so a task per node would leave GPUs idle, and every task must see all GPUs of its node
(--gpus-per-node, not --gpus-per-task).
"""

import shlex
import sys

from aromni_jax.cluster import watch
from aromni_jax.launch import shell
from aromni_jax.launch.job import File, Job, Option, Rendered, Target, whole

_OPTIONS = (
  Option("partition", "Partition; by default the cluster's."),
  Option("account", "Account that is charged; by default the user's."),
  Option("time", "Time limit, as sbatch reads it; the run goes on in a next job.", "24:00:00"),
  Option("cpus-per-task", "CPU cores of a process.", 8, kind=whole(1)),
  Option("setup", "Shell line before the training, e.g. 'module load cuda'.", ""),
  Option("python", "Interpreter that the package is installed in.", sys.executable),
  Option(
    "restarts",
    "How often a crash is queued again; a lost node or a time limit always is.",
    3,
    kind=whole(0),
  ),
)

_BATCH = """\
#!/usr/bin/env bash
{directives}
# Two minutes before the time limit SLURM sends USR1 to this script alone (B:), which tells the
# training to save and leave, and queues the job again. It tells the tasks, not srun, which would
# kill them at once. TERM comes from scancel, which must end the job, and from a preemption, after
# which SLURM itself queues it again (--requeue).
# SOON is the number of seconds in which no training ends well: what leaves with {again} by then has
# hosts that do not find each other, for example, and counts as a crash.
set -euo pipefail
folder={folder}
limit=
{setup}{exports}{supervise}\
if [ "$code" != {again} ] && [ "$code" -lt 128 ]; then
  exit "$code"  # done, or an error that would come again
elif [ -n "$limit" ] || {{ [ "$code" = {again} ] && [ "$SECONDS" -ge "${{SOON:-900}}" ]; }}; then
  scontrol requeue "$SLURM_JOB_ID"
else
  echo "$code" >> "$folder/crashes-$SLURM_JOB_ID"
  crashes=$(wc -l < "$folder/crashes-$SLURM_JOB_ID")
  echo "ended with exit code $code, for the time $crashes of --restarts={restarts}" >&2
  if [ "$crashes" -le {restarts} ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
"""
_TELL = 'limit=yes; scancel --signal=TERM "$SLURM_JOB_ID"'  # the tasks: only --batch is the script


def render(job: Job) -> Rendered:
  """Returns the batch script and the sbatch command.

  Raises:
    ValueError: if the topology is not one of GPUs.
  """
  options, topology = job.options, job.topology
  if topology.chip.platform != "gpu":
    raise ValueError(
      f"--topology={topology.name} has no GPU, which --target=slurm needs; expected e.g. h100:8; "
      "TPUs run with --target=tpu_vm or --target=xpk"
    )
  gpus = topology.chips_per_slice
  directives = {
    "job-name": job.name,
    "nodes": topology.slices,
    "ntasks-per-node": gpus,
    "gpus-per-node": gpus,
    "cpus-per-task": options.cpus_per_task,
    "time": options.time,
    "partition": options.partition,
    "account": options.account,
    "output": f"{job.folder}/%j.log",
    "open-mode": "append",
    "signal": "B:USR1@120",
  }
  lines = [f"#SBATCH --{name}={value}" for name, value in directives.items() if value is not None]
  # Tasks end together by themselves, each with its own status; killed ones would not tell why.
  srun = ["srun", "--kill-on-bad-exit=0", "--wait=0", f"--output={job.folder}/%j-task%t.log"]
  srun = shlex.join([*srun, "--open-mode=append"])
  training = shell.training(options.python, job.arguments)
  batch = _BATCH.format(
    directives="\n".join([*lines, "#SBATCH --requeue"]),
    folder=shlex.quote(job.folder),
    setup=f"{options.setup}\n" if options.setup else "",
    exports=shell.exports("gpu"),
    supervise=shell.supervise(f"{srun} {training}", "USR1", _TELL),
    again=watch.RUN_AGAIN,
    restarts=options.restarts,
  )
  path = f"{job.folder}/train.sbatch"
  return Rendered(files=(File(path, batch),), commands=(("sbatch", path),), tools=("sbatch",))


TARGET = Target(
  about="GPU nodes of a SLURM cluster",
  options=_OPTIONS,
  render=render,
)
