# Sourced by up.sh and down.sh: sets the name of the cluster and the private folder of the local one.

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

# sessions, logs and spilled objects of the local cluster; a short path, since sockets are in it
folder=${MEDGPT_CLUSTER_DIR:-/tmp/medgpt-$(id -u)}/local

# Ray's default token file of this user; all clusters and clients use it unless configured otherwise
token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}

private_folder() { # create a folder that only this user can read, or fail
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
