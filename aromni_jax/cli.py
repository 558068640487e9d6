"""The console script: `aromni <job> --flags`, the same as `python -m aromni_jax.<job> --flags`."""

import runpy
import sys

JOBS = {
  "generate": "answers one request with text, a picture or speech",
  "train": "trains a decoder from a configuration",
  "evaluate": "measures a model on PictoTalk and writes JSON",
  "report": "makes one HTML page of runs and evaluations",
  "train_codec": "trains the image or the speech codec",
  "plan": "tells what a training run needs before anything is booked",
  "convert": "turns released checkpoints into a model directory, and back",
}


def main() -> None:
  """Runs a job; only its own module, and so only its own flags, are loaded."""
  job = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if job in ("-h", "--help"):
    print("usage: aromni <job> --flags        aromni <job> --help lists a job's flags\n")
    print("\n".join(f"  {name:12s} {what}" for name, what in JOBS.items()))
    return
  if job not in JOBS:
    sys.exit(f"aromni: job {job!r} does not exist; expected one of {', '.join(JOBS)}")
  del sys.argv[1]
  runpy.run_module(f"aromni_jax.{job}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
