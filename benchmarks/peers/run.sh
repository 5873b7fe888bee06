#!/usr/bin/env bash
# Other libraries on our split, into a page with a table: benchmarks/peers/run.sh RUNS PAGE [OPTIONS OF anyo data]
#   RUNS   a folder of tested runs of the same split, `sasrec` among them; PAGE has the markers of benchmarks/ml100k.md.
#   Made once and kept: runs/peers/NAME/split, runs/peers/NAME/*.csv (the lists) and the environments in ENVIRONMENTS.
#   One thread each, one after the other. PEERS, OPTIONS and NAME choose what is trained, how, and where it lies;
#   BASELINE is the row that others are compared with:
#   PEERS="rectools_sasrec" OPTIONS="--epochs 100 --length 200" benchmarks/peers/run.sh runs/table benchmarks/peers.md
set -euo pipefail
runs=$1 page=$2
shift 2
here=$(dirname "$0")
python=${PYTHON:-.venv/bin/python}
environments=${ENVIRONMENTS:-runs/peers/environments}
work=runs/peers/${NAME:-ml-100k}
export OMP_NUM_THREADS=1
mkdir -p "$work" "$environments"
[ -f "$work/split/test.qrels" ] || "$python" -m anyo_lightning data --output "$work/split" "$@"
foreign=()
for peer in ${PEERS:-rectools_sasrec rectools_unisrec replay_sasrec}; do
    library=${peer%%_*} lists=$work/$peer.csv more=()
    if [ ! -f "$lists" ]; then
        if [ ! -f "$environments/$library/installed" ]; then
            python3 -m venv "$environments/$library"
            "$environments/$library/bin/pip" install --quiet --requirement "$here/requirements-$library.txt"
            touch "$environments/$library/installed"
        fi
        if [ "$peer" = rectools_unisrec ]; then
            [ -f "$work/vectors.npy" ] || PYTHONPATH=. "$python" "$here/text_vectors.py" "$work/split" "$work/vectors.npy"
            more=(--vectors "$work/vectors.npy")
        fi
        # shellcheck disable=SC2086
        "$environments/$library/bin/python" "$here/$peer.py" "$work/split" "$lists" ${OPTIONS:-} "${more[@]}" |
            tee "$work/$peer.log"
    fi
    case $peer in
    rectools_sasrec) name="RecTools SASRec" ;;
    rectools_unisrec) name="RecTools UniSRec" ;;
    *) name="RePlay SasRec" ;;
    esac
    foreign+=("$name=$lists")
done
PYTHONPATH=. "$python" benchmarks/results.py "$runs" --foreign "${foreign[@]}" --output "$page" \
    --baseline "${BASELINE:-sasrec}" --command "benchmarks/peers/run.sh $runs $page${*:+ $*}"
