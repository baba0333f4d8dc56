#!/usr/bin/env bash
# What to measure where there is a GPU, in this order. Tables, logs without their source, and figures as JSON go to
# OUT_FOLDER (logs), named MACHINE_*; make README.md's table of them with `python -m tools.reports.docs`.
#
#   CORPUS=folder TOKENIZER=fineweb_1024_bpe.model tools/measure/gpu_checks.sh 1|2|3|4 [OUT_FOLDER [VARIANT ...]]
#
#   1  bring-up: 120 s of training, quantization, scoring and TTT on 2M tokens of validation text
#   2  where a training step goes: each attention kernel that runs, micro-batches of one and two spans
#   3  speed of scoring and of TTT, in windows and streaming
#   4  quality at equal time: 300 s of training for each VARIANT below, or for those named
#
# CORPUS holds train.jsonl.xz and val.jsonl.xz; their shards stay in data/gpu_checks. MACHINE is h200 and PYTHON python3
# unless they are set. DRY=1 runs the same commands at a tiny size, on a CPU too, with MACHINE dry.
set -euo pipefail

VARIANTS=(  # name, then what differs from the defaults
    "ema SWA_ENABLED=0"
    "together"
)

fail() { echo "error: $1" >&2; exit 2; }

[[ ${1:-} =~ ^[1-4]$ ]] || fail "usage: CORPUS=folder TOKENIZER=file tools/measure/gpu_checks.sh 1|2|3|4 [OUT_FOLDER [VARIANT ...]]"
[[ -f ${CORPUS:-}/train.jsonl.xz && -f ${CORPUS:-}/val.jsonl.xz ]] ||
    fail "CORPUS=${CORPUS:-}: no folder with train.jsonl.xz and val.jsonl.xz"
[[ -f ${TOKENIZER:-} ]] || fail "TOKENIZER=${TOKENIZER:-}: no such file"
corpus=$(realpath "$CORPUS") tokenizer=$(realpath "$TOKENIZER") entry=$1 out=${2:+$(realpath -m "$2")} python=${PYTHON:-python3}
cd "$(dirname "$0")/../.."
out=${out:-$PWD/logs} machine=${MACHINE:-h200} data=data/gpu_checks val_tokens=2000001 steps=20 span=98304
kernels=(cudnn flash)
if [[ ${DRY:-} ]]; then
    machine=${MACHINE:-dry} data=data/gpu_checks_dry val_tokens=3001 steps=3 span=128 kernels=()
    export NUM_LAYERS=2 MODEL_DIM=32 NUM_HEADS=2 NUM_KV_HEADS=1 ROPE_DIMS=8 VE_LAYERS=1 TRAIN_SEQ_LEN=64 WARMUP_STEPS=2 \
        TRAIN_BATCH_TOKENS=1024 ITERATIONS=3 HOLDOUT_TOKENS=256 EVAL_SEQ_LEN=64 VAL_BATCH_SIZE=4096 TTT_CHUNK_TOKENS=1024
fi
export DATA_PATH=$data TOKENIZER_PATH=$data/tokenizer.model
mkdir -p "$out" logs "$data"
figures=$(mktemp)
trap 'rm -f "$figures"' EXIT

make_data() {
    cp "$tokenizer" "$TOKENIZER_PATH"
    [[ -e $data/fineweb_train_000000.bin ]] || "$python" -m tools.data.make_shards --tokenizer "$tokenizer" --out "$data" \
        --val "$corpus/val.jsonl.xz" --train "$corpus/train.jsonl.xz"
    "$python" - "$data/fineweb_val_000000.bin" "$val_tokens" <<'END'
import sys
import numpy as np
path, count = sys.argv[1], int(sys.argv[2])
header, tokens = np.fromfile(path, "<i4", 256), np.fromfile(path, "<u2", offset=1024)[:count]
header[2] = len(tokens)
with open(path, "wb") as file:
    file.write(header.tobytes() + tokens.tobytes())
END
}

# train NAME SECONDS [SETTING=value ...]: a run and its log. At about 650 ms a step, SECONDS hold a tenth and less of the
# record's 7,000 steps; what it counts in steps shrinks likewise, or the learning rate would fall from the first step on.
train() {
    local name=$1 seconds=$2 status=0
    env RUN_ID="check_$name" MAX_WALLCLOCK_SECONDS="$seconds" VAL_LOSS_EVERY=0 TRAIN_LOG_EVERY=20 \
        WARMDOWN_ITERS=$((seconds * 3 / 4)) MUON_MOMENTUM_WARMUP_STEPS=$((seconds / 3)) SWA_EVERY=$((seconds / 60)) \
        EMA_DECAY=0.96 "${@:3}" "$python" train_gpt.py || status=$?
    sed '1,/^=\{100\}$/d' "logs/check_$name.txt" > "$out/${machine}_$name.txt"
    return $status
}

# bench NAME ARGUMENT ...: adds a table to NAME.txt and figures to NAME.jsonl
bench() {
    local to=$out/${machine}_$1 what=${*:2}
    echo "== RECIPE=${RECIPE:-record} EVAL_MODE=${EVAL_MODE:-} EVAL_STRIDE=${EVAL_STRIDE:-64} MICRO_BATCH_TOKENS=${MICRO_BATCH_TOKENS:-0} bench.py ${what%% --profile*}" |
        tee -a "$to.txt"
    "$python" -m tools.measure.bench "${@:2}" --shards --steps $steps --json "$figures" | tee -a "$to.txt" || return 1
    cat "$figures" >> "$to.jsonl"
}

make_data
case $entry in
1)
    train bringup 120 ;;
2)
    rm -f "$out/${machine}_step".{txt,jsonl}
    if [[ ${DRY:-} ]] || "$python" -c "import flash_attn_interface" 2> /dev/null; then
        kernels=("" "${kernels[@]}")  # train_gpt.py's choice, which else is among them
    fi
    for kernel in "${kernels[@]}"; do
        for spans in 1 2; do
            MICRO_BATCH_TOKENS=$((spans * span)) bench step train ${kernel:+--attention "$kernel"} \
                --profile "$out/${machine}_step_${kernel:-default}_$spans.json.gz" ||
                echo "did not run" | tee -a "$out/${machine}_step.txt"
        done
    done
    [[ -e $out/${machine}_step.jsonl ]] || fail "no attention kernel ran" ;;
3)
    rm -f "$out/${machine}_eval".{txt,jsonl}
    bench eval score
    EVAL_STRIDE=${EVAL_SEQ_LEN:-2048} bench eval score
    bench eval ttt
    EVAL_MODE=streaming bench eval score
    RECIPE=best bench eval ttt ;;
4)
    ran= failed=
    for variant in "${VARIANTS[@]}"; do
        read -ra words <<< "$variant"
        if [[ $# -lt 3 || " ${*:3} " == *" ${words[0]} "* ]]; then
            ran=1
            train "quality_${words[0]}" 300 "${words[@]:1}" || failed+=" ${words[0]}"
        fi
    done
    [[ $ran ]] || fail "no such variant: ${*:3}"
    [[ ! $failed ]] || fail "these did not finish:$failed" ;;
esac
