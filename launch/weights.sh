#!/usr/bin/env bash
# Rebuilds every shipped weight into RUNS/weights (runs/weights): text model, both codecs, decoder.
# Each step goes on where it stopped. docs/weights.md says how long they take.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} DATA=${DATA:-data} RUNS=${RUNS:-runs}
aromni() { "$PYTHON" -P -m aromni_jax.cli "$@"; }
model=$RUNS/weights/model
for set in base new_objects; do
  aromni build_pictotalk --data_dir="$DATA" --config=$set
done
for codec in image speech; do
  aromni train_codec --codec=$codec --workdir="$RUNS/weights/${codec}_codec" \
    --out="$model" --data_dir="$DATA"
done
tokens=$RUNS/weights/tokens_base
[ -d "$tokens" ] || aromni tokenize --data_dir="$DATA" --config=base \
  --model="$model" --out="$tokens"
aromni train --config=demo:shipped --workdir="$RUNS/weights/decoder" \
  --config.base="$model" --config.data.shards="$tokens"
echo "The model directory is $RUNS/weights/decoder/model."
