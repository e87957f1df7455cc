# Sourced by the other tools: makes .venv at the repository root, installs the package there once, and sets
# PYTHON (its interpreter) and ROOT (the repository). A change of pyproject.toml installs again.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$ROOT/.venv/bin/python"

_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

_make_venv() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if _new_enough "$candidate"; then
            echo "making $ROOT/.venv with $candidate" >&2
            "$candidate" -m venv "$ROOT/.venv"
            return
        fi
    done
    echo "python3 must be 3.11 or newer, got $(python3 --version 2>&1 || echo none)" >&2
    return 1
}

_install_once() {
    local stamp="$ROOT/.venv/installed" state
    state="$ROOT $("$PYTHON" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' \
        "$ROOT/pyproject.toml")"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$state" ]; then
        echo "installing zsmerge-compile and its test tools into .venv (torch included: minutes the first time)" >&2
        "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable "$ROOT[test]" >&2
        echo "$state" >"$stamp"
    fi
}

_new_enough "$PYTHON" || _make_venv
_install_once
