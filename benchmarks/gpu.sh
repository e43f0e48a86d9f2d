#!/usr/bin/env bash
# Everything that needs a GPU, in two calls of less than nine minutes each, without a network. The most
# valuable comes first in each, and every phase writes its results as it goes: a cut-off loses nothing.
#
#   bash benchmarks/gpu.sh check            build; is everything right? native first, then Triton
#   bash benchmarks/gpu.sh measure          how fast is it? (it builds where the first call has left no build)
#   bash benchmarks/gpu.sh check --dry      on a CPU, smallest sizes: the same phases, to see that all works
#
# Results go to $OUT, or to benchmarks/results/gpu-run. Packages of others to compare with, which must not be
# fetched there, are taken as wheels from wheels/ or .whl/:  pip download --no-deps -d wheels liger-kernel
# PYTHON chooses the interpreter (python3), MINUTES the time for a call (8.7).
# Every phase has a limit of its own, at which it is interrupted, so that tests still say what failed. A phase
# that fails or is cut off does not stop the others. The last thing printed is what failed.
set -uo pipefail
cd "$(dirname "$0")/.."
unset ARL_FAST_IMPL
CALL=${1:-} DRY=${2:-}
if [ "$CALL" != check ] && [ "$CALL" != measure ]; then
    echo "usage: bash benchmarks/gpu.sh check|measure [--dry]" >&2
    exit 2
fi
PYTHON=${PYTHON:-python3}
OUT=${OUT:-$PWD/benchmarks/results/gpu-run}
DEVICE=cuda TINY=() LIMIT=$(awk -v m="${MINUTES:-8.7}" 'BEGIN { print int(60 * m) }')
if [ "$DRY" = --dry ]; then DEVICE=cpu TINY=(--tiny); fi
mkdir -p "$OUT"
ROWS=$OUT/rows.jsonl LOG=$OUT/log-$CALL.txt TESTS=$OUT/tests.txt
: >"$LOG"
[ "$CALL" = check ] && : >"$TESTS"
[ "$CALL" = measure ] && rm -f "$ROWS"
SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
export PYTHONPATH="$PWD:$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
# What one phase has compiled, the next need not. TRITON_CACHE_DIR may name a folder that outlives the call.
export TORCHINDUCTOR_CACHE_DIR="$SITE/inductor" TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$SITE/triton}"
FAILED=()

# phase NAME SECONDS FILE COMMAND...: within its own limit and what is left of all; shows the end of FILE
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
    case $status in
    0) ;;
    124 | 137) FAILED+=("$name: cut off after $seconds s") ;;
    *) FAILED+=("$name: status $status, see $(basename "$file")") ;;
    esac
}

# The machine, first: what the numbers belong to.
{
    command -v nvidia-smi >/dev/null && nvidia-smi
    "$PYTHON" -c 'import torch; print(torch.__version__, torch.version.cuda)'
    nvcc --version
} >>"$LOG" 2>&1

