#!/usr/bin/env bash
# The whole way on a small data set: environment, data, pre-training with Quant-Noise, fine-tuning, three stages of
# quantisation, one small file, and answers from that file.
#   bash run_scripts/quickstart.sh ["a sentence" ...]      at most ten minutes on two idle cores, set-up included
# Everything it makes lies in outputs/quickstart (OUT=... puts it elsewhere). What is done is not done again: delete the
# folder to start anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-outputs/quickstart}
begun=$SECONDS
bash run_scripts/setup.sh plot
py=.venv/bin/python
recipe=configs/recipes/quickstart.yaml
mkdir -p "$out"

step() { # step NAME COMMAND...: once only; its output goes to OUT/NAME.log
    local name=$1 started=$SECONDS
    shift
    [ ! -f "$out/$name.done" ] || return 0
    if ! "$@" >"$out/$name.log" 2>&1; then
        printf 'quickstart: %-40s FAILED after %d s\n' "$name" $((SECONDS - started))
        tail -n 15 "$out/$name.log" >&2
        return 1
    fi
    printf 'quickstart: %-40s %4d s\n' "$name" $((SECONDS - started)) | tee "$out/$name.done"
}

both() { # both PID PID: waits for two steps; fails if one did
    local status=0 pid
    for pid; do wait "$pid" || status=1; done
    return $status
}

cores=$("$py" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
threads=$((cores > 8 ? 8 : cores))        # a model this small does not keep more cores busy
half=$((threads > 1 ? threads / 2 : 1))   # for two runs side by side

train() { # train NAME UPDATES LR OPTIONS...; a checkpoint_last.pt in OUT/NAME is gone on from
    local name=$1 updates=$2 lr=$3
    shift 3
    .venv/bin/fairseq-train --cpu --user-dir fairseq_qn --arch qn_roberta \
        --encoder-layers 2 --encoder-embed-dim 256 --encoder-ffn-embed-dim 1024 --encoder-attention-heads 4 \
        --max-positions 64 --dropout 0.1 --attention-dropout 0.0 \
        --optimizer adam --adam-betas '(0.9,0.98)' --adam-eps 1e-6 --clip-norm 1.0 --weight-decay 0.01 \
        --lr "$lr" --lr-scheduler polynomial_decay --warmup-updates 100 \
        --total-num-update "$updates" --max-update "$updates" \
        --save-dir "$out/$name" --no-epoch-checkpoints --num-workers 0 --seed 1 \
        --log-format simple --log-interval 100 "$@"
}

classify() { # classify NAME OPTIONS...: fine-tuning from the pre-trained model; 297 updates are an epoch of 9,496 sentences
    local name=$1
    shift
    OMP_NUM_THREADS=$half train "$name" "$finetune_updates" 5e-4 "$out/data/classify" \
        --task qn_sentence_prediction --num-classes 77 --init-token 0 --no-shuffle --batch-size 32 --pooler-dropout 0.1 \
        --finetune-from-model "$out/pretrained/checkpoint_last.pt" "$@"
}

small() { # small CHECKPOINT FILE: freezes what is not frozen yet, and writes the file. A classifier needs no LM head
    .venv/bin/fairseq-qn compress "$1" --recipe "$recipe" -o "$2" --drop encoder.lm_head \
        --bpe sentencepiece --bpe-files "$out/data/sentencepiece.bpe.model"
}

score() { # score NAME FILE: size on disk and accuracy on the test sentences, in a process of its own
    "$py" run_scripts/quickstart_report.py score "$2" --rows run_scripts/data/banking77/test.tsv --data "$out/data" \
        -o "$out/$1.json"
}

pretrain_updates=240
finetune_updates=1782

# 1. text -> pieces -> what fairseq reads
step data "$py" run_scripts/quickstart_data.py run_scripts/data/banking77 "$out/data"

# 2. masked language modelling with Quant-Noise; complete_doc: a sentence a sample
export OMP_NUM_THREADS=$threads
step pretrained train pretrained $pretrain_updates 1e-3 "$out/data/pretrain" --task qn_masked_lm --criterion masked_lm \
    --tokens-per-sample 64 --sample-break-mode complete_doc --mask-prob 0.25 --max-tokens 1024 --quant-recipe "$recipe"

# 3. fine-tuning, twice from that model and side by side: dense (no noise, nothing frozen), and with noise and a stage
#    frozen after 800, 1,100 and 1,400 updates; the same updates, learning rates and order of batches
step dense classify dense --criterion sentence_prediction &
dense=$!
step staged classify staged --quant-recipe "$recipe" --quant-stage-updates 800,1100,1400 \
    --criterion quantization_aware --wrapped-criterion sentence_prediction &
both $dense $!

# 4. the files: frozen while training went on, and for comparison the dense model frozen at once
export OMP_NUM_THREADS=$half
step compress small "$out/staged/checkpoint_last.pt" "$out/quickstart.qn.safetensors" &
staged=$!
step compress_at_once small "$out/dense/checkpoint_last.pt" "$out/at_once.qn.safetensors" &
both $staged $!

# 5. each read again in a process of its own
step score_dense score dense "$out/dense/checkpoint_last.pt" &
dense=$!
step score_small score staged "$out/quickstart.qn.safetensors" &
both $dense $!
step score_at_once score at_once "$out/at_once.qn.safetensors"
"$py" run_scripts/quickstart_report.py table "$out/dense.json" "$out/at_once.json" "$out/staged.json" -o "$out/result"

[ $# -gt 0 ] || set -- "where is my new card?" "i was charged twice for one purchase" "how do i change my pin"
.venv/bin/fairseq-qn predict "$out/quickstart.qn.safetensors" "$@" 2>/dev/null
echo "quickstart: $out/quickstart.qn.safetensors, $out/result.png, $out/result.json; $((SECONDS - begun)) s in all"
