#!/usr/bin/env bash
# All that a GPU can say about the kernels, within 8 minutes:   bash benchmarks/gpu.sh DIR
#
# Writes to DIR: versions.txt, correctness.log (tests/triton_*.py, native, at Qwen-2.5's sizes), table.txt and bench.json
# (tests/test_bench_kernels.py). Needs torch >= 2.11, triton >= 3.6, pytest, pytest-benchmark, numpy and what the trainer
# imports (safetensors, tokenizers, huggingface_hub, requests, tqdm) in $PYTHON; peers
# (requirements-bench.txt) are measured if they are there. Without a CUDA device the kernels run in Triton's interpreter
# and the benchmarks at a tiny size, to test this script; it then ends with status 3.
set -uo pipefail
[ $# -eq 1 ] || { echo "usage: bash benchmarks/gpu.sh DIR" >&2; exit 2; }
mkdir -p "$1" && OUT=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=.
pytest() { "$PYTHON" -m pytest -p no:cacheprovider -W "ignore::pytest.PytestConfigWarning" "$@"; }

cuda=$("$PYTHON" -c "import torch; print(int(torch.cuda.is_available()))") || exit 2
{
    nvidia-smi -L 2>&1 || true
    "$PYTHON" -c "
import platform
from importlib.metadata import distributions
print('python', platform.python_version())
print(*sorted(f'{d.name} {d.version}' for d in distributions()), sep='\n')"
} > "$OUT/versions.txt"

status=0
if [ "$cuda" = 1 ]; then
    timeout --kill-after 10 200 "$PYTHON" -m pytest -p no:cacheprovider tests/triton_*.py > "$OUT/correctness.log" 2>&1 || status=1
    pytest tests/test_bench_kernels.py -k bench --bench-seconds 240 --benchmark-json "$OUT/bench.json" \
        > "$OUT/table.txt" 2>&1 || status=1
else
    echo "no CUDA device: kernels interpreted, benchmarks at a tiny size; nothing here is a GPU's result" | tee "$OUT/NO_GPU"
    : > "$OUT/correctness.log"
    for file in tests/triton_*.py; do
        TRITON_INTERPRET=1 pytest "$file" >> "$OUT/correctness.log" 2>&1 || status=1
    done
    pytest tests/test_bench_kernels.py -rs > "$OUT/table.txt" 2>&1 || status=1
fi

tail -n 3 "$OUT/correctness.log"
cat "$OUT/table.txt"
[ $status = 0 ] || echo "FAILED: see $OUT/correctness.log and $OUT/table.txt"
[ "$cuda" = 1 ] || exit 3
exit $status
