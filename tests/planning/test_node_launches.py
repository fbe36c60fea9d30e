"""Nodes that Ray's own scheduler launches for the bundles of a job."""

from pathlib import Path

import pytest

from medgpt.config.base import ConfigError
from medgpt.config.pools import RoleConfig
from medgpt.planning.hardware import PlannedCluster, read_cluster
from medgpt.planning.node_launches import plan_node_launches
from tests.planning.cluster_files import write_cluster_file


@pytest.fixture
def cluster(tmp_path: Path) -> PlannedCluster:
    return read_cluster(write_cluster_file(tmp_path), None)


def role(workers: int, cpus: float = 8, gpus: float = 1, **more: object) -> RoleConfig:
    return RoleConfig.model_validate(
        {"num_workers": workers, "cpus_per_worker": cpus, "gpus_per_worker": gpus, **more}
    )


@pytest.mark.parametrize(
    ("pools", "nodes", "price"),
    [
        ({"train": role(8)}, {"head": 1, "train": 1, "data": 1}, 21.5),  # no CPU is left for data
        ({"train": role(9, cpus=4)}, {"head": 1, "train": 2}, 40.5),
        ({"train": role(3, strategy="STRICT_SPREAD")}, {"head": 1, "train": 3}, 60.5),
        ({"train": role(4, 4, 0, labels={"role": "data"})}, {"head": 1, "data": 2}, 2.5),
        ({"actor": role(8, 4), "critic": role(8, 4, share_with="actor")},
         {"head": 1, "train": 1}, 20.5),
    ],
)  # fmt: skip
def test_nodes_are_started_for_all_bundles(cluster, pools, nodes, price) -> None:
    started = plan_node_launches(cluster, pools, data_cpus=1)
    assert dict(started.nodes) == nodes
    assert started.price_per_hour == price


def test_the_price_is_unknown_if_that_of_a_node_is(tmp_path: Path) -> None:
    prices = {"head": 0.5, "data": 1}
    cluster = read_cluster(write_cluster_file(tmp_path, metadata={"usd_per_hour": prices}), None)
    assert plan_node_launches(cluster, {"train": role(1)}, data_cpus=1).price_per_hour is None
    assert (
        plan_node_launches(cluster, {"train": role(1, gpus=0)}, data_cpus=1).price_per_hour == 1.5
    )


def test_workers_that_can_never_be_placed_are_refused_by_name(cluster) -> None:
    words = r"pools.critic \(20 x \(8 CPU, 1 GPU\)\) can never be placed"
    with pytest.raises(ConfigError, match=words):
        plan_node_launches(
            cluster, {"pools.actor": role(20), "pools.critic": role(20)}, data_cpus=1
        )


def test_bundles_that_do_not_pack_onto_nodes_are_refused(cluster) -> None:
    """The total would suffice: 7 x 40 CPUs on 4 x 64 and 4 x 16."""
    words = r"no room for pools.actor \(7 x \(40 CPU\)\) .* may start 4 x data \(16 CPU\)"
    with pytest.raises(ConfigError, match=words):
        plan_node_launches(cluster, {"pools.actor": role(7, 40, 0)}, data_cpus=1)


def test_the_limit_of_all_nodes_together_is_respected(tmp_path: Path) -> None:
    cluster = read_cluster(write_cluster_file(tmp_path, max_workers=2), None)
    with pytest.raises(ConfigError, match="2 in all; use fewer"):
        plan_node_launches(cluster, {"train": role(24)}, data_cpus=1)
