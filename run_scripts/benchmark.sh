#!/usr/bin/env bash
# Measures fairseq_qn beside its peers: run_scripts/benchmark.sh [kmeans|compress|train|infer|file|predict
# ...]; by default all but predict, which needs the quickstart's file.
# Each part prints a table and writes OUT/PART.md and OUT/PART.json, OUT=benchmark-results unless set.
# Ratios, not seconds, are what can be compared: ours and each peer run in turn, in both orders, REPEATS (5)
# times each.
# THREADS: threads of each contender, all cores by default.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-benchmark-results}
threads=${THREADS:-$(getconf _NPROCESSORS_ONLN)}
[ $# -gt 0 ] || set -- kmeans compress train infer file
for part in "$@"; do
    if [ ! -f "run_scripts/benchmark/part_$part.py" ]; then
        echo "benchmark: no part '$part'; parts: kmeans compress train infer file predict" >&2
        exit 2
    fi
done
bash run_scripts/setup.sh benchmark
mkdir -p "$out"
# aqlm 1.1.7's numba kernel adds into one array from all its threads: with two its sums are wrong by a fifth,
# and it is slower.
export OMP_NUM_THREADS=$threads MKL_NUM_THREADS=$threads NUMBA_NUM_THREADS=1
for part in "$@"; do
    .venv/bin/python "run_scripts/benchmark/part_$part.py" --out "$out" --repeats "${REPEATS:-5}"
done
