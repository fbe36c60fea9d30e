#!/usr/bin/env bash
# Runs on every node of a VM cluster: installs Python 3.11 and the pinned packages into ~/venv.
# Arguments: further packages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
umask 077

if ! command -v python3.11 >/dev/null; then
    if command -v dnf >/dev/null; then
        sudo dnf install -y -q python3.11 gcc
    else
        sudo add-apt-repository -y ppa:deadsnakes/ppa
        sudo DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3.11-venv python3.11-dev build-essential
    fi
fi
pins=$(cksum <~/medgpt.tar)-$*
if [ "$(cat ~/venv/.pins 2>/dev/null)" != "$pins" ]; then
    python3.11 -m venv ~/venv
    # all nodes have the same environment; the CUDA build of torch also runs on CPUs
    ~/venv/bin/pip install --quiet --disable-pip-version-check -c jobs/constraints-cuda.txt . "$@"
    echo "$pins" >~/venv/.pins
fi
mkdir -p ~/private
chmod 700 ~/private ~/.ray
chmod 600 ~/.ray/auth_token
