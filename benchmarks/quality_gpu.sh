#!/usr/bin/env bash
# Rows of language models on MovieLens-1M, MovieLens-100K and Beauty on one GPU, several runs at a time.
#   DATA=folder LIMIT=seconds [TEACHERS=folder] benchmarks/quality_gpu.sh [OUTPUT]
# DATA holds ml-1m/interactions.parquet and ml-1m/items.csv, amazon-beauty/interactions.csv.gz and items.csv.gz;
# TEACHERS runs that are finished already, by the names below. Run again, it goes on where it was stopped: finished rows
# are left alone, others resume. As rows end: their metrics, settings, curves and logs in OUTPUT/quality.tgz, what tests
# of pairs of rows need in OUTPUT/predictions.txz.*, in parts of 15 MiB. Where three lanes have failed after CHECK
# seconds, it ends. Many small runs can share a card by NVIDIA's MPS: `nvidia-cuda-mps-control -d` before.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${DATA:?is the folder of the data, see the head of this file}"
output=$(realpath -m "${1:-${OUT:-runs}}")
runs=$(realpath -m "${RUNS:-runs/quality_gpu}")
ends=$(($(date +%s) + ${LIMIT:-420}))
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${THREADS:-4}
mkdir -p "$runs" "$output"

[ -z "${TEACHERS:-}" ] || cp -r --update=none "$TEACHERS/." "$runs/"
for log in "$runs"/*.log; do [ ! -f "$log" ] || mv "$log" "$log.before"; done

quiet=(--trainer.enable_progress_bar false --trainer.logger false)
ml1m=(--data.interactions "$DATA/ml-1m/interactions.parquet" --data.items "$DATA/ml-1m/items.csv"
      --data.columns.timestamp position)
beauty_files=(--data.interactions "$DATA/amazon-beauty/interactions.csv.gz"
              --data.items "$DATA/amazon-beauty/items.csv.gz")
beauty=(-c configs/overlays/beauty.yaml "${beauty_files[@]}" --model.encoders.dropout 0.5)
exact=(--trainer.precision 32-true)  # small models lose more by bfloat16 than they gain
gpu=(-c configs/overlays/gpu.yaml --data.micro_batch_tokens null --data.num_workers 1)
# The teacher as `make ml1m` trains it; three layers as there, too; and all layers with larger steps.
sasrec=("${exact[@]}" --data.max_items 200 --data.overlap 0 --data.random_cuts true --trainer.max_epochs 40
        --trainer.check_val_every_n_epoch 4)
three=("${exact[@]}" --data.max_items 100 --data.batch_tokens 4000
       --trainer.max_epochs 10 --trainer.check_val_every_n_epoch 2)
layers=${LAYERS:-30}
lora=(--model.encoders.backbone.layers "$layers" --model.learning_rates "{history_encoder.backbone: 5.0e-4}"
      --trainer.check_val_every_n_epoch 2)
vectors=("${lora[@]}" --data.max_items 200 --data.batch_tokens 16384 --trainer.max_epochs "${VECTORS_EPOCHS:-16}")
# On an H200 with a slow host a step of 65,536 tokens takes as long as one of 16,384, a quarter of a second.
texts=("${lora[@]}" --data.max_items 100 --data.max_tokens 1024 --data.batch_tokens 65536)

# row NAME CONFIGURATION OPTIONS: trains, tests, or leaves alone what is finished. What has less than NEED seconds is not
# begun; at the limit a row saves its state, untested, and goes on from there in the next call.
row() {
  local name=$1 configuration=$2
  shift 2
  [ -f "$runs/$name/metrics.json" ] && return
  local left=$((ends - $(date +%s) - 5))
  [ "$left" -gt "${NEED:-15}" ] || { echo "$name: not run, the limit was reached"; return; }
  local begun=$(date +%s)
  timeout --kill-after 10 "$left" python3 -m anyo_lightning fit -c "configs/$configuration.yaml" "${gpu[@]}" "$@" \
    "${quiet[@]}" ${EXTRA:-} \
    --run "$runs/$name" \
    >>"$runs/$name.log" 2>&1
  echo "$name: status $?, $(($(date +%s) - begun)) s"
  pack --nonblock &
}
# The histories in predictions of the same data are the same: a window of 16 MiB finds them.
pack() {
  (
    flock "$@" 9 || exit
    cd "$runs"
    tar czf quality.tgz --ignore-failed-read ./*/metrics.json ./*/config.yaml ./*/curves.csv ./*.log
    mv quality.tgz "$output/quality.tgz"
    rm -f .predictions.txz.*
    tar cf - --ignore-failed-read ./*/predictions.parquet | xz --lzma2=preset=1,dict=16MiB |
      split -b 15M - .predictions.txz.
    rm -f "$output"/predictions.txz.*
    for part in .predictions.txz.*; do mv "$part" "$output/${part#.}"; done
  ) 9>"$runs/lock" 2>/dev/null
}
# taught NAME TEACHER OPTIONS: a language model that reads a finished SASRec's vectors beside the texts'.
taught() {
  local name=$1 teacher=$2
  shift 2
  row "$name" e4srec_vectors_hybrid --model.encoders.item_vectors_from "$runs/$teacher" \
    --metrics.variant "e4srec_vectors_hybrid, SASRec's vectors" "$@"
}
# ensemble NAME "RUN RUN ..." OPTIONS: finished rows as one model; nothing is trained.
ensemble() {
  local name=$1 run list=
  for run in $2; do
    [ -f "$runs/$run/metrics.json" ] || return
    list="$list$runs/$run, "
  done
  shift 2
  row "$name" ensemble "$@" --model.runs "[$list]"
}
seed() {
  row "sasrec$1" sasrec "${ml1m[@]}" "${sasrec[@]}" --seed_everything "$1" --metrics.variant sasrec
  taught "taught$1" "sasrec$1" "${ml1m[@]}" "${three[@]}" --seed_everything "$1"
  ensemble "ensemble$1" "taught$1 sasrec$1" "${ml1m[@]}" --seed_everything "$1" \
    --metrics.variant "ensemble, the LLM and SASRec"
}
seed0() { seed 0; }
seed1() { seed 1; }
seed2() { seed 2; }
# The same where the losses of both, the SASRec and the language model, leave a user's own items out.
masked() {
  local mask=(--model.mask_history true --seed_everything "$1")
  row "sasrec_masked$1" sasrec "${ml1m[@]}" "${sasrec[@]}" "${mask[@]}" --metrics.variant "sasrec, own items masked"
  taught "taught_masked$1" "sasrec_masked$1" "${ml1m[@]}" "${three[@]}" "${mask[@]}" \
    --metrics.variant "e4srec_vectors_hybrid, SASRec's vectors, own items masked"
  ensemble "ensemble_masked$1" "taught_masked$1 sasrec_masked$1" "${ml1m[@]}" --seed_everything "$1" \
    --metrics.variant "ensemble, the LLM and SASRec, own items masked"
}
masked0() { masked 0; }
masked1() { masked 1; }
masked2() { masked 2; }
deep() {
  row sasrec0 sasrec "${ml1m[@]}" "${sasrec[@]}"
  taught taught_deep sasrec0 "${ml1m[@]}" "${vectors[@]}"
  ensemble ensemble_deep "taught_deep sasrec0" "${ml1m[@]}" --metrics.variant "ensemble, the deep LLM and SASRec"
}
frozen() { row vectors_deep e4srec_vectors "${ml1m[@]}" "${vectors[@]}"; }
# Is it the texts, is it the pre-training? As `seed` and `vectors`, where each item has another's texts, and where the
# weights of the language model are in random order (`permuted_texts.py`, `shuffled_weights.py`). Not beside `seed`.
controls() {
  local items="$runs/permuted.csv" model="$runs/shuffled_model" data
  data=(--data.interactions "$DATA/ml-1m/interactions.parquet" --data.items "$items" --data.columns.timestamp position)
  (
    flock 8  # one draw of both for all seeds: rows that differ in more than their seed are rows of their own
    [ -f "$items" ] || python3 benchmarks/permuted_texts.py "$DATA/ml-1m/items.csv" "$items" || exit
    [ -f "$model/tokenizer.json" ] || python3 benchmarks/shuffled_weights.py smollm2-135m-instruct "$model"
  ) 8>"$runs/drawn" || return
  seed "$1"
  taught "taught_shuffled$1" "sasrec$1" "${ml1m[@]}" "${three[@]}" --seed_everything "$1" \
    --model.encoders.backbone.name "$model" \
    --metrics.variant "e4srec_vectors_hybrid, SASRec's vectors, weights shuffled"
  taught "taught_permuted$1" "sasrec$1" "${data[@]}" "${three[@]}" --seed_everything "$1" \
    --metrics.variant "e4srec_vectors_hybrid, SASRec's vectors, titles permuted"
  row "vectors_permuted$1" e4srec_vectors "${data[@]}" "${three[@]}" --seed_everything "$1" \
    --metrics.variant "e4srec_vectors, titles permuted"
  row "vectors_shuffled$1" e4srec_vectors "${ml1m[@]}" "${three[@]}" --seed_everything "$1" \
    --model.encoders.backbone.name "$model" --metrics.variant "e4srec_vectors, weights shuffled"
}
controls0() { controls 0; }
controls1() { controls 1; }
controls2() { controls 2; }
# More seeds of what reads texts alone.
vectors_of() {
  row "vectors$1" e4srec_vectors "${ml1m[@]}" "${three[@]}" --seed_everything "$1" --metrics.variant e4srec_vectors
}
vectors1() { vectors_of 1; }
vectors2() { vectors_of 2; }
unisrec() {
  local number
  for number in 0 1 2; do
    row "unisrec$number" unisrec "${ml1m[@]}" "${sasrec[@]}" --model.encoders.backbone.layers null \
      --seed_everything "$number" --metrics.variant unisrec
  done
}
# Text alone: three layers that read a frozen vector of each title, and HLLM, whose item LLM is trained, too.
vectors() {
  row vectors e4srec_vectors "${ml1m[@]}" "${three[@]}" --metrics.variant e4srec_vectors
  row vectors_masked e4srec_vectors "${ml1m[@]}" "${three[@]}" --model.mask_history true \
    --metrics.variant "e4srec_vectors, own items masked"
}
trained() {
  row "ml100k_hllm$1" hllm "${exact[@]}" --trainer.max_epochs 24 --seed_everything "$1" --metrics.variant hllm
}
frozen_items() {
  row "ml100k_hllm_frozen$1" hllm "${exact[@]}" --trainer.max_epochs 24 --model.encoders.item_backbone.lora null \
    --model.learning_rates null --seed_everything "$1" --metrics.variant "hllm, item LLM frozen"
}
hllm() { trained 0; trained 1; }
hllm_frozen() { frozen_items 0; trained 2; frozen_items 1; frozen_items 2; }
# LLaRA on MovieLens-100K at full depth by three starts: cold, CSFT's, and that of EBAE and EBAR. All read titles alone.
llara_data=(--data.template "{movie_title}" --data.titles_only false --data.batch_tokens 16000
            --model.encoders.backbone.layers "$layers")
