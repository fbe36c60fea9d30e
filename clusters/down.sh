#!/usr/bin/env bash
# Stop the cluster NAME that up.sh started and delete its files on this machine, except the token.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source clusters/common.sh

case $name in
local)
    python clusters/end.py "$folder"
    rm -rf -- "$folder"
    ;;
kuberay) kubectl delete -k clusters/kuberay/cluster "$@" ;;
*) PYTHONPATH=$PWD/clusters ray down "clusters/$name.yaml" "$@" ;;
esac
