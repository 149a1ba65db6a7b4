#!/usr/bin/env bash
# Everything once, on data that lies here: environment, a small RoBERTa pre-trained with Quant-Noise,
# `fairseq-qn train` (fine-tuning, noise, three stages, one small file), and answers from that file.
#   bash run_scripts/quickstart.sh ["a sentence" ...]  ten minutes at most on two idle cores, set-up included
# All that it makes lies in outputs/quickstart (OUT=... puts it elsewhere). What is done is not done again:
# delete the folder to start anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-outputs/quickstart}
begun=$SECONDS
bash run_scripts/setup.sh plot
py=.venv/bin/python
text=run_scripts/data/banking77
mkdir -p "$out"
source run_scripts/steps.sh

# with other work on the machine, threads that wait by spinning were four times slower
export OMP_WAIT_POLICY=passive
# a model this small keeps no more than eight cores busy
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$("$py" -c 'import os; print(min(8, os.cpu_count() or 1))')}

# 1. text -> 1,000 pieces, a dictionary, and the sentences as fairseq reads them
step data "$py" run_scripts/quickstart_data.py "$text" "$out/data"

# 2. masked language modelling with noise. complete_doc: each sample is one sentence; with several packed
#    into one, as other modes do, <s> learned nothing of its sentence, and fine-tuning got worse than from
#    scratch
step pretrained .venv/bin/fairseq-train "$out/data/pretrain" --cpu --user-dir fairseq_qn \
    --task qn_masked_lm --criterion masked_lm --arch qn_roberta --quant-recipe quickstart \
    --encoder-layers 2 --encoder-embed-dim 256 --encoder-ffn-embed-dim 1024 --encoder-attention-heads 4 \
    --max-positions 64 --dropout 0.1 --attention-dropout 0.0 \
    --tokens-per-sample 64 --sample-break-mode complete_doc --mask-prob 0.25 --max-tokens 1024 \
    --optimizer adam --adam-betas '(0.9,0.98)' --adam-eps 1e-6 --clip-norm 1.0 --weight-decay 0.01 \
    --lr 1e-3 --lr-scheduler polynomial_decay --warmup-updates 100 --total-num-update 240 \
    --max-update 240 --bpe sentencepiece \
    --sentencepiece-model "$out/data/pretrain/model/sentencepiece.bpe.model" \
    --save-dir "$out/pretrained" --no-epoch-checkpoints --num-workers 0 --seed 1 --log-interval 100

# 3. from there to the small file
.venv/bin/fairseq-qn train --model "$out/pretrained/checkpoint_last.pt" --recipe quickstart \
    --train "$out/data/train.tsv" --valid "$out/data/valid.tsv" --test "$text/test.tsv" \
    -o "$out/quickstart.qn.safetensors" --work "$out/work"
"$py" run_scripts/picture.py "$out/work/result.json" -o "$out/result.png"

[ $# -gt 0 ] || set -- "where is my new card?" "i was charged twice for one purchase" \
    "how do i change my pin"
.venv/bin/fairseq-qn predict "$out/quickstart.qn.safetensors" "$@" 2>/dev/null
echo "quickstart: $out/quickstart.qn.safetensors, $out/result.png; $((SECONDS - begun)) s in all"
