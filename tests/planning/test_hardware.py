"""Reading a cluster from Ray's definition and a hardware file, and their errors."""

from pathlib import Path

import pytest

from medgpt.config.base import ConfigError
from medgpt.planning.hardware import read_cluster
from tests.planning.cluster_files import write_cluster_file

ROOT = Path(__file__).parent.parent.parent


def test_nodes_have_their_resources_devices_and_prices(tmp_path: Path) -> None:
    cluster = read_cluster(write_cluster_file(tmp_path), None)
    data, train = cluster.workers
    assert cluster.head.name == "head"
    assert (train.resources["GPU"], train.device_name, train.device.memory_gb) == (8, "H100", 79)
    assert (data.device_name, data.price_per_hour, data.host_gb) == ("CPU", 1, None)
    assert cluster.max_workers == 6


def test_the_file_beside_the_definition_adds_what_ray_does_not_know(tmp_path: Path) -> None:
    path = write_cluster_file(tmp_path)
    path.with_suffix(".toml").write_text(
        """
currency = "EUR"
[nodes.train]
device = "Mine"
price_per_hour = 7.5
memory_gb = 512
network_gb_per_s = 50
[devices.Mine]
memory_gb = 100
tflops = 500
memory_gb_per_s = 2000
link_gb_per_s = 200
source = "its maker"
""",
        "utf-8",
    )
    cluster = read_cluster(path, None)
    train = cluster.workers[1]
    assert (cluster.currency, train.price_per_hour, train.host_gb) == ("EUR", 7.5, 512)
    assert (train.device.tflops, train.network_gb_per_s) == (500, 50)
    assert cluster.workers[0].price_per_hour == 1


def test_the_memory_that_ray_knows_is_the_hosts(tmp_path: Path) -> None:
    resources = {"CPU": 16, "memory": 64 * 2**30}
    path = write_cluster_file(tmp_path, available_node_types__data__resources=resources)
    assert read_cluster(path, None).workers[0].host_gb == 64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"available_node_types": None}, "has no section available_node_types; name a Ray cluster"),
        ({"head_node_type": "boss"}, "head_node_type=boss is none of available_node_types: data"),
        ({"available_node_types__data__resources": None}, "data has no resources; write them"),
        ({"metadata__usd_per_hour__gpu": 3}, "metadata.usd_per_hour.gpu is no node type"),
        ({"available_node_types__train__labels": {"ray.io/accelerator-type": "X9"}},
         r"train: device X9 is unknown; describe it as \[devices.X9\]"),
        ({"available_node_types__train__labels": {}}, "device GPU is unknown"),
    ],
)  # fmt: skip
def test_an_incomplete_cluster_definition_is_refused(tmp_path: Path, changes, words) -> None:
    with pytest.raises(ConfigError, match=words):
        read_cluster(write_cluster_file(tmp_path, **changes), None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "[nodes.gpu]\n",
            "--hardware: nodes.gpu is no node type of the cluster; known: data, head",
        ),
        ("[nodes.train]\nprice = 3\n", "unknown key nodes.train.price; known: device"),
        ("[nodes.train]\nprice_per_hour = -3\n", "price_per_hour=-3: .*greater than or equal to 0"),
        ("nodes = [", "is not TOML"),
    ],
)
def test_an_invalid_hardware_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=words):
        read_cluster(write_cluster_file(tmp_path), file)


def test_missing_and_malformed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--cluster=.* cannot be read \(No such file"):
        read_cluster(tmp_path / "none.yaml", None)
    with pytest.raises(ConfigError, match=r"--hardware=.* cannot be read"):
        read_cluster(write_cluster_file(tmp_path), tmp_path / "none.toml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1", "utf-8")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_cluster(broken, None)


@pytest.mark.parametrize("path", sorted((ROOT / "clusters").glob("*.yaml")), ids=lambda p: p.name)
def test_a_shipped_cluster_can_be_planned_for(path: Path) -> None:
    assert read_cluster(path, None).workers
