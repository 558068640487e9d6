#!/usr/bin/env bash
# PictoTalk from raw pictures and speech to a report, on this machine.
#
#   launch/demo.sh demo         trains from nothing (9 of about 15 minutes on two cores)
#   launch/demo.sh new_objects  fine-tunes the shipped decoder on objects that it has never seen
#   launch/demo.sh tiny         both data sets and the model very small, to see that all works
#
# PYTHON names the interpreter, DATA and RUNS the folders that are written.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} DATA=${DATA:-data} RUNS=${RUNS:-runs}
aromni() { "$PYTHON" -P -m aromni_jax.cli "$@"; }
case ${1:-} in
  demo) set=base config=default name="from nothing" other="shipped" ;;
  new_objects) set=new_objects config=new_objects name="after fine-tuning" other="before" ;;
  tiny) set=tiny config=tiny name="from nothing" other="shipped" ;;
  *) echo "usage: $0 demo|new_objects|tiny" >&2; exit 2 ;;
esac
run=$RUNS/$1 limit=${LIMIT:-24}
began=$SECONDS
say() { echo "== $((SECONDS - began)) s: $*"; }

say "1/5 drawing pictures and speaking captions (PictoTalk $set)"
aromni build_pictotalk --data_dir="$DATA" --config=$set
say "2/5 pictures, speech and text to tokens"
# Tokens of other codecs or another vocabulary are of no use, so they are always made anew.
rm -rf "$DATA/tokens_$set"
aromni tokenize --data_dir="$DATA" --config=$set
say "3/5 training"
rm -rf "$run"
aromni train --config=demo:$config --workdir="$run" \
  --config.data.shards="$DATA/tokens_$set"
say "4/5 evaluation on unseen captions"
evaluate() {
  aromni evaluate --data_dir="$DATA" --config=$set --limit="$limit" "$@"
}
evaluate --model="$run/model" --out="$run/evaluation.json"
evaluate --out="$run/$other.json"
say "5/5 report"
aromni report --out="$run/report.html" \
  --evaluations="$name=$run/evaluation.json" --evaluations="$other=$run/$other.json" \
  --runs="$name=$run"
say "done: open $run/report.html"
