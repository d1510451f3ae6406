# Sourced by the scripts: puts the project's own environment on PATH, making it when it is not there.
# The environment is keyed by what defines it, so that a changed lock makes a new one.
project_python="${PYTHON:-python3}"
if [ ! -x .venv/bin/python ] || ! cmp -s requirements-dev.lock .venv/requirements-dev.lock; then
    "$project_python" - <<'PY'
import sys
if sys.version_info < (3, 11):
    sys.exit(f"tightwad-agent needs Python 3.11 or later; this is {sys.version.split()[0]}. Set PYTHON to a newer one.")
PY
    echo "making .venv" >&2
    "$project_python" -m venv .venv || {
        echo "Python's venv module is missing; on Debian and Ubuntu: apt-get install python3-venv" >&2
        exit 3
    }
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
    cp requirements-dev.lock .venv/requirements-dev.lock
fi
PATH="$PWD/.venv/bin:$PATH"
export PATH
