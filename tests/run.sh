#!/usr/bin/env bash
# Lint, types and tests, in two tiers; other arguments go to pytest.
#   tests/run.sh           everything that CI runs
#   tests/run.sh --quick   before each commit: no Ray, nothing that takes seconds
#   tests/run.sh --all     also what is marked slow
# Two processes run the tests. Those that share the session's Ray stay together, and so do those that start clusters of
# their own (`xdist_group` in tests/conftest.py); the rest fills the gaps, because tests of clusters mostly wait.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/environment.sh
environment
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
marks="not slow and not gpu"
case "${1:-}" in
    --quick)
        shift
        marks="not ray and not seconds and not slow and not gpu"
        ;;
    --all)
        shift
        marks="not gpu"
        ;;
esac
ruff check .
ruff format --check .
pyright
exec python -m pytest -q --durations=15 -n 2 --dist loadgroup -m "$marks" "$@"
