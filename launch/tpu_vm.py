"""TPU VMs through queued resources of Google Cloud.

Two scripts: `tpu_vm.sh` runs here and books, installs, follows, restarts and releases; `worker.sh`
runs on every worker, where the training goes on if the connection is lost.
"""

import shlex

from aromni_jax.cluster import watch
from aromni_jax.launch import shell, tpu
from aromni_jax.launch.job import File, Job, Option, Rendered, Target, whole

_OPTIONS = (
  Option("project", "Google Cloud project.", required=True),
  Option("zone", "Zone, e.g. us-west4-a.", required=True),
  Option("runtime-version", "Software of the TPU VMs; by default the one for the chip."),
  Option("spot", "Books Spot VMs: cheaper, and may be preempted.", False),
  Option("reserved", "Books from the project's reservation.", False),
  Option("network", "Network of the VMs.", "default"),
  Option("restarts", "How often a crash is restarted; lost hosts always are.", 3, kind=whole(0)),
  Option("keep", "Keeps the VMs after the end; by default they are deleted.", False),
  Option("mounted", "Says that paths without gs:// are shared folders on every worker.", False),
)

_ERROR = 3  # what a worker's 1 becomes on its way through gcloud

_WORKER = """\
#!/usr/bin/env bash
# Runs on every TPU worker.
#   worker.sh install        the package and Python 3.12, since TPU VMs come with 3.10
#   worker.sh run ATTEMPT    starts an attempt, or joins it, and ends with its exit code
#   worker.sh train ATTEMPT  the training itself, detached from the connection
set -euo pipefail
cd "$(dirname "$0")"
attempt=${{2:-}}
case $1 in
install)
  tar -xf source.tar
  python3 -m pip install --quiet --user uv
  ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv
  ~/.local/bin/uv pip install --quiet --python .venv/bin/python -e '.[tpu]'
{mounts}  ;;
run)
  mkdir -p logs
  log=logs/$attempt.log lines=20
  if [ ! -e "$log" ]; then
    if [ -e pid ]; then  # what an attempt before this one has left would hold the TPU
      kill -TERM "$(cat pid)" 2> /dev/null || true
      timeout 60 tail --pid="$(cat pid)" -f /dev/null || kill -KILL -- "-$(cat pid)" || true
    fi
    : > "$log"
    lines=+1
    setsid nohup bash worker.sh train "$attempt" >> "$log" 2>&1 < /dev/null &
    echo $! > pid
  fi
  tail --pid="$(cat pid)" -n "$lines" -f "$log" | sed -u "s/^/[$(hostname)] /"
  code=$(cat "logs/$attempt.code" 2> /dev/null || echo 143)
  [ "$code" != 1 ] || code={error}  # 1 is how gcloud itself fails
  exit "$code"
  ;;
train)
{exports}{collect}{supervise}\
  echo "$code" > "logs/$attempt.code"
{collected}  ;;
esac
"""

# Training reads and writes files.
_MOUNT = """\
  mountpoint -q {folder} || {{
    sudo mkdir -p {folder}
    sudo chown "$(id -u)" {folder}
    gcsfuse --implicit-dirs {bucket} {folder}
  }}
"""

# A preempted VM is gone at once: its log must be somewhere else by then.
_COLLECT = """\
  collect() {{
    gcloud storage cp --quiet "logs/$attempt.log" {logs}/"$attempt/$(hostname).log" &> /dev/null
  }}
  (while sleep 60; do collect; done) &
  collector=$!
"""
_COLLECTED = """\
  kill "$collector" || true
  collect || true
"""

