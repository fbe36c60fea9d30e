# Sourced before Ray is started on a node of a VM cluster; jobs and workers inherit the environment.
ulimit -n 65536
umask 077
export PATH=$HOME/venv/bin:$PATH
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token RAY_USAGE_STATS_ENABLED=0
# collectives between nodes use the interface of the default route, not bridges of containers
interface=$(ip route show default | awk '{print $5; exit}')
export NCCL_SOCKET_IFNAME=$interface GLOO_SOCKET_IFNAME=$interface
