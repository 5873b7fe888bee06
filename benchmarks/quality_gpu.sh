#!/usr/bin/env bash
# The rows of MovieLens-1M with whole language models on one GPU, several runs at a time, most valuable first.
#   DATA=folder LIMIT=seconds benchmarks/quality_gpu.sh [OUTPUT]
# DATA holds ml-1m/interactions.parquet and ml-1m/items.csv. Run again, it goes on where it was stopped: finished rows are
# left alone, others resume. OUTPUT/quality.tgz: each row's metrics, settings, curves and predictions.
set -uo pipefail
cd "$(dirname "$0")/.."
output=${1:-${OUT:-runs}}
runs=${RUNS:-runs/ml1m_gpu}
ends=$(($(date +%s) + ${LIMIT:-420}))
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${THREADS:-4}
mkdir -p "$runs" "$output"

data=(--data.interactions "$DATA/ml-1m/interactions.parquet" --data.items "$DATA/ml-1m/items.csv"
      --data.columns.timestamp position --trainer.enable_progress_bar false --trainer.logger false)
gpu=(-c configs/overlays/gpu.yaml --data.micro_batch_tokens null)
layers=${LAYERS:-30}
# A step of 16,384 items or 32,768 tokens takes a GPU little longer than a tenth of that.
vectors=(--data.max_items 200 --data.batch_tokens 16384 --model.encoders.backbone.layers "$layers"
         --model.learning_rates "{history_encoder.backbone: 5.0e-4}" --trainer.check_val_every_n_epoch 2)
texts=(--data.max_items 200 --data.max_tokens 2048 --data.batch_tokens 32768 --model.encoders.backbone.layers "$layers"
       --model.learning_rates "{history_encoder.backbone: 5.0e-4}" --trainer.check_val_every_n_epoch 2)

# row NAME CONFIGURATION OPTIONS: trains, tests, or leaves alone what is finished. What has no time left is ended.
row() {
  local name=$1 configuration=$2; shift 2
  [ -f "$runs/$name/metrics.json" ] && return
  local left=$((ends - $(date +%s) - 5))
  [ "$left" -gt 15 ] || { echo "$name: not run, the limit was reached"; return; }
  local begun=$(date +%s)
  timeout "$left" python3 -m anyo_lightning fit -c "configs/$configuration.yaml" "${gpu[@]}" "${data[@]}" "$@" \
    ${EXTRA:-} --run "$runs/$name" >>"$runs/$name.log" 2>&1
  echo "$name: status $?, $(($(date +%s) - begun)) s"
  pack
}
pack() {
  (
    flock 9
    find "$runs" -maxdepth 2 \( -name metrics.json -o -name config.yaml -o -name curves.csv -o -name '*.parquet' -o -name '*.log' \) |
      tar czf "$output/quality.tgz" -T - 2>/dev/null
  ) 9>"$runs/lock"
}
# after NAME: waits for another lane's row.
after() { until [ -f "$runs/$1/metrics.json" ] || [ "$(date +%s)" -ge "$ends" ]; do sleep 1; done; }

ids() {
  row sasrec sasrec --data.max_items 200 --data.batch_tokens 12800 --trainer.max_epochs "${SASREC_EPOCHS:-60}" \
    --trainer.check_val_every_n_epoch 3 --metrics.variant sasrec
  row taught e4srec_vectors_hybrid "${vectors[@]}" --trainer.max_epochs "${VECTORS_EPOCHS:-30}" \
    --model.encoders.item_vectors_from "$runs/sasrec" --metrics.variant "e4srec_vectors_hybrid beside SASRec's vectors"
}
hybrid() {
  row hybrid e4srec_vectors_hybrid "${vectors[@]}" --trainer.max_epochs "${VECTORS_EPOCHS:-30}"
  row unisrec unisrec --data.max_items 200 --data.batch_tokens 12800 --trainer.max_epochs 40 \
    --trainer.check_val_every_n_epoch 3
}
text() {
  row csft csft "${texts[@]}" --trainer.max_epochs "${CSFT_EPOCHS:-2}"
  after csft
  row e4srec e4srec "${texts[@]}" --trainer.max_epochs "${TEXT_EPOCHS:-10}" --model.init_from "$runs/csft" \
    --metrics.variant "e4srec, from CSFT"
}
pids=()
for lane in ${LANES:-text hybrid ids}; do "$lane" & pids+=($!); done
wait "${pids[@]}"
pack
