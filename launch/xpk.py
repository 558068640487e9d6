"""GKE through xpk, one or several slices of TPU.

xpk adds a folder to a base image, runs one command on every host, and restarts the job set. Our
folder is the packed working tree and `train.sh`, so that quoting and reasons live in a file.
"""

from aromni_jax.launch import shell, tpu
from aromni_jax.launch.job import File, Job, Option, Rendered, Target, whole

_OPTIONS = (
  Option("project", "Google Cloud project.", required=True),
  Option("zone", "Zone of the cluster, e.g. us-west4-a.", required=True),
  Option("cluster", "The cluster, made with xpk cluster create.", required=True),
  Option("image", "Base image; the package is installed on it when a pod starts.", "python:3.12"),
  Option("priority", "very-low | low | medium | high | very-high.", "medium"),
  Option("restarts", "How often the job set is restarted.", 100, kind=whole(0)),
  Option("grace", "Seconds from SIGTERM to the end of a pod, to save in.", 300, kind=whole(1)),
  Option("storage", "xpk storage that mounts the bucket at /mnt/BUCKET, or a file system."),
)

_TRAIN = """\
#!/usr/bin/env bash
# Runs on every host of the workload, in /app.
set -euo pipefail
python -m pip install --quiet --root-user-action=ignore -e '.[tpu]'
{exports}exec {training}
"""


def render(job: Job) -> Rendered:
  """Returns the script of a host, and the commands that pack the tree and create the workload.

  Raises:
    ValueError: if the topology is not one of TPU chips.
  """
  tpu.require_tpu(job.topology, "xpk")
  options, source = job.options, f"{job.folder}/source"
  train = _TRAIN.format(
    exports=shell.exports("tpu", job.topology.chip.name),
    training=shell.training("python", shell.mounted(job.arguments)[0]),
  )
  create = [
    *("xpk", "workload", "create", f"--workload={job.name}", f"--cluster={options.cluster}"),
    *(f"--project={options.project}", f"--zone={options.zone}"),
    f"--device-type={tpu.device_type(job.topology)}",
    f"--num-slices={job.topology.slices}",
    *(f"--base-docker-image={options.image}", f"--script-dir={source}"),
    f"--priority={options.priority}",
    # xpk restarts after the exit codes 42 and 127 to 255 (watch.RUN_AGAIN, signals), no others.
    f"--max-restarts={options.restarts}",
    f"--termination-grace-period-seconds={options.grace}",
  ]
  if options.storage:
    create.append(f"--storage={options.storage}")
  # exec, twice: xpk passes SIGTERM to the process of its command, which must be the training.
  create.append("--command=exec bash train.sh")
  archive = f"{job.folder}/source.tar"
  return Rendered(
    files=(File(f"{source}/train.sh", train),),
    commands=(shell.pack(archive), ("tar", "-xf", archive, "-C", source), tuple(create)),
    tools=("xpk",),
  )


TARGET = Target(
  about="a GKE cluster through xpk, one or several slices of TPU",
  options=_OPTIONS,
  render=render,
  packed=True,
  shared_by="storage",
  mounts=lambda options: bool(options.storage),
  mount_hint="attach it once (xpk storage attach NAME --type=gcsfuse --bucket={bucket} "
  "--mount-point=/mnt/{bucket} ...) and name it with --storage=NAME",
)