shopt -s nullglob
WHEELS=(wheels/*.whl .whl/*.whl)
if [ ${#WHEELS[@]} -gt 0 ]; then
    PIP=("$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$SITE")
    phase wheels 30 "$LOG" "${PIP[@]}" "${WHEELS[@]}"
fi

serves_cuda() {
    "$PYTHON" -c 'from arl_fast.implementations.native import unavailable
raise SystemExit(unavailable("cuda") is not None)'
}
if [ "$DEVICE" = cuda ] && ! { [ "$CALL" = measure ] && serves_cuda 2>>"$LOG"; }; then
    # a fast build: the machine code of this GPU only
    CAPABILITY='import torch; print("%d.%d" % torch.cuda.get_device_capability())'
    TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c "$CAPABILITY" 2>>"$LOG")}
    export TORCH_CUDA_ARCH_LIST MAX_JOBS=${MAX_JOBS:-$(nproc)}
    phase build 150 "$LOG" env ARL_FAST_BUILD=cuda "$PYTHON" setup.py build_ext --inplace
fi
SHOW=8 phase "who serves what" 60 "$LOG" "$PYTHON" -m arl_fast

check() {
    local pytest=("$PYTHON" -m pytest -q -p no:cacheprovider --tb=short --no-header -W ignore --maxfail=30)
    local workers=() steps=tests/test_gpu.py contract=tests/test_gpu_contract.py
    "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 12)
    if [ "$DEVICE" = cpu ]; then
        export ARL_TEST_DEVICE=cpu
        phase "small steps" 60 "$OUT/sanitizer.txt" "$PYTHON" -m benchmarks.gpu_driver --device cpu
        phase "steps on a GPU" 100 "$TESTS" "${pytest[@]}" "$steps" -k "small_steps or int32"
        phase "the contract" 80 "$TESTS" "${pytest[@]}" "$contract" -k "out_of_range or against_truth"
        return
    fi
    # What only a GPU can show of the native kernels: shared memory, streams, graphs, launches, size.
    local first="small_steps or shared_memory or streams or captured or reduce_overhead or launch or 31"
    phase "native on a GPU" 60 "$TESTS" "${pytest[@]}" "$steps" -k "native and ($first)"
    if command -v compute-sanitizer >/dev/null; then
        local sanitizer=(compute-sanitizer --error-exitcode 99 --print-limit 20)
        for tool in memcheck racecheck; do
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 SHOW=2 phase "$tool" 60 "$OUT/sanitizer.txt" \
                "${sanitizer[@]}" --tool "$tool" "$PYTHON" -m benchmarks.gpu_driver
        done
    fi
    phase "the contract, native" 80 "$TESTS" "${pytest[@]}" "${workers[@]}" "$contract" -k "not triton"
    local rest="not triton and not ($first)"
    phase "native, the rest" 60 "$TESTS" "${pytest[@]}" "${workers[@]}" "$steps" -k "$rest"
    # Triton, whose compilations take most of this, last.
    phase "Triton on a GPU" 120 "$TESTS" "${pytest[@]}" "${workers[@]}" "$steps" -k triton
    phase "the contract, Triton" 120 "$TESTS" "${pytest[@]}" "${workers[@]}" "$contract" -k triton
}

measure() {
    local run=("$PYTHON" -m benchmarks.run --device "$DEVICE" --out "$ROWS" "${TINY[@]}")
    SHOW=1 phase "timing the loss" 170 "$LOG" "${run[@]}" --phases micro
    if [ "$DEVICE" = cuda ] && command -v ncu >/dev/null; then
        # DRAM bytes of a forward kernel for short, long and very long rows
        local metrics=dram__bytes_read.sum,dram__bytes_write.sum
        for shape in "2048 1000 float32" "1024 32000 float32" "1024 128256 bfloat16"; do
            # shellcheck disable=SC2086
            SHOW=8 phase "DRAM bytes of $shape" 40 "$OUT/ncu.txt" ncu --metrics "$metrics" \
                --kernel-name regex:forward_kernel --launch-count 1 "$PYTHON" -m benchmarks.one_step $shape
        done
    fi
    SHOW=1 phase "timing whole steps" 60 "$LOG" "${run[@]}" --phases step
    SHOW=1 phase "timing linear heads" 45 "$LOG" "${run[@]}" --phases linear
    SHOW=1 phase "timing over B, C and M" 60 "$LOG" "${run[@]}" --phases scaling
    phase plots 30 "$LOG" "$PYTHON" -m benchmarks.plot --rows "$ROWS" --out "$OUT"
    SHOW=1 phase "timing what torch.compile makes" 100 "$LOG" "${run[@]}" --phases compiled
    echo
    "$PYTHON" -m benchmarks.tables "$ROWS" | cut -c1-400
}

"$CALL"
echo
[ "$CALL" = check ] && grep -hE '^(FAILED|ERROR) |passed|failed' "$TESTS" | cut -c1-200 | tail -25
[ -f "$OUT/sanitizer.txt" ] && grep -h 'ERROR SUMMARY\|RACECHECK SUMMARY' "$OUT/sanitizer.txt"
for failure in "${FAILED[@]}"; do echo "FAILED $failure"; done
echo "$SECONDS s; results: $OUT"
if [ "$DEVICE" = cuda ] && [ "$CALL" = measure ]; then
    SLUG=$("$PYTHON" -c 'from benchmarks import machine; print(machine.slug("cuda"))')
    echo "to keep them: cp $ROWS benchmarks/results/$SLUG.jsonl; python -m benchmarks.plot"
fi
[ ${#FAILED[@]} = 0 ]
