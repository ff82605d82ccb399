#!/usr/bin/env bash
# Trains a real language model with the DeltaL loss and shows what the loss does, from nothing:
#
#   bash ci/quickstart.sh                     about four minutes on two CPU cores, all included
#   bash ci/quickstart.sh --steps 20 --alpha 0.75 --seed 1 --output .quickstart/long
#
#   --steps N           optimizer steps (4)
#   --aggregation NAME  delta_l (default), grpo, dapo or dr_grpo
#   --alpha A           exponent of delta_l (1)
#   --seed N            of the tasks and the sampling (0)
#   --output DIR        where the model and the picture go (.quickstart)
#
# Makes .venv if there is none and installs only what is missing. Uses the GPU where there is one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ci/env.sh
help_if_asked "$@"
ensure_env "trl,quickstart"
# Threads that wait for one another sleep: spinning costs up to five times when the cores are shared.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
echo "env: ready after $SECONDS s"
"$PYTHON" ci/quickstart.py "$@"
echo "quickstart: $SECONDS s in all"
