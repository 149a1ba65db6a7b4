#!/usr/bin/env bash
# Does it matter what becomes of Adam's moments when a stage is frozen? MiniLM on MNLI: kept or projected
# onto the clusters (--quant-keep-moments or not), at two beta2, over some seeds.
#   bash run_scripts/accuracy/adam_moments.sh [OUT]   one to two hours on one idle core
# Killed and called again, it goes on.
# Dense fine-tuning once: one epoch (batches of 32, seed 1). For each beta2 and seed NOISE updates with exact
# noise, and from that checkpoint two runs through three short stages (feed-forward, embeddings, attention;
# configs/recipes/minilm.yaml) that differ in nothing but the option. No teacher. fairseq-train itself scores
# the end of each on pairs that none has seen.
# Measured (loss in nats, 2,000 pairs; mean and standard deviation over seeds 1 to 3, at 0.98 the third in a
# run of its own; the change is that within each pair of runs):
#   beta2  moments     held-out loss      accuracy %
#   0.98   kept        0.9912 +-0.0038    50.50 +-0.70
#   0.98   projected   0.9866 +-0.0043    50.87 +-1.01
#   0.98   change     -0.0046 +-0.0004    +0.37 +-0.32
#   0.999  kept        0.9894 +-0.0077    50.97 +-0.76
#   0.999  projected   0.9850 +-0.0087    51.50 +-1.37
#   0.999  change     -0.0044 +-0.0017    +0.53 +-0.72
# The loss falls in all six pairs, by less than one seed differs from another; accuracy does not tell the two
# apart.
# SEEDS="1 2 3"  BETAS="0.999 0.98"  NOISE=40  STAGE=50 updates after each freeze  BATCH=16  PAIRS=2000, the first of
# the 9,815
# dev-matched ones
# VENV=folder: an environment that is there already, instead of run_scripts/setup.sh's.   Data: as in
# minilm_mnli.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:-outputs/adam_moments}
mnli=${QN_DATA:-../shared/data}/mnli10k
seeds=${SEEDS:-1 2 3}
noise=${NOISE:-40} stage=${STAGE:-50} batch=${BATCH:-16}
if [ ! -f "$mnli/dev_matched.tsv" ]; then
    echo "adam_moments: no data at $mnli; set QN_DATA to the folder that holds mnli10k/" >&2
    exit 1
fi
model=$(bash run_scripts/minilm.sh)
bin=${VENV:-.venv}/bin
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$out"
source run_scripts/steps.sh

train() { # train NAME BETA2 SEED UPDATES WARMUP OPTIONS...
    local name=$1 beta2=$2 seed=$3 updates=$4 warmup=$5
    shift 5
    "$bin/fairseq-train" "$out/bin" --cpu --user-dir fairseq_qn --task qn_sentence_prediction \
        --arch qn_roberta --encoder-layers 6 --encoder-embed-dim 384 --encoder-ffn-embed-dim 1536 \
        --encoder-attention-heads 12 \
        --max-positions 512 --init-token 0 --separator-token 2 --num-classes 3 --no-shuffle \
        --batch-size-valid 64 --required-batch-size-multiple 1 \
        --optimizer adam --adam-betas "(0.9,$beta2)" --adam-eps 1e-6 --clip-norm 1.0 --weight-decay 0.01 \
        --lr 1e-4 --lr-scheduler polynomial_decay --warmup-updates "$warmup" --total-num-update "$updates" \
        --dropout 0.1 --attention-dropout 0.1 --pooler-dropout 0.1 --seed "$seed" \
        --save-dir "$out/$name" --no-epoch-checkpoints --log-format json --log-interval 10 \
        --num-workers 0 "$@"
}

quantised() { # quantised NAME BETA2 SEED OPTIONS...: the schedule that noise and stages share
    local name=$1 beta2=$2 seed=$3
    shift 3
    train "$name" "$beta2" "$seed" $((noise + 3 * stage)) 20 --batch-size "$batch" --end-learning-rate 1e-5 \
        --quant-recipe configs/recipes/minilm.yaml \
        --quant-stage-updates "$noise,$((noise + stage)),$((noise + 2 * stage))" \
        --criterion quantization_aware --wrapped-criterion sentence_prediction "$@"
}

# The dev-matched pairs take the place of the validation set, so that fairseq-train itself scores the end of
# each run.
head -n "${PAIRS:-2000}" "$mnli/dev_matched.tsv" >"$out/valid.tsv"
step data "$bin/fairseq-qn" data --model "$model" --train "$mnli/train10k_a.tsv" --valid "$out/valid.tsv" \
    -o "$out/bin"
step dense train dense 0.98 1 564 70 --batch-size 32 --max-epoch 1 --disable-validation \
    --criterion sentence_prediction --finetune-from-model "$out/bin/model/model.pt" # of two epochs: lr ends at 6e-5
for seed in $seeds; do
    for beta2 in ${BETAS:-0.999 0.98}; do
        cell=$beta2-$seed
        step "noise-$cell" quantised "noise-$cell" "$beta2" "$seed" --max-update "$noise" \
            --disable-validation \
            --finetune-from-model "$out/dense/checkpoint_last.pt"
        for moments in kept projected; do
            option=$([ $moments = kept ] && echo --quant-keep-moments || true)
            step "$moments-$cell" quantised "$moments-$cell" "$beta2" "$seed" \
                --max-update $((noise + 3 * stage)) \
                --no-save --restore-file "$out/noise-$cell/checkpoint_last.pt" $option
        done
    done
done
"$bin/python" run_scripts/accuracy/adam_moments.py "$out"
