#!/usr/bin/env bash
# Makes .venv-verl: verl beside the project's environment, which it reads and never changes.
#
#   bash ci/verl_env.sh            makes it, or does nothing when it is already there
#   PYTHON=... bash ci/verl_env.sh over another environment than .venv
#
# verl pins an older transformers and pulls dozens of packages. Its losses and its FSDP engine need
# none of that, so verl goes in without its requirements, together with only the packages that
# importing those two asks for; torch, numpy and transformers come from the environment below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source ci/env.sh
help_if_asked "$@"
no_arguments "$@"

PYTHON="${PYTHON:-$(python_at_hand)}"
ENV=.venv-verl
PACKAGES=(
    verl==0.9.1
    ray==2.60.0 msgpack protobuf jsonschema jsonschema-specifications attrs referencing rpds-py
    tensordict==0.10.0 pyvers cloudpickle orjson
    hydra-core==1.3.2 omegaconf==2.3.0 antlr4-python3-runtime==4.9.3
    codetiming peft==0.21.2
)

lock "$ENV"
base="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
recipe="$("$PYTHON" -V) $base ${PACKAGES[*]}"
if [ "$(cat "$ENV/recipe" 2>/dev/null)" = "$recipe" ]; then
    echo "verl environment: $ENV is ready"
    exit 0
fi

echo "verl environment: making $ENV"
"$PYTHON" -m venv --clear --without-pip "$ENV"
own="$("$ENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
# addsitedir, not a plain path line: it also follows the .pth file of an editable dl_norm.
echo "import site; site.addsitedir('$base')" > "$own/project.pth"
"$PYTHON" -m pip --python "$ENV/bin/python" install --quiet --disable-pip-version-check \
    --no-deps --no-compile "${PACKAGES[@]}"
# verl's wheel also ships its own test suite and scripts as top-level packages.
rm -rf "$own/tests" "$own/scripts"
VERL_LOGGING_LEVEL=ERROR "$ENV/bin/python" -W ignore -c \
    'import verl.trainer.ppo.core_algos, verl.workers.engine.fsdp.transformer_impl'
echo "$recipe" > "$ENV/recipe"
echo "verl environment: $ENV is ready"
