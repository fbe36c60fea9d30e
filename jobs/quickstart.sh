#!/usr/bin/env bash
# From a fresh clone to a small trained model: installs the environment, runs all stages on the sample corpus, reports.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/environment.sh
environment
exec medgpt pipeline configs/debug/quickstart.toml "$@"
