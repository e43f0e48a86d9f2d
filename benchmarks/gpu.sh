#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than nine minutes, without a network: build, test, check, time, plot.
#
#   bash benchmarks/gpu.sh          on a GPU machine: results in $OUT, or in benchmarks/results/gpu-run
#   bash benchmarks/gpu.sh --dry    on a CPU, smallest sizes: the same phases, to see that the script works
#
# Packages of others to compare with, which must not be fetched there, are taken as wheels from wheels/ or .whl/:
#   pip download --no-deps -d wheels liger-kernel
# PYTHON chooses the interpreter (python3), MINUTES the time for all of it (8.7).
# Every phase has a time limit of its own, at which it is interrupted, so that tests still say what failed; one that fails or is cut off does not stop the others. Rows are written as
# they are measured. The last thing printed is a short table, and what failed.
set -uo pipefail
cd "$(dirname "$0")/.."
unset ARL_FAST_IMPL
PYTHON=${PYTHON:-python3}
OUT=${OUT:-$PWD/benchmarks/results/gpu-run}
DEVICE=cuda TINY=() LIMIT=$(awk -v m="${MINUTES:-8.7}" 'BEGIN { print int(60 * m) }')
if [ "${1:-}" = --dry ]; then DEVICE=cpu TINY=(--tiny); fi
mkdir -p "$OUT"
ROWS=$OUT/rows.jsonl LOG=$OUT/log.txt TESTS=$OUT/tests.txt
rm -f "$ROWS"
: >"$LOG" >"$TESTS"
SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
export PYTHONPATH="$PWD:$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
export TORCHINDUCTOR_CACHE_DIR="$SITE/inductor" TRITON_CACHE_DIR="$SITE/triton"
FAILED=()

# phase NAME SECONDS FILE COMMAND...: within its own limit and what is left of all; output to FILE, its end to the terminal
phase() {
    local name=$1 seconds=$2 file=$3 begin=$SECONDS status
    shift 3
    local left=$((LIMIT - SECONDS - 5))
    if [ "$left" -lt 5 ]; then
        FAILED+=("$name: no time left")
        return
    fi
    [ "$seconds" -lt "$left" ] || seconds=$left
    echo "== $name (at $SECONDS s, at most $seconds s)"
    echo "== $name: $*" >>"$file"
    timeout --signal=INT --kill-after=6 "$seconds" "$@" >>"$file" 2>&1
    status=$?
    tail -n "${SHOW:-3}" "$file" | cut -c1-300
    echo "-- $name: status $status, $((SECONDS - begin)) s"
    if [ "$status" = 124 ] || [ "$status" = 137 ]; then FAILED+=("$name: cut off after $seconds s"); elif [ "$status" != 0 ]; then FAILED+=("$name: status $status, see $(basename "$file")"); fi
}

# The machine, first: what the numbers belong to.
{ command -v nvidia-smi >/dev/null && nvidia-smi; "$PYTHON" -c 'import torch; print(torch.__version__, torch.version.cuda)'; nvcc --version; } >>"$LOG" 2>&1

shopt -s nullglob
WHEELS=(wheels/*.whl .whl/*.whl)
if [ ${#WHEELS[@]} -gt 0 ]; then
    phase wheels 30 "$LOG" "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$SITE" "${WHEELS[@]}"
fi

if [ "$DEVICE" = cuda ]; then
    # a fast build: the machine code of this GPU only
    TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>>"$LOG")}
    export TORCH_CUDA_ARCH_LIST MAX_JOBS=${MAX_JOBS:-$(nproc)}
    phase build 150 "$LOG" env ARL_FAST_BUILD=cuda "$PYTHON" setup.py build_ext --inplace
    if ! "$PYTHON" -c 'import arl_fast._C' 2>>"$LOG"; then
        phase "build for the CPU" 90 "$LOG" env ARL_FAST_BUILD=cpu "$PYTHON" setup.py build_ext --inplace
    fi
else
    phase build 60 "$LOG" "$PYTHON" -c 'import setuptools'
fi
SHOW=8 phase "who serves what" 60 "$LOG" "$PYTHON" -m arl_fast

PYTEST=("$PYTHON" -m pytest -q -p no:cacheprovider --tb=short --no-header -W ignore --maxfail=30)
if [ "$DEVICE" = cuda ]; then
    phase "tests of what only a GPU can get wrong" 100 "$TESTS" "${PYTEST[@]}" tests/test_gpu.py
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then WORKERS=(-n 6); else WORKERS=(); fi
    phase "the contract on the GPU" 80 "$TESTS" "${PYTEST[@]}" "${WORKERS[@]}" tests/test_gpu_contract.py
else
    phase "tests of what only a GPU can get wrong" 100 "$TESTS" env ARL_TEST_DEVICE=cpu "${PYTEST[@]}" tests/test_gpu.py -k "small_steps or int32"
    phase "the contract on the GPU" 80 "$TESTS" env ARL_TEST_DEVICE=cpu "${PYTEST[@]}" tests/test_gpu_contract.py -k "out_of_range or against_truth"
fi

RUN=("$PYTHON" -m benchmarks.run --device "$DEVICE" --out "$ROWS" "${TINY[@]}")
SHOW=1 phase "timing the loss" 170 "$LOG" "${RUN[@]}" --phases micro
SHOW=1 phase "timing whole steps" 60 "$LOG" "${RUN[@]}" --phases step
SHOW=1 phase "timing linear heads" 45 "$LOG" "${RUN[@]}" --phases linear
SHOW=1 phase "timing over B, C and M" 60 "$LOG" "${RUN[@]}" --phases scaling

if [ "$DEVICE" = cuda ] && command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 SHOW=2 phase "$tool" 60 "$OUT/sanitizer.txt" \
            compute-sanitizer --tool "$tool" --error-exitcode 99 --print-limit 20 "${PYTEST[@]}" tests/test_gpu.py -k "small_steps and native"
    done
fi

phase plots 40 "$LOG" "$PYTHON" -m benchmarks.plot --rows "$ROWS" --out "$OUT"

echo
"$PYTHON" -m benchmarks.tables "$ROWS" | cut -c1-400
echo
grep -hE '^(FAILED|ERROR) |passed|failed' "$TESTS" | cut -c1-200 | tail -25
[ -f "$OUT/sanitizer.txt" ] && grep -h 'ERROR SUMMARY\|RACECHECK SUMMARY' "$OUT/sanitizer.txt"
for failure in "${FAILED[@]}"; do echo "FAILED $failure"; done
echo "$SECONDS s; rows and plots: $OUT"
[ "$DEVICE" = cpu ] || echo "to keep them: cp $ROWS benchmarks/results/$("$PYTHON" -c 'from benchmarks import machine; print(machine.slug("cuda"))').jsonl; python -m benchmarks.plot"
[ ${#FAILED[@]} = 0 ]
