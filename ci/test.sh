#!/usr/bin/env bash
# Makes the environment if there is none and runs every check: lint, types, tests.
#
#   bash ci/test.sh            about ten minutes on two CPU cores after the install
#   bash ci/test.sh -k metrics arguments go to pytest
#   bash ci/test.sh --compiled the suite over compiled kernels instead, see ci/compiled.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ci/env.sh
help_if_asked "$@"
ensure_env "dev,quickstart"
bash ci/verl_env.sh
bash ci/trainers_env.sh
if [ "${1:-}" = --compiled ]; then exec bash ci/compiled.sh "${@:2}"; fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m pyright
"$PYTHON" -m pytest -q "$@"
[ $# -gt 0 ] || bash ci/compiled.sh --fast
