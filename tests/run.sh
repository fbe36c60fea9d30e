#!/usr/bin/env bash
# Lint, types and tests; `--all` also runs what is marked slow. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/environment.sh
environment
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
marks=(-m "not slow and not gpu")
if [ "${1:-}" = --all ]; then
    shift
    marks=(-m "not gpu")
fi
ruff check .
ruff format --check .
pyright
exec python -m pytest -q --durations=15 "${marks[@]}" "$@"
