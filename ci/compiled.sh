#!/usr/bin/env bash
# The test suite over compiled kernels, without a GPU: Triton compiles them for one, and ci/ptx
# executes the PTX on the CPU.
#
#   bash ci/compiled.sh --fast      parity and property cases, for sm_90: under two minutes on two cores
#   bash ci/compiled.sh sm_100      the whole suite for a target: sm_80, sm_90 (default), sm_100
#   bash ci/compiled.sh sm_90,plus  approximate instructions off by their documented maximum, always
#                                   up; sm_90,minus always down, sm_90,random by anything between
#   bash ci/compiled.sh sm_90 -k metrics    further arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ci/env.sh
help_if_asked "$@"
PYTHON="${PYTHON:-.venv/bin/python}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
unset TRITON_INTERPRET

if [ "${1:-}" = --fast ]; then
    export DL_NORM_TEST_TARGET=sm_90
    # Of a parity case that is run by every implementation, the kernels' alone.
    exec "$PYTHON" -m pytest -q -n "${WORKERS:-2}" --dist loadfile tests/test_ptx.py tests/test_traffic.py tests/test_properties.py \
        tests/test_policy_loss.py tests/test_variants.py tests/test_logits.py \
        tests/test_row_variants.py tests/test_kept.py tests/test_kept_inputs.py \
        -k "test_ptx or test_traffic or (triton and not in_combination and not compiles)"
fi
export DL_NORM_TEST_TARGET="${1:-sm_90}"
exec "$PYTHON" -m pytest -q "${@:2}"
