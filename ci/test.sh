#!/usr/bin/env bash
# Makes the environment if there is none and runs every check: lint, types, tests.
#
#   bash ci/test.sh            all of it, on two CPU cores
#   bash ci/test.sh --quick    lint, types, and the tests of every loss against the truth
#   bash ci/test.sh --compiled the suite over compiled kernels instead, see ci/compiled.sh
#   bash ci/test.sh -k metrics other arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ci/env.sh
help_if_asked "$@"
unset PYTHONDONTWRITEBYTECODE  # dozens of processes import the same modules
ensure_env "dev,quickstart"
bash ci/verl_env.sh
bash ci/trainers_env.sh
if [ "${1:-}" = --compiled ]; then exec bash ci/compiled.sh "${@:2}"; fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m pyright
# A file stays with one worker: its fixtures are made once. More threads would get in the way.
run() { OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -n "${WORKERS:-2}" --dist loadfile "$@"; }
if [ "${1:-}" = --quick ]; then
    run tests/test_{weights,errors,mistakes,surrogates,properties,token_log_probs,row_errors}.py "${@:2}"
    exit
fi
run "$@"
[ $# -gt 0 ] || bash ci/compiled.sh --fast
