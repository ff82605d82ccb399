#!/usr/bin/env bash
# Runs the tests with the oldest and the newest PyTorch and Triton, each in an environment of its own.
#
#   bash ci/versions.sh                 the oldest that pyproject.toml allows, the newest of the index
#   bash ci/versions.sh newest          one of the two, or any release: 2.12.1
#   bash ci/versions.sh oldest -- tests/test_autograd.py -k compile      arguments for pytest
#
# Prints a table and, where pytest had no arguments, writes it to bench/results/versions-DATE.json.
# Exits 1 when a test failed. The environments are .venv-torch-RELEASE, made with PYTHON or python3;
# each takes several GB where pip finds builds for CUDA, and may be removed at any time.
#
# verl is tested in an environment of its own, over .venv's torch, by ci/test.sh alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ci/env.sh
help_if_asked "$@"

wanted=()
while [ $# -gt 0 ]; do
    case "$1" in
    oldest | newest | [0-9]*) wanted+=("$1") ;;
    --)
        shift
        break
        ;;
    *)
        echo "ci/versions.sh: 'oldest', 'newest' or a release of torch, not '$1'; arguments for pytest follow a --" >&2
        exit 2
        ;;
    esac
    shift
done
[ ${#wanted[@]} -gt 0 ] || wanted=(oldest newest)

base="${PYTHON:-python3}"
floor() { sed -n "s/^ *\"$1>=\([0-9.]*\).*/\1/p" pyproject.toml; }
newest() { "$base" -m pip index versions torch 2>/dev/null | sed -n '1s/.*(\(.*\))/\1/p'; }

# In the order of releases.
before() { [ "$1" != "$2" ] && [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
unset TORCH
failed=0
for release in "${wanted[@]}"; do
    others=()
    case "$release" in
    oldest)
        release="$(floor torch)"
        others=("triton==$(floor triton); platform_system == 'Linux'")
        ;;
    newest) release="$(newest)" ;;
    esac
    # The interpreter of Triton 3.6 and older does not know numpy 2.4.
    if before "$release" 2.12; then others+=("numpy<2.4"); fi
    DEFAULT_TORCH=("torch==$release" ${others[@]+"${others[@]}"})
    VENV=".venv-torch-$release"
    PYTHON="$base"
    ensure_env test
    echo "== torch $release"
    status=0
    "$PYTHON" -m pytest -q --ignore-glob='*/test_verl*.py' --junitxml="$folder/report.xml" "$@" ||
        status=$?
    [ "$status" -le 1 ] || exit "$status" # interrupted, or no test
    [ "$status" -eq 0 ] || failed=1
    "$PYTHON" ci/versions.py row "$folder/report.xml" >>"$folder/rows"
done
save=()
[ $# -gt 0 ] || save=(--save bench/results)
"$PYTHON" ci/versions.py table "$folder/rows" ${save[@]+"${save[@]}"}
exit "$failed"
