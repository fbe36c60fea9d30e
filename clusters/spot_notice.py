"""Watch for the notice that the cloud takes this spot node back, and let Ray drain the node.

Ray then places nothing more here, and training workers save the step that they have reached and go
on elsewhere. Runs on every worker node of a VM cluster:

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

POLL_S = 5  # clouds ask for no more
TIMEOUT_S = 5


def _get(url: str, *, method: str = "GET", **headers: str) -> str | None:
    """The text at `url`; None if there is none."""
    request = urllib.request.Request(
        url, method=method, headers={name.replace("_", "-"): v for name, v in headers.items()}
    )
    # metadata is on the link itself: a proxy of the environment would ask for its own
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_S) as answer:
            return answer.read().decode()
    except HTTPError as error:
        if error.code == 404:
            return None
        raise


def _seconds_until(moment: str) -> float:
    """From now to a time like 2026-01-31T12:00:00Z."""
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
    """Asks the server; seconds until the node ends, None if it stays."""


PROVIDERS = {
    "aws": Provider("http://169.254.169.254", aws),
    "gcp": Provider("http://metadata.google.internal", gcp),
    "aliyun": Provider("http://100.100.100.200", aliyun),
}


def node_id(address: str, ip: str) -> str:
    """Of the living Ray node with this address."""
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
    parser.add_argument("--address", required=True, help="of the head, HOST:PORT")
    parser.add_argument("--node-id", help="default: the node with this machine's address")
    parser.add_argument("--server", help="other metadata server, as in a test")
    parser.add_argument("--poll-s", type=float, default=POLL_S)
    options = parser.parse_args()
    provider = PROVIDERS[options.provider]
    server = options.server or provider.server
    while True:
        try:
            seconds = provider.seconds_until_end(server)
        except (URLError, TimeoutError) as error:  # busy for a moment
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
