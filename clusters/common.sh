# Sourced by up.sh and down.sh: which cluster, and the private places of one on this machine.

name=${1:?usage: $0 NAME, one of local, aws, gcp, aliyun, kuberay, or of another clusters/NAME.yaml}
shift
command -v ray >/dev/null || {
    echo "no ray on the PATH: source .venv/bin/activate (bash jobs/quickstart.sh makes it)" >&2
    exit 1
}
if [ "$name" != kuberay ] && [ ! -f "clusters/$name.yaml" ]; then
    echo "no clusters/$name.yaml" >&2
    exit 1
fi
umask 077

# of the local cluster: sessions, logs and spilled objects. Short, for the paths of sockets in it.
folder=${MEDGPT_CLUSTER_DIR:-/tmp/medgpt-$(id -u)}/local

# Ray's own token of this user; all clusters and clients that are not told otherwise use it.
token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}

private_folder() { # mine and only mine, or an error
    mkdir -p "$1"
    [ -O "$1" ] || { echo "$1 belongs to someone else; set MEDGPT_CLUSTER_DIR" >&2; exit 1; }
    chmod 700 "$1"
}

ensure_token() {
    if [ ! -s "$token" ]; then
        mkdir -p "$(dirname "$token")"
        python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$token"
    fi
    chmod 600 "$token"
}
