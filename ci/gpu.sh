#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in one command:
#
#   bash ci/gpu.sh                  all stages
#   bash ci/gpu.sh tests bench      some of them; each takes less than 10 minutes
#
# tests      the test suite with compiled kernels, nothing interpreted
# sanitize   compute-sanitizer over every kernel configuration (SANITIZE_TOOLS picks tools)
# bits       the same bits in 100 runs of every kernel configuration
# bench      log-probs against the trainers' losses, and the row of 20 lengths; into bench/results/
# logits     logits and token log-probs against Liger's and TRL's kernels
# linear     hidden states and head against every fused head (BENCH_ARGS adds options to these three)
# step       one TRL training step, Qwen2.5-0.5B's and 1.5B's shape
# curves     200 training steps with TRL's loss and with ours, float32: the curves and their distance
# profile    DRAM bytes of the kernels by ncu, where the machine lets ncu read counters
#
# Uses the python3 at hand when it has torch, triton and sees the GPU, else .venv, else makes it.
# For the peers without their requirements (what is missing is left out and said so):
#   pip install --no-deps --target .venv-peers trl==1.16.0 verl==0.9.1 liger-kernel==0.8.5 \
#       cut-cross-entropy==25.1.1
# Exits 1 without a CUDA device or when a stage fails, 2 on a wrong argument.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

# shellcheck source=ci/env.sh
source ci/env.sh
help_if_asked "$@"

STAGES=(tests sanitize bits bench logits linear step curves profile)
for stage in "$@"; do
    if ! printf '%s\n' "${STAGES[@]}" | grep -qx -- "$stage"; then
        echo "ci/gpu.sh: unknown stage '$stage': choose from ${STAGES[*]}" >&2
        exit 2
    fi
done
wanted=("$@")
[ $# -eq 0 ] && wanted=("${STAGES[@]}")

sees_gpu() { "$1" -c 'import torch, triton; assert torch.cuda.is_available()' 2>/dev/null; }
PYTHON="${PYTHON:-}"
if [ -z "$PYTHON" ]; then
    for candidate in python3 .venv/bin/python; do
        if command -v "$candidate" >/dev/null && sees_gpu "$candidate"; then
            PYTHON="$candidate"
            break
        fi
    done
fi
if [ -z "$PYTHON" ] && ! is_whole && command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    ensure_env test,bench || exit 1 # sets PYTHON
fi
if [ -z "$PYTHON" ] || ! sees_gpu "$PYTHON"; then
    echo "ci/gpu.sh: no CUDA device that torch can see (and triton with it): nothing was run" >&2
    exit 1
fi

unset TRITON_INTERPRET
export PYTHONUNBUFFERED=1
RESULTS=bench/results
mkdir -p "$RESULTS"
slug="$("$PYTHON" -c 'import re, torch
print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')"
stamp="$RESULTS/$slug-$(date -u +%F)"
"$PYTHON" -c 'import sys, torch, triton
print(f"{torch.cuda.get_device_name()}: python {sys.version.split()[0]}, torch {torch.__version__}, "
      f"triton {triton.__version__}")'
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

run_tests() {
    "$PYTHON" -m pytest tests -q -ra 2>&1 | tee "$stamp-tests.txt"
}

run_sanitize() {
    local tool found=0 sanitizer="${COMPUTE_SANITIZER:-}"
    for candidate in compute-sanitizer "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" \
        /usr/local/cuda/compute-sanitizer/compute-sanitizer; do
        [ -z "$sanitizer" ] && sanitizer="$(command -v "$candidate" || true)"
    done
    if [ -z "$sanitizer" ]; then
        echo "sanitize: compute-sanitizer is not here: install the CUDA toolkit or set COMPUTE_SANITIZER"
        return 1
    fi
    # Without it first: every kernel is then compiled and cached.
    "$PYTHON" ci/sanitize.py || return 1
    for tool in ${SANITIZE_TOOLS:-memcheck racecheck initcheck synccheck}; do
        echo "compute-sanitizer --tool $tool"
        # No caching allocator: each tensor is its own allocation, so that its edges are watched.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 1 \
            --print-limit 20 "$PYTHON" ci/sanitize.py 2>&1 | tee "$stamp-sanitize-$tool.txt"
        [ "${PIPESTATUS[0]}" -eq 0 ] || found=1
    done
    return $found
}

run_bits() {
    "$PYTHON" ci/sanitize.py --repeat 100 2>&1 | tee "$stamp-bits.txt"
}

compare() { # suite
    # shellcheck disable=SC2086
    "$PYTHON" -m bench.table --suite "$1" --results "$RESULTS" --figure "$stamp-$1.png" \
        --markdown ${BENCH_ARGS:-} 2>&1 | tee "$stamp-$1.txt"
    return "${PIPESTATUS[0]}"
}

run_bench() {
    compare log_probs || return 1
    "$PYTHON" -m pytest bench -q --benchmark-disable -k no_compile
}

run_logits() {
    compare logits && compare token_log_probs
}

run_linear() {
    compare linear && compare cross_entropy
}

run_step() {
    local shape
    for shape in 0.5b 1.5b; do
        "$PYTHON" -m bench.train_step --shape "$shape" --results "$RESULTS" 2>&1 |
            tee "$stamp-step-$shape.txt"
        [ "${PIPESTATUS[0]}" -eq 0 ] || return 1
    done
}

run_curves() {
    "$PYTHON" -m bench.train_curves --results "$RESULTS" 2>&1 | tee "$stamp-curves.txt"
    return "${PIPESTATUS[0]}"
}

run_profile() {
    if ! command -v ncu >/dev/null; then
        echo "profile: ncu is not here: skipped"
        return 0
    fi
    "$PYTHON" -m bench.one_call # compiles; ncu would profile compilation's neighbours too
    if ncu --csv --clock-control none --kernel-name regex:policy_loss \
        --metrics dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum \
        "$PYTHON" -m bench.one_call >"$stamp-ncu.csv" 2>&1; then
        "$PYTHON" -m bench.one_call --read "$stamp-ncu.csv"
    else
        echo "profile: ncu cannot read this GPU's counters: skipped"
        tail -3 "$stamp-ncu.csv"
        rm -f "$stamp-ncu.csv"
    fi
    return 0
}

failed=()
for stage in "${wanted[@]}"; do
    echo "== $stage"
    start=$SECONDS
    "run_$stage" || failed+=("$stage")
    echo "== $stage took $((SECONDS - start)) s"
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "ci/gpu.sh: failed: ${failed[*]}"
    exit 1
fi
echo "ci/gpu.sh: passed: ${wanted[*]}"
