# Sourced by the scripts: one virtual environment, made if it is missing and reused while it is up to date.
# Sets PYTHON to its interpreter. Usage: ensure_environment EXTRAS, e.g. ensure_environment demo

find_python() {
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys, venv, ensurepip; raise SystemExit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "No Python 3.11, 3.12 or 3.13 with the venv module was found; install one and run this again." >&2
    exit 4
}

ensure_environment() {
    extras=$1
    venv="$ROOT/.venv"
    stamp="$venv/.installed-$extras"
    # The environment depends on the requirements and on the folder of the project, which is installed in editable mode.
    current="$(cksum <"$ROOT/setup.py") $ROOT"
    if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c 'pass' 2>/dev/null; then
        base=$(find_python) || exit 4
        echo "Making .venv with $base"
        rm -rf "$venv"
        "$base" -m venv "$venv"
    fi
    PYTHON="$venv/bin/python"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$current" ]; then
        echo "Installing the project with extras [$extras] into .venv; TensorFlow is large, this takes one or two minutes"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable "$ROOT[$extras]" || {
            echo "The installation failed; see the message above." >&2
            exit 4
        }
        echo "$current" >"$stamp"
    fi
}
