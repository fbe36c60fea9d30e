#!/usr/bin/env bash
# Start a cluster. NAME local: Ray nodes on this machine, scaled from zero; kuberay: clusters/kuberay with kubectl;
# others: `ray up clusters/NAME.yaml`. Further arguments are passed to `ray up` or `kubectl apply`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source clusters/common.sh

start_local() {
    local port=${MEDGPT_RAY_PORT:-6379} dashboard=${MEDGPT_DASHBOARD_PORT:-8265} ip head
    ip=$(python -c 'from ray.util import get_node_ip_address; print(get_node_ip_address())')
    python clusters/end.py "$folder" --check || {
        echo "the local cluster is already running; stop it with clusters/down.sh local" >&2
        exit 1
    }
    private_folder "$(dirname "$folder")"
    private_folder "$folder"
    sed "s/127\.0\.0\.1:6379/$ip:$port/" clusters/local.yaml >"$folder/cluster.yaml"
    local start=(
        ray start --head --block --disable-usage-stats --num-cpus=0 --num-gpus=0 --labels=role=head
        --object-store-memory=268435456 --temp-dir="$folder/ray" --port="$port"
        --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" --dashboard-agent-listen-port=0
        --ray-client-server-port="${MEDGPT_CLIENT_PORT:-10001}" --autoscaling-config="$folder/cluster.yaml"
    )
    # all processes of the head inherit MEDGPT_LOCAL_CLUSTER, by which end.py finds them; jobs run with this PATH
    MEDGPT_LOCAL_CLUSTER=$folder PATH=$(dirname "$(command -v ray)"):$PATH \
        RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token \
        RAY_FAKE_CLUSTER=1 RAY_enable_autoscaler_v2=1 AUTOSCALER_UPDATE_INTERVAL_S=1 \
        RAY_CLOUD_INSTANCE_ID=$head_id RAY_OVERRIDE_NODE_ID_FOR_TESTING=$head_id \
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1 PYTHONPATH=$PWD/clusters \
        nohup "${start[@]}" >"$folder/head.log" 2>&1 </dev/null &
    head=$!
    cat >"$folder/env.sh" <<EOF
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard
EOF
    for _ in $(seq 120); do
        if (exec 3<>"/dev/tcp/127.0.0.1/$dashboard") 2>/dev/null; then break; fi
        kill -0 "$head" 2>/dev/null || break
        sleep 1
    done
    if ! kill -0 "$head" || ! RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token \
        python clusters/publish_limits.py "$folder/cluster.yaml" --address "$ip:$port"; then
        tail -n 20 "$folder/head.log" >&2
        python clusters/end.py "$folder"
        exit 1
    fi
    cat <<EOF
The local cluster is running; it starts nodes when jobs need them. Submit a job:
    source $folder/env.sh
    ray job submit --working-dir . -- medgpt sft configs/debug/sft.toml run.dir=\$PWD/runs/sft
or run a command on it from here: RAY_ADDRESS=$ip:$port medgpt ...
Stop it: clusters/down.sh local
EOF
}

head_id=$(printf 'f%.0s' {1..51})00000 # Ray's provider identifies the head by it
ensure_token
case $name in
local) start_local ;;
kuberay)
    kubectl create secret generic medgpt-ray-token --from-file=auth_token="$token" --dry-run=client -o yaml |
        kubectl apply -f -
    kubectl apply -k clusters/kuberay/cluster "$@"
    ;;
*)
    mkdir -p clusters/build
    git archive --output clusters/build/medgpt.tar HEAD # only committed files
    RAY_AUTH_MODE=token RAY_UP_enable_autoscaler_v2=1 PYTHONPATH=$PWD/clusters ray up "clusters/$name.yaml" "$@"
    cat <<EOF
Open a tunnel to the dashboard of the head, then submit a job:
    ray dashboard clusters/$name.yaml
    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir . -- medgpt ...
EOF
    ;;
esac