_CONTROLLER = """\
#!/usr/bin/env bash
# Books TPU VMs, trains on them, and does it again after a preemption. Run it from the checkout.
# It may be stopped and started again: the training goes on, and it joins it.
# LOOK is the number of seconds between looks at the queued resource. SOON is the number of seconds
# in which no training ends well: what leaves with {again} by then has hosts that do not find each
# other, for example, and counts as a crash.
set -euo pipefail
look=${{LOOK:-30}} soon=${{SOON:-900}}
folder={folder}
resource=({resource})
gcloud_tpu() {{ gcloud compute tpus queued-resources "$@"; }}
say() {{ echo "== $(date +%T) $*" | tee -a "$folder/train.log"; }}

state() {{
  local error=$folder/describe.log
  if gcloud_tpu describe "${{resource[@]}}" --format='value(state.state)' 2> "$error"; then
    return
  fi
  if grep -q NOT_FOUND "$error"; then echo NONE; else cat "$error" >&2; echo UNKNOWN; fi
}}
book() {{
  gcloud_tpu create "${{resource[@]}}" \\
    {booking}
}}
release() {{ gcloud_tpu delete "${{resource[@]}}" --force --quiet; }}
# Without --batch-size=all gcloud would serve 64 workers and let the others wait for their end.
on_workers() {{
  gcloud_tpu ssh "${{resource[@]}}" --node=all --worker=all --batch-size=all --command="$1"
}}
install() {{
  {pack}
  on_workers {make_folder}
  gcloud_tpu scp "$folder/source.tar" "$folder/worker.sh" {destination} \\
    "${{resource[@]:1}}" --node=all --worker=all --batch-size=all
  on_workers {install}
}}
finish() {{
  {finish}
  exit "$1"
}}

attempt=$(cat "$folder/attempt" 2> /dev/null || true)
crashes=0 tries=0
while true; do
  now=$(state)
  case $now in
    NONE) say "booking {type}"; attempt=; book; continue ;;
    SUSPENDED)
      say "preempted: deleting what is left, and booking again"
      release || sleep "$look"
      continue ;;
    FAILED)
      gcloud_tpu describe "${{resource[@]}}"
      say "the booking failed, see above; to delete it:" {delete}
      exit 1 ;;
    ACTIVE) ;;
    *) say "the queued resource is $now"; sleep "$look"; continue ;;
  esac
  code=0
  if [ -z "$attempt" ]; then
    say "installing"
    if install; then
      tries=$((tries + 1))
      attempt=$(date +%Y%m%d-%H%M%S)-$tries
      echo "$attempt" > "$folder/attempt"
    else
      code=1
    fi
  fi
  if [ "$code" = 0 ]; then
    say "attempt $attempt"
    began=$SECONDS
    on_workers {run}" $attempt" 2>&1 | tee -a "$folder/train.log" || code=$?
    if [ "$code" = {again} ] && [ "$((SECONDS - began))" -ge "$soon" ]; then code=143; fi
  fi
  case $code in
    0) say "the training has ended"; rm -f "$folder/attempt"; finish 0 ;;
    255) say "the connection is lost"; sleep "$look" ;;
    143) say "told to stop, or a host is lost: starting again"; attempt=; sleep "$look" ;;
    {error})
      say "the training ended with an error that would come again; see $folder/train.log"
      rm -f "$folder/attempt"
      finish 1 ;;
    *)
      attempt= crashes=$((crashes + 1))
      say "ended with exit code $code, for the time $crashes"
      if [ "$crashes" -gt {restarts} ]; then
        say "that was more than --restarts={restarts}; see $folder/train.log"
        rm -f "$folder/attempt"
        finish "$code"
      fi ;;
  esac
done
"""


def render(job: Job) -> Rendered:
  """Returns the two scripts and the command that runs the first.

  Raises:
    ValueError: if the topology is not one of TPU chips, or cannot be a queued resource.
  """
  tpu.require_tpu(job.topology, "tpu_vm")
  return Rendered(
    files=(
      File(f"{job.folder}/worker.sh", _worker(job)),
      File(f"{job.folder}/tpu_vm.sh", _controller(job)),
    ),
    commands=(("bash", f"{job.folder}/tpu_vm.sh"),),
    tools=("gcloud",),
  )


def _worker(job: Job) -> str:
  collects = job.workdir.startswith("gs://")
  logs = shlex.quote(f"{job.workdir.rstrip('/')}/logs")
  arguments, buckets = shell.mounted(job.arguments)
  return _WORKER.format(
    mounts="".join(
      _MOUNT.format(bucket=shlex.quote(b), folder=shlex.quote(f"/mnt/{b}")) for b in buckets
    ),
    error=_ERROR,
    exports=_indent(shell.exports("tpu", job.topology.chip.name)),
    collect=_COLLECT.format(logs=logs) if collects else "",
    supervise=_indent(shell.supervise(shell.training(".venv/bin/python", arguments))),
    collected=_COLLECTED if collects else "",
  )


def _controller(job: Job) -> str:
  options, topology = job.options, job.topology
  resource = shlex.join([job.name, f"--project={options.project}", f"--zone={options.zone}"])
  kind = tpu.accelerator_type(topology)
  booking = [f"--accelerator-type={kind}"]
  booking += [
    f"--runtime-version={options.runtime_version or tpu.RUNTIME_VERSIONS[topology.chip.name]}"
  ]
  if topology.slices > 1:
    booking += [f"--node-count={topology.slices}", f"--node-prefix={job.name}"]
  else:
    booking += [f"--node-id={job.name}"]
  booking += [
    f"--network={options.network}",
    "--scopes=https://www.googleapis.com/auth/cloud-platform",
  ]
  booking += [f"--{name}" for name in ("spot", "reserved") if getattr(options, name)]
  delete = f"gcloud compute tpus queued-resources delete {resource} --force"
  keep = f"say {shlex.quote(f'still booked (--keep); to delete it: {delete}')}"
  failed = f"say {shlex.quote(f'still booked, and costs money; to delete it: {delete}')}"
  return _CONTROLLER.format(
    folder=shlex.quote(job.folder),
    resource=resource,
    delete=shlex.quote(delete),
    booking=shlex.join(booking),
    type=f"{topology.slices} x {kind}" if topology.slices > 1 else kind,
    pack=shlex.join(shell.pack(f"{job.folder}/source.tar")),
    make_folder=shlex.quote(f"mkdir -p {job.name}"),
    destination=f"{job.name}:{job.name}/",
    install=shlex.quote(f"bash {job.name}/worker.sh install"),
    run=shlex.quote(f"bash {job.name}/worker.sh run"),
    restarts=options.restarts,
    again=watch.RUN_AGAIN,
    error=_ERROR,
    finish=keep if options.keep else f"release || {failed}",
  )


def _indent(text: str) -> str:
  return "".join(f"  {line}\n" for line in text.splitlines())


TARGET = Target(
  about="TPU VMs as queued resources of Google Cloud, one or several slices",
  options=_OPTIONS,
  render=render,
  packed=True,
  shared_by="mounted",
  mounts=lambda options: True,
)
