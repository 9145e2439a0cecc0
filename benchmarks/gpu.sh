#!/usr/bin/env bash
# The first hour on a GPU:   bash benchmarks/gpu.sh DIR [more]
#
# Without "more": the card, tiny's training, whole iterations of three shapes, correctness of the kernels, benchmarks.
# With "more", as a second command: what peers (requirements-bench.txt) and torch.compile measure, and the 7B shape. All
# steps together end within $TOTAL seconds [590]; what comes too late is left out. Each step is a process with its own
# limit. It writes what it has measured as it goes, and a step that fails ends no other. DIR gets at most 8 files:
#
#   steps.txt   each step's exit code and seconds (124: it ran into its limit)     log.txt    everything that was printed
#   train.json  iterations (benchmarks.gpu_train)     parts.json  the card, decode steps, trees (benchmarks.gpu_parts)
#   bench-*.json  kernels by size (tests/test_bench_kernels.py)                    versions.txt
#
# Needs in $PYTHON [python3]: torch >= 2.11 and its triton, and what requirements.txt names beside them; pytest and
# pytest-benchmark for the last steps. Exit code 1: a step failed, the last line names it. Exit code 3: there is no CUDA
# device, everything ran at a tiny size, to test this script. Then no figure in DIR is a GPU's.
set -uo pipefail
[ $# -ge 1 ] && [ $# -le 2 ] && [ "${2:-more}" = more ] || { echo "usage: bash benchmarks/gpu.sh DIR [more]" >&2; exit 2; }
mkdir -p "$1" && OUT=$(cd "$1" && pwd) || exit 2
MORE=${2:-}
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}
cuda=$("$PYTHON" -c "import torch; print(int(torch.cuda.is_available()))") || exit 2
: > "$OUT/steps.txt" && : > "$OUT/log.txt" || exit 2
failed=()
TOTAL=${TOTAL:-$([ "$cuda" = 1 ] && echo 590 || echo 7200)} # seconds: a lent machine's longest command is 600

say() { echo "$@" | tee -a "$OUT/log.txt"; }

step() { # step NAME SECONDS COMMAND…: run it, with its output in the log too; remember a failure
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    [ "$cuda" = 1 ] || limit=$((limit * 10)) # a CPU, interpreted, and maybe shared
    [ "$limit" -le $((TOTAL - SECONDS - 10)) ] || limit=$((TOTAL - SECONDS - 10))
    if [ "$limit" -lt 10 ]; then
        say "== $name: left out, $TOTAL s are used up" && echo "$name: left out" >> "$OUT/steps.txt"
        failed+=("$name (left out)")
        return 0
    fi
    say "== $name (at most $limit s): $*"
    timeout -s INT --kill-after 10 "$limit" "$@" 2>&1 | tee -a "$OUT/log.txt"
    code=${PIPESTATUS[0]}
    echo "$name: exit code $code, $((SECONDS - start)) s" >> "$OUT/steps.txt"
    [ "$code" = 0 ] || failed+=("$name")
    return "$code"
}

checked() { # checked FILE: run a file of kernel tests, interpreted without a GPU; where one fails, say in which launch
    local name=${1##*/} pytest=("$PYTHON" -m pytest -p no:cacheprovider -W ignore::RuntimeWarning --tb=short "$1")
    if [ "$cuda" != 1 ]; then
        TRITON_INTERPRET=1 step "$name" 120 "${pytest[@]}"
    else
        step "$name" 60 "${pytest[@]}" || CUDA_LAUNCH_BLOCKING=1 step "$name again, launches one by one" 60 "${pytest[@]}" -x
    fi
}

bench() { # bench SIZE SECONDS PATTERN [OPTION…]: the kernels at one size; a tiny one without a GPU
    local size=$1 seconds=$2 pattern=$3
    shift 3
    [ "$cuda" = 1 ] || pattern="kernel and tiny"
    step "kernels $size${*:+ $*}" $((seconds + 30)) "$PYTHON" -m pytest -p no:cacheprovider \
        -W ignore::pytest.PytestConfigWarning tests/test_bench_kernels.py -k "$pattern" --bench-seconds "$seconds" \
        --bench-json "$OUT/bench-$size.json" "$@"
}

train() { # train SECONDS OPTION…: three iterations of a shape
    local seconds=$1
    shift
    [ "$cuda" = 1 ] || set -- --shape small "${@:3}"
    step "iterations $*" "$seconds" "$PYTHON" -m benchmarks.gpu_train --out "$OUT/train.json" "$@"
}

parts() { # parts NAME SECONDS
    step "$1" "$2" "$PYTHON" -m benchmarks.gpu_parts --out "$OUT/parts.json" "$1"
}

{
    nvidia-smi -L 2>&1 || true
    "$PYTHON" -c "
import platform
from importlib.metadata import distributions
print('python', platform.python_version())
print(*sorted(f'{d.name} {d.version}' for d in distributions()), sep='\n')"
} > "$OUT/versions.txt"
if [ "$cuda" != 1 ]; then
    say "no CUDA device: kernels are interpreted, sizes are tiny; no figure here is a GPU's"
    echo "no CUDA device" >> "$OUT/versions.txt"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi

if [ -z "$MORE" ]; then
    parts card 40
    RUN=$(mktemp -d) # its checkpoints are not results
    step "train_rlpa.py --ckpt" 90 "$PYTHON" train_rlpa.py --ckpt --run-dir "$RUN/run" --num-iterations 1 \
        --rollout-batch-size 8 --minibatch-size 4 --max-turns 2 --eval-dialogues 4
    rm -rf "$RUN"
    train 90 --shape 0.5B
    train 90 --shape 0.5B --kernels torch
    train 90 --shape 1.5B --critic shared
    train 120 --shape 3B --critic shared
    for file in tests/triton_*.py; do
        checked "$file"
    done
    parts decode 60
    parts tree 60
    parts workspace 30
    bench 3B 90 "bench and 3B and (eager or ours)"
    bench 0.5B 60 "bench and 0.5B and (eager or ours)"
else
    bench 3B 240 "bench and 3B" --bench-compile
    bench 7B 120 "bench and 7B"
    train 180 --shape 7B --critic shared --checkpointing
fi

say "all steps and their exit codes: $OUT/steps.txt"
[ "$cuda" = 1 ] || say "no CUDA device: no figure here is a GPU's"
if [ ${#failed[@]} -gt 0 ]; then
    say "FAILED: $(IFS=';'; echo "${failed[*]}")"
    exit 1
fi
say "no step failed"
[ "$cuda" = 1 ] || exit 3
