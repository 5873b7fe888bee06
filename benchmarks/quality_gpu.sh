#!/usr/bin/env bash
# The rows of MovieLens-1M with whole language models on one GPU, several runs at a time, most valuable first.
#   DATA=folder LIMIT=seconds benchmarks/quality_gpu.sh [OUTPUT]
# DATA holds ml-1m/interactions.parquet and ml-1m/items.csv, amazon-beauty/interactions.csv.gz and items.csv.gz. Run
# again, it goes on where it was stopped: finished rows are left alone, others resume. After each row: its metrics,
# settings, curves and log in OUTPUT/quality.tgz, what tests of pairs of rows need in OUTPUT/predictions.tgz.
set -uo pipefail
cd "$(dirname "$0")/.."
output=$(realpath -m "${1:-${OUT:-runs}}")
runs=$(realpath -m "${RUNS:-runs/quality_gpu}")
ends=$(($(date +%s) + ${LIMIT:-420}))
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${THREADS:-4}
mkdir -p "$runs" "$output"

quiet=(--trainer.enable_progress_bar false --trainer.logger false)
ml1m=(--data.interactions "$DATA/ml-1m/interactions.parquet" --data.items "$DATA/ml-1m/items.csv"
      --data.columns.timestamp position --data.max_items 200)
beauty=(-c configs/overlays/beauty.yaml --data.interactions "$DATA/amazon-beauty/interactions.csv.gz"
        --data.items "$DATA/amazon-beauty/items.csv.gz")
exact=(--trainer.precision 32-true)  # small models lose more by bfloat16 than they gain
gpu=(-c configs/overlays/gpu.yaml --data.micro_batch_tokens null)
layers=${LAYERS:-30}
# On an H200 with a slow host a step of 65,536 tokens takes as long as one of 16,384, a quarter of a second.
vectors=(--data.batch_tokens 32768 --model.encoders.backbone.layers "$layers"
         --model.learning_rates "{history_encoder.backbone: 5.0e-4}" --trainer.check_val_every_n_epoch 2)
texts=(--data.max_tokens 2048 --data.batch_tokens 65536 --model.encoders.backbone.layers "$layers"
       --model.learning_rates "{history_encoder.backbone: 5.0e-4}" --trainer.check_val_every_n_epoch 2)

# row NAME CONFIGURATION OPTIONS: trains, tests, or leaves alone what is finished. What has no time left is ended.
row() {
  local name=$1 configuration=$2
  shift 2
  [ -f "$runs/$name/metrics.json" ] && return
  local left=$((ends - $(date +%s) - 5))
  [ "$left" -gt 15 ] || { echo "$name: not run, the limit was reached"; return; }
  local begun=$(date +%s) training=$((left > 60 ? left - 45 : left / 2))  # the rest is for the test
  timeout "$left" python3 -m anyo_lightning fit -c "configs/$configuration.yaml" "${gpu[@]}" "$@" \
    "${quiet[@]}" ${EXTRA:-} \
    --trainer.max_time "$(printf '00:00:%02d:%02d' $((training / 60)) $((training % 60)))" --run "$runs/$name" \
    >>"$runs/$name.log" 2>&1
  echo "$name: status $?, $(($(date +%s) - begun)) s"
  pack
}
pack() {
  (
    flock 9
    cd "$runs"
    tar czf "$output/quality.tgz" --ignore-failed-read ./*/metrics.json ./*/config.yaml ./*/curves.csv ./*.log
    tar czf "$output/predictions.tgz" --ignore-failed-read ./*/predictions.parquet
  ) 9>"$runs/lock" 2>/dev/null
}
ids() {
  row sasrec sasrec "${ml1m[@]}" "${exact[@]}" --data.batch_tokens 12800 --trainer.max_epochs "${SASREC_EPOCHS:-60}" \
    --trainer.check_val_every_n_epoch 3
  row taught e4srec_vectors_hybrid "${ml1m[@]}" "${vectors[@]}" --trainer.max_epochs "${VECTORS_EPOCHS:-30}" \
    --model.encoders.item_vectors_from "$runs/sasrec" --metrics.variant "e4srec_vectors_hybrid beside SASRec's vectors"
}
hybrid() {
  row hybrid e4srec_vectors_hybrid "${ml1m[@]}" "${vectors[@]}" --trainer.max_epochs "${VECTORS_EPOCHS:-30}"
  row sasrec1 sasrec "${ml1m[@]}" "${exact[@]}" --data.batch_tokens 12800 --trainer.max_epochs "${SASREC_EPOCHS:-60}" \
    --trainer.check_val_every_n_epoch 3 --seed_everything 1
}
text() {
  row csft csft "${ml1m[@]}" "${texts[@]}" --trainer.max_epochs "${CSFT_EPOCHS:-2}"
  row e4srec e4srec "${ml1m[@]}" "${texts[@]}" --trainer.max_epochs "${TEXT_EPOCHS:-10}" \
    --model.init_from "$runs/csft" --metrics.variant "e4srec, from CSFT"
}
amazon() {
  row beauty_sasrec sasrec "${beauty[@]}" "${exact[@]}" --model.encoders.dropout 0.5 --model.optimizer.weight_decay 0 \
    --trainer.max_epochs 30
  row beauty_taught e4srec_vectors_hybrid "${beauty[@]}" "${vectors[@]}" --data.batch_tokens 5280 \
    --model.encoders.dropout 0.5 --trainer.max_epochs "${BEAUTY_EPOCHS:-20}" \
    --model.encoders.item_vectors_from "$runs/beauty_sasrec" \
    --metrics.variant "e4srec_vectors_hybrid beside SASRec's vectors"
}
recbole() {
  row unisrec unisrec "${ml1m[@]}" "${exact[@]}" --data.batch_tokens 12800 --trainer.max_epochs 40 \
    --trainer.check_val_every_n_epoch 3
  row beauty_recbole sasrec_recbole "${beauty[@]}" "${exact[@]}" --data.batch_tokens 5274 --trainer.max_epochs 40 \
    --trainer.check_val_every_n_epoch 2
}
pids=()
for lane in ${LANES:-text hybrid ids amazon recbole}; do "$lane" & pids+=($!); done
wait "${pids[@]}"
pack
