"""The console script: `aromni <job> --flags`, the same as `python -m <its module> --flags`."""

import difflib
import importlib.metadata
import platform
import runpy
import sys

import aromni_jax

# Group -> job -> its module and one line.
GROUPS = {
  "make data": {
    "build_pictotalk": (
      "aromni_jax.data_pipelines.build_pictotalk",
      "draws and speaks PictoTalk, the demo's pictures and phrases",
    ),
    "tokenize": ("aromni_jax.data_pipelines.tokenize", "turns PictoTalk into token shards"),
    "import_aromni": (
      "aromni_jax.data_pipelines.import_aromni",
      "turns AR-Omni's training files into token shards",
    ),
    "export_aromni": (
      "aromni_jax.data_pipelines.export_aromni",
      "writes token shards as AR-Omni's JSONL",
    ),
  },
  "train": {
    "train": ("aromni_jax.train", "trains a decoder from a configuration"),
    "train_codec": ("aromni_jax.train_codec", "trains the image or the speech codec"),
    "train_text": ("aromni_jax.data_pipelines.train_text", "trains the demo's text model"),
    "plan": ("aromni_jax.plan", "tells what a training run needs before anything is booked"),
    "launch": ("aromni_jax.launch.run", "starts a training here, on TPUs, in SLURM or in Colab"),
  },
  "use": {
    "generate": ("aromni_jax.generate", "answers one request with text, a picture or speech"),
  },
  "measure": {
    "evaluate": ("aromni_jax.evaluate", "measures a model on PictoTalk and writes JSON"),
    "report": ("aromni_jax.report", "makes one HTML page of runs and evaluations"),
  },
  "move": {
    "convert": (
      "aromni_jax.convert",
      "turns released checkpoints into a model directory, and back",
    ),
  },
}
JOBS = {name: job for jobs in GROUPS.values() for name, job in jobs.items()}

_USAGE = """\
usage: aromni <job> --flags     runs a job
       aromni <job> --help      tells what it does and lists its flags
       aromni --version

Compiled programs are kept in a cache for the next call; AROMNI_CACHE=off keeps none, and
AROMNI_CACHE=FOLDER keeps them there.
"""


def main() -> None:
  """Runs a job; only its own module, and so only its own flags, are loaded."""
  job = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if job in ("-h", "--help", "help"):
    print(_USAGE)
    for group, jobs in GROUPS.items():
      print(f"{group}:")
      print("\n".join(f"  {name:15s} {what}" for name, (_, what) in jobs.items()))
    return
  if job == "--version":
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax")]
    python = f"Python {platform.python_version()}"
    print(f"aromni_jax {aromni_jax.__version__} ({', '.join([*versions, python])})")
    return
  if job not in JOBS:
    near = difflib.get_close_matches(job, JOBS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(JOBS)}"
    sys.exit(f"error: job {job!r} does not exist; {hint}")
  del sys.argv[1]
  runpy.run_module(JOBS[job][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
