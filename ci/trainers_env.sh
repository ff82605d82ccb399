#!/usr/bin/env bash
# Puts the wheels of trainers whose losses are compared with into .venv-trainers: small files
# without their requirements, never imported as packages. The tests load single files of them.
#
#   bash ci/trainers_env.sh        downloads them, or does nothing when they are there
#
# For the trainers that are only in repositories, clone them into one folder and name it:
#   git clone --depth 1 https://github.com/PrimeIntellect-ai/prime-rl   (THUDM/slime, NVIDIA-NeMo/RL,
#   alibaba/ROLL, meta-pytorch/torchforge likewise)
#   TRAINER_SOURCES=<that folder> python -m pytest tests/test_adapters_real.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source ci/env.sh
help_if_asked "$@"
no_arguments "$@"

PYTHON="${PYTHON:-$(python_at_hand)}"
WHEELS=(openrlhf==0.11.2 areal==1.0.4 skyrl==0.4.0)
TARGET=.venv-trainers
lock "$TARGET"
if [ "$(cat "$TARGET/recipe" 2>/dev/null)" = "${WHEELS[*]}" ]; then
    echo "trainers: $TARGET is ready"
    exit 0
fi
rm -rf "$TARGET"
"$PYTHON" -m pip --disable-pip-version-check install --quiet --no-deps --no-compile \
    --ignore-requires-python --target "$TARGET" "${WHEELS[@]}"
rm -rf "$TARGET/tests" # OpenRLHF's wheel ships its own test suite as a top-level package
echo "${WHEELS[*]}" >"$TARGET/recipe"
echo "trainers: $TARGET is ready"
