#!/usr/bin/env bash
# Rebuilds every shipped weight into RUNS/weights (runs/weights): text model, both codecs, decoder.
# Each step goes on where it stopped. docs/weights.md says how long they take.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} DATA=${DATA:-data} RUNS=${RUNS:-runs}
model=$RUNS/weights/model
for set in base new_objects; do
  "$PYTHON" -m data_pipelines.build_pictotalk --data_dir="$DATA" --config=$set
done
for codec in image speech; do
  "$PYTHON" -m aromni_jax.train_codec --codec=$codec --workdir="$RUNS/weights/${codec}_codec" \
    --out="$model" --data_dir="$DATA"
done
tokens=$RUNS/weights/tokens_base
[ -d "$tokens" ] || "$PYTHON" -m data_pipelines.tokenize --data_dir="$DATA" --config=base \
  --model="$model" --out="$tokens"
"$PYTHON" -m aromni_jax.train --config=configs/demo.py:shipped --workdir="$RUNS/weights/decoder" \
  --config.base="$model" --config.data.shards="$tokens"
echo "The model directory is $RUNS/weights/decoder/model."
