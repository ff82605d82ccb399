#!/usr/bin/env bash
# Puts the wheels of trainers whose code the adapters are tested inside of into .venv-trainers: 47
# MB of files without their requirements. The tests load single files of them, and run unsloth as a
# program of its own. Which versions were checked, and when: dl_norm/integrations/README.md.
#
#   bash ci/trainers_env.sh        downloads them, or does nothing when they are there
#
# For the trainers that are only in repositories, clone them into one folder and name it (of prime-rl
# two commits: its kept sets are on a branch, read at d09488d5):
#   for repository in PrimeIntellect-ai/prime-rl THUDM/slime radixark/miles NVIDIA-NeMo/RL \
#       alibaba/ROLL NVIDIA/Megatron-LM allenai/open-instruct; do
#       git clone --depth 1 "https://github.com/$repository"
#   done
#   git -C prime-rl fetch --depth 1 origin feat/sampling-replay
#   git -C prime-rl worktree add ../prime-rl-replay FETCH_HEAD
#   TRAINER_SOURCES=<that folder> python -m pytest tests/test_adapters*.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source ci/env.sh
help_if_asked "$@"
no_arguments "$@"

PYTHON="${PYTHON:-$(python_at_hand)}"
WHEELS=(
    openrlhf==0.11.2 areal==1.0.4 skyrl==0.4.0 torchtitan==0.3.0 ms_swift==4.6.0
    unsloth==2026.10.9 unsloth_zoo==2026.10.9 trl==1.15.0 # the newest TRL that unsloth takes
)
TARGET=.venv-trainers
lock "$TARGET"
if [ "$(cat "$TARGET/recipe" 2>/dev/null)" = "${WHEELS[*]}" ]; then
    echo "trainers: $TARGET is ready"
    exit 0
fi
rm -rf "$TARGET"
"$PYTHON" -m pip --disable-pip-version-check install --quiet --no-deps --no-compile \
    --ignore-requires-python --target "$TARGET" "${WHEELS[@]}"
# OpenRLHF's wheel ships its own test suite as a top-level package, unsloth's a web application.
rm -rf "$TARGET/tests" "$TARGET/studio"
echo "${WHEELS[*]}" >"$TARGET/recipe"
echo "trainers: $TARGET is ready"
