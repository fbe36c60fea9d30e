# Sourced by quickstart.sh and tests/run.sh: creates .venv with the pinned packages unless it exists.
# PYTHON sets the interpreter (3.11), MEDGPT_VENV the folder of the environment.

environment() {
    local python=${PYTHON:-python3.11} venv=${MEDGPT_VENV:-$PWD/.venv} pins
    command -v "$python" >/dev/null || python=python3
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
        echo "medgpt needs Python 3.11; $python is $("$python" --version 2>&1). Set PYTHON." >&2
        return 1
    }
    pins=$(cat pyproject.toml jobs/constraints.txt | cksum)
    if [ "$(cat "$venv/.pins" 2>/dev/null)" != "$pins" ]; then
        echo "installing into $venv (minutes, once) ..."
        "$python" -m venv "$venv"
        # torch first and pinned: for a range, pip would download a CUDA build of several GB
        "$venv/bin/pip" install --quiet --disable-pip-version-check -c jobs/constraints.txt torch
        "$venv/bin/pip" install --quiet --disable-pip-version-check -c jobs/constraints.txt -e '.[test]'
        echo "$pins" >"$venv/.pins"
    fi
    export PATH=$venv/bin:$PATH
}
