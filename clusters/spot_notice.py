"""Polls for the preemption notice of this spot node and lets Ray drain the node.

Ray then schedules nothing more here; training workers save a checkpoint and continue on other
nodes. Runs on every worker node of a VM cluster:

    python clusters/spot_notice.py aws|gcp|aliyun --address HEAD:PORT
"""

import argparse
import json
import subprocess
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from urllib.error import HTTPError, URLError

import ray._raylet
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.util import get_node_ip_address

POLL_S = 5  # the interval that clouds recommend
TIMEOUT_S = 5


def _get(url: str, *, method: str = "GET", **headers: str) -> str | None:
    """Return the text at `url`; None for status 404."""
    request = urllib.request.Request(
        url, method=method, headers={name.replace("_", "-"): v for name, v in headers.items()}
    )
    # never through a proxy, which would return the metadata of its own node
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_S) as answer:
            return answer.read().decode()
    except HTTPError as error:
        if error.code == 404:
            return None
        raise


def _seconds_until(moment: str) -> float:
    """Return the seconds until a time such as 2026-01-31T12:00:00Z."""
    return datetime.fromisoformat(moment.strip()).timestamp() - time.time()


def aws(server: str) -> float | None:
    token = _get(
        f"{server}/latest/api/token", method="PUT", X_aws_ec2_metadata_token_ttl_seconds="60"
    )
    action = _get(
        f"{server}/latest/meta-data/spot/instance-action", X_aws_ec2_metadata_token=token or ""
    )
    return None if action is None else _seconds_until(json.loads(action)["time"])


def gcp(server: str) -> float | None:
    text = _get(f"{server}/computeMetadata/v1/instance/preempted", Metadata_Flavor="Google")
    return 30 if text is not None and text.strip() == "TRUE" else None


def aliyun(server: str) -> float | None:
    moment = _get(f"{server}/latest/meta-data/instance/spot/termination-time")
    return None if moment is None else _seconds_until(moment)


@dataclass(frozen=True)
class Provider:
    server: str
    seconds_until_end: Callable[[str], float | None]
    """Query the server: seconds until the node is preempted, None if it is not."""


PROVIDERS = {
    "aws": Provider("http://169.254.169.254", aws),
    "gcp": Provider("http://metadata.google.internal", gcp),
    "aliyun": Provider("http://100.100.100.200", aliyun),
}


def node_id(address: str, ip: str) -> str:
    """Return the id of the alive Ray node with this IP address."""
    nodes = ray._raylet.GcsClient(address=address).get_all_node_info()
    (node,) = [
        key.hex()
        for key, info in nodes.items()
        if info.node_manager_address == ip and info.state == GcsNodeInfo.ALIVE
    ]
    return node


def drain(address: str, node: str, seconds: float) -> None:
    subprocess.run(
        [
            *["ray", "drain-node", "--address", address, "--node-id", node],
            *["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"],
            *["--deadline-remaining-seconds", str(max(1, int(seconds)))],
        ],
        check=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("provider", choices=PROVIDERS)
    parser.add_argument("--address", required=True, help="address of the head, HOST:PORT")
    parser.add_argument("--node-id", help="default: the node with the IP of this machine")
    parser.add_argument("--server", help="metadata server, for tests")
    parser.add_argument("--poll-s", type=float, default=POLL_S)
    options = parser.parse_args()
    provider = PROVIDERS[options.provider]
    server = options.server or provider.server
    while True:
        try:
            seconds = provider.seconds_until_end(server)
        except (URLError, TimeoutError) as error:  # the server may be busy
            print(f"{server}: {error}", flush=True)
            seconds = None
        if seconds is not None:
            break
        time.sleep(options.poll_s)
    node = options.node_id or node_id(options.address, get_node_ip_address())
    print(f"node {node} ends in {seconds:.0f} s", flush=True)
    drain(options.address, node, seconds)


if __name__ == "__main__":
    main()