dual() {
  local start=$1 number
  shift
  for number in 0 1 2; do
    row "llara_$start$number" llara "${llara_data[@]}" --model.encoders.self_prompt " This one." \
      --model.keys catalogue --model.hard_negatives 0 --trainer.max_epochs "${LLARA_EPOCHS:-4}" \
      --seed_everything "$number" --metrics.variant "llara, $start" "$@"
  done
}
llara_cold() { dual cold; }
llara_frozen() { dual frozen --model.learning_rates "{history_encoder.backbone: 0.0}"; }
llara_csft() {
  row llara_csft csft "${llara_data[@]}" --trainer.max_epochs 3
  dual from_csft --model.init_from "$runs/llara_csft"
}
llara_ebae() {
  row llara_ebae llara_pretrain "${llara_data[@]}" --trainer.max_epochs 3 --model.optimizer.lr 5.0e-4
  dual from_ebae --model.init_from "$runs/llara_ebae"
}
text() {
  row csft csft "${ml1m[@]}" "${texts[@]}" --trainer.max_epochs "${CSFT_EPOCHS:-1}" --trainer.check_val_every_n_epoch 1
  row e4srec e4srec "${ml1m[@]}" "${texts[@]}" --trainer.max_epochs "${TEXT_EPOCHS:-8}" \
    --model.init_from "$runs/csft" --metrics.variant "e4srec, from CSFT"
}
small() {
  local number
  for number in 0 1 2; do
    row "ml100k_sasrec$number" sasrec "${exact[@]}" --seed_everything "$number"
    taught "ml100k_taught$number" "ml100k_sasrec$number" "${exact[@]}" --seed_everything "$number"
  done
  row ml100k_e4srec e4srec "${lora[@]}" --data.batch_tokens 24000 --trainer.max_epochs 12
}
amazon() {
  row beauty_sasrec sasrec "${beauty[@]}" "${exact[@]}" --model.optimizer.weight_decay 0 --trainer.max_epochs 30
  taught beauty_taught beauty_sasrec "${beauty[@]}" --trainer.max_epochs "${BEAUTY_EPOCHS:-20}"
  ensemble beauty_ensemble "beauty_taught beauty_sasrec" -c configs/overlays/beauty.yaml "${beauty_files[@]}" \
    --metrics.variant "ensemble, the LLM and SASRec"
}
# Seeds of Beauty's rows that read texts without an LLM, and of those with less of what is popular (`make beauty`).
rare() {
  local number name seeded files
  row beauty_popularity popularity -c configs/overlays/beauty.yaml "${beauty_files[@]}"
  for number in 1 2; do
    seeded=(--seed_everything "$number")
    files=(-c configs/overlays/beauty.yaml "${beauty_files[@]}" "${seeded[@]}")
    row "beauty_sasrec$number" sasrec "${beauty[@]}" "${exact[@]}" --model.optimizer.weight_decay 0 \
      --trainer.max_epochs 30 "${seeded[@]}" --metrics.variant sasrec
    row "beauty_unisrec$number" unisrec "${beauty[@]}" "${exact[@]}" --model.encoders.backbone.layers null \
      --trainer.max_epochs 30 "${seeded[@]}" --metrics.variant unisrec
    for name in sasrec unisrec; do
      ensemble "beauty_${name}_rare$number" "beauty_$name$number beauty_popularity" "${files[@]}" \
        --model.weights "[1, -0.5]" --metrics.variant "$name, less popular"
    done
    ensemble "beauty_text$number" "beauty_unisrec$number beauty_sasrec$number" "${files[@]}" \
      --metrics.variant "ensemble, unisrec and SASRec"
    ensemble "beauty_text_rare$number" "beauty_unisrec$number beauty_sasrec$number beauty_popularity" "${files[@]}" \
      --model.weights "[1, 1, -1]" --metrics.variant "ensemble, unisrec and SASRec, less popular"
  done
}
failed() { grep -lE "^[A-Za-z.]*(Error|Exception)" "$runs"/*.log 2>/dev/null; }
pids=()
# By default what no page has yet. Those of pages: seed0 seed1 seed2 vectors masked0 masked1 masked2 llara_cold llara_csft
# llara_ebae; more: deep frozen text small.
for lane in ${LANES:-controls0 controls1 controls2 vectors1 vectors2 unisrec rare amazon hllm hllm_frozen llara_frozen}; do
  "$lane" & pids+=($!)
done
sleep "${CHECK:-90}"
if [ "$(failed | wc -l)" -ge 3 ]; then
  echo "ended: three lanes have failed"
  for log in $(failed); do echo "== $log"; tail -n 25 "$log"; done
  pack
  started=$(pgrep -d, -P "$(IFS=,; echo "${pids[*]}")")
  kill "${pids[@]}"
  [ -z "$started" ] || pkill -P "$started"
  exit 1
fi
wait "${pids[@]}"
pack
for log in $(failed); do echo "== $log"; tail -n 25 "$log"; done
