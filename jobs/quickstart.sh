#!/usr/bin/env bash
# From a fresh clone to a trained small model: environment, every stage on the sample corpus, scores, report.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/environment.sh
environment
exec medgpt pipeline configs/debug/quickstart.toml "$@"
