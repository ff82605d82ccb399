#!/usr/bin/env bash
# Makes .venv-skyrl: SkyRL 0.4.0, which needs Python 3.12, with a PyTorch of its own (several GB where
# pip finds the CUDA build, so this is not part of ci/test.sh).
#
#   bash ci/skyrl_env.sh                  with python3.12 from the PATH
#   PYTHON312=... TORCH=... bash ci/skyrl_env.sh
#
# tests/test_adapters_skyrl.py runs SkyRL's registry and loss in it and is skipped without it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source ci/env.sh
help_if_asked "$@"
no_arguments "$@"

ENV=.venv-skyrl
lock "$ENV"
TORCH="${TORCH:-torch==2.13.0}"
recipe="skyrl==0.4.0 $TORCH"
if [ "$(cat "$ENV/recipe" 2>/dev/null)" = "$recipe" ]; then
    echo "SkyRL environment: $ENV is ready"
    exit 0
fi
"${PYTHON312:-python3.12}" -m venv --clear "$ENV"
install() { "$ENV/bin/python" -m pip --disable-pip-version-check install --quiet --no-compile --prefer-binary "$@"; }
install "$TORCH" numpy
install skyrl==0.4.0 ray jaxtyping loguru omegaconf skyrl_gym
"$ENV/bin/python" -c 'import skyrl.backends.skyrl_train.utils.ppo_utils'
echo "$recipe" >"$ENV/recipe"
echo "SkyRL environment: $ENV is ready"
