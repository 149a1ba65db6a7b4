#!/usr/bin/env bash
# The whole way on a small data set: environment, data, pre-training with Quant-Noise, fine-tuning, three
# stages of quantisation, one small file, and answers from that file.
#   bash run_scripts/quickstart.sh ["a sentence" ...]  ten minutes at most on two idle cores, set-up included
# Everything it makes lies in outputs/quickstart (OUT=... puts it elsewhere). What is done is not done again:
# delete the folder to start anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-outputs/quickstart}
begun=$SECONDS
bash run_scripts/setup.sh plot
py=.venv/bin/python
recipe=configs/recipes/quickstart.yaml
mkdir -p "$out"
source run_scripts/steps.sh

running=()
beside() { # beside COMMAND...: in a process group of its own, which an interrupt of this script ends too
    set -m
    "$@" &
    running+=($!)
    set +m
}
finish() { # waits for all that `beside` started
    local pid
    for pid in "${running[@]}"; do wait "$pid"; done
    running=()
}
trap 'for pid in ${running[@]+"${running[@]}"}; do kill -- "-$pid" 2>/dev/null || true; done' EXIT
trap 'exit 130' INT TERM

say() { echo "quickstart: $*"; }

cores=$("$py" -c '
import os
print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
threads=$((cores > 8 ? 8 : cores))      # a model this small keeps no more cores busy
half=$((threads > 1 ? threads / 2 : 1)) # for two runs side by side
# with other work on the machine, threads that wait by spinning were four times slower
export OMP_WAIT_POLICY=passive

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

classify() { # classify NAME OPTIONS...: fine-tuning from the pre-trained model, 6 epochs of 297 updates
    local name=$1
    shift
    OMP_NUM_THREADS=$half train "$name" 1782 5e-4 "$out/data/classify" \
        --task qn_sentence_prediction --num-classes 77 --init-token 0 --no-shuffle --batch-size 32 \
        --pooler-dropout 0.1 \
        --finetune-from-model "$out/pretrained/checkpoint_last.pt" "$@"
}

small() { # small CHECKPOINT FILE: freezes what is left to freeze, and writes the file, without an LM head
    .venv/bin/fairseq-qn compress "$1" --recipe "$recipe" -o "$2" --drop encoder.lm_head \
        --bpe sentencepiece --bpe-files "$out/data/sentencepiece.bpe.model"
}

score() { # score NAME FILE: size on disk and accuracy on the test sentences, in a process of its own
    "$py" run_scripts/quickstart_report.py score "$2" --rows run_scripts/data/banking77/test.tsv \
        --data "$out/data" \
        -o "$out/$1.json"
}

# 1. text -> pieces -> what fairseq reads
say "a dictionary of 1,000 pieces, and the sentences as fairseq reads them"
step data "$py" run_scripts/quickstart_data.py run_scripts/data/banking77 "$out/data"

# 2. masked language modelling with Quant-Noise. complete_doc: each sample is one sentence; with several
#    packed into one, as other modes do, <s> learned nothing of its sentence, and fine-tuning got worse than
#    from scratch
say "pre-training with noise"
export OMP_NUM_THREADS=$threads
step pretrained train pretrained 240 1e-3 "$out/data/pretrain" --task qn_masked_lm --criterion masked_lm \
    --tokens-per-sample 64 --sample-break-mode complete_doc --mask-prob 0.25 --max-tokens 1024 \
    --quant-recipe "$recipe"

# 3. fine-tuning, twice from that model: dense (no noise, nothing frozen), and with noise and three stages.
#    Both take the same updates, learning rates and batches in the same order, and none is chosen by its
#    score: the last update counts
say "fine-tuning twice, side by side, for minutes: dense, and in stages ($out/staged.log)"
beside step dense classify dense --criterion sentence_prediction
beside step staged classify staged --quant-recipe "$recipe" --quant-stage-updates 800,1100,1400 \
    --criterion quantization_aware --wrapped-criterion sentence_prediction
finish

# 4. the files: that of the stages, and for comparison the dense model frozen at once; each read again by a
#    new process
say "writing the files and reading them again"
export OMP_NUM_THREADS=$half
beside step compress small "$out/staged/checkpoint_last.pt" "$out/quickstart.qn.safetensors"
beside step compress_at_once small "$out/dense/checkpoint_last.pt" "$out/at_once.qn.safetensors"
finish
beside step score_dense score dense "$out/dense/checkpoint_last.pt"
beside step score_staged score staged "$out/quickstart.qn.safetensors"
finish
step score_at_once score at_once "$out/at_once.qn.safetensors"
"$py" run_scripts/quickstart_report.py table "$out/dense.json" "$out/at_once.json" "$out/staged.json" \
    --logs "$out/dense.log" "$out/staged.log" -o "$out/result"

[ $# -gt 0 ] || set -- "where is my new card?" "i was charged twice for one purchase" \
    "how do i change my pin"
.venv/bin/fairseq-qn predict "$out/quickstart.qn.safetensors" "$@" 2>/dev/null
say "$out/quickstart.qn.safetensors, $out/result.png, $out/result.json; $((SECONDS - begun)) s in all"
