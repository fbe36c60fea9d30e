"""A spot node that will be preempted is drained in time."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.common_pb2 import NodeDeathInfo
from ray.core.generated.gcs_pb2 import GcsNodeInfo

from tests.clusters.definitions import CLUSTERS
from tests.train.local_cluster import add_node, started_cluster

pytestmark = [pytest.mark.timeout(300)]


class Metadata(BaseHTTPRequestHandler):
    """The metadata server of a spot node, for all three clouds."""

    ends: ClassVar[datetime | None] = None
    tokens: ClassVar[list[str]] = []

    def do_PUT(self) -> None:
        assert self.path == "/latest/api/token"
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._say("a-token")

    def do_GET(self) -> None:
        moment = f"{self.ends:%Y-%m-%dT%H:%M:%SZ}" if self.ends else None
        if self.path == "/computeMetadata/v1/instance/preempted":
            assert self.headers["Metadata-Flavor"] == "Google"
            self._say("TRUE" if self.ends else "FALSE")
        elif self.path == "/latest/meta-data/spot/instance-action":
            assert self.headers["X-aws-ec2-metadata-token"] == "a-token"
            self._say(json.dumps({"action": "terminate", "time": moment}) if moment else None)
        else:
            assert self.path == "/latest/meta-data/instance/spot/termination-time"
            self._say(moment)

    def _say(self, text: str | None) -> None:
        self.send_response(404 if text is None else 200)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[str]:
    Metadata.ends = None
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_the_spot_notice_of_every_cloud_is_read(metadata: str) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(CLUSTERS)!r}); import json\n"
        "from spot_notice import PROVIDERS\n"
        f"say = lambda: [p.seconds_until_end({metadata!r}) for p in PROVIDERS.values()]\n"
        "for _ in sys.stdin: print(json.dumps(say()), flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def seconds() -> list[float | None]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("?\n")
            return json.loads(process.stdout.readline())

        assert seconds() == [None, None, None]
        Metadata.ends = datetime.now(UTC) + timedelta(seconds=100)
        aws, gcp, aliyun = seconds()
        assert aws == pytest.approx(100, abs=15)
        assert gcp == 30  # it tells no time, and gives this much
        assert aliyun == pytest.approx(100, abs=15)
        process.stdin.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with started_cluster() as cluster:
        yield cluster


@pytest.mark.ray
def test_a_notice_drains_the_node(cluster: Cluster, metadata: str) -> None:
    node = add_node(cluster)
    watcher = subprocess.Popen(
        [
            *[sys.executable, str(CLUSTERS / "spot_notice.py"), "aws", "--server", metadata],
            *["--address", cluster.address, "--node-id", node.node_id, "--poll-s", "0.2"],
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    time.sleep(3)
    assert watcher.poll() is None, watcher.communicate()[0]  # no notice, nothing done
    Metadata.ends = datetime.now(UTC) + timedelta(seconds=90)
    out, _ = watcher.communicate(timeout=60)
    assert watcher.returncode == 0, out
    assert f"node {node.node_id} ends in" in out
    gcs = GcsClient(address=cluster.address)
    deadline = time.monotonic() + 60  # a node without work goes at once
    while (info := nodes(gcs)[node.node_id]).state == GcsNodeInfo.ALIVE:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert info.death_info.reason == NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED, info.death_info
    alive = [i for i in nodes(gcs).values() if i.state == GcsNodeInfo.ALIVE]
    assert len(alive) == 1


def nodes(gcs: GcsClient) -> dict[str, GcsNodeInfo]:
    return {key.hex(): info for key, info in gcs.get_all_node_info().items()}
