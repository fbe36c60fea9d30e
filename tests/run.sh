#!/usr/bin/env bash
# Lint, types and tests, in two tiers; other arguments go to pytest.
#   tests/run.sh           everything that CI runs
#   tests/run.sh --quick   before each commit: no Ray, nothing that takes seconds
#   tests/run.sh --all     also what is marked slow
# Tests that start clusters of their own mostly wait, so they run beside all others, in a process of their own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/environment.sh
environment
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
tier=${1:-}
case $tier in
    --quick | --all) shift ;;
    *) tier=--ci ;;
esac
ruff check .
ruff format --check .
pyright
case $tier in
    --quick) exec python -m pytest -q -n 2 -m "not ray and not seconds and not slow and not gpu" "$@" ;;
    --all) marks="not gpu" ;;
    --ci) marks="not slow and not gpu" ;;
esac
run() { # MARKS ARGUMENTS...; no test may be left after other arguments, which pytest calls status 5
    local marks=$1 status=0
    shift
    python -m pytest -q --durations=15 -m "$marks" "$@" || status=$?
    [ "$status" -le 5 ] || echo "pytest -m \"$marks\" ended with status $status before its summary"
    [ "$status" = 5 ] || return "$status"
}
log=$(mktemp) failed=0
run "$marks and own_clusters" "$@" >"$log" 2>&1 &
run "$marks and not own_clusters" "$@" || failed=$?
wait $! || failed=$?
cat "$log"
rm "$log"
exit "$failed"
