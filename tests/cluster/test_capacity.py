"""Demands that can never be placed are refused with what the cluster has and may grow to."""

import math

import pytest

from medgpt.cluster.capacity import NodeGroup, check_demands, pool_demands, worker_demands
from medgpt.config.base import ConfigError
from medgpt.config.pools import RoleConfig
from medgpt.config.train import ClusterConfig

LAPTOP = [NodeGroup({"CPU": 4}, {}, 1)]
GPUS = [NodeGroup({"CPU": 8, "GPU": 1}, {"zone": "a"}, 1), NodeGroup({"CPU": 8, "GPU": 1}, {}, 1)]
GROWS = [NodeGroup({"CPU": 2}, None, 3)]


def role(workers: int = 1, cpus: float = 1, **more: object) -> RoleConfig:
    values = {"num_workers": workers, "cpus_per_worker": cpus, **more}
    return RoleConfig.model_validate(values)


@pytest.mark.parametrize(
    ("present", "addable", "roles"),
    [
        (LAPTOP, [], {"actor": role(2), "critic": role(2, 0.5)}),
        (LAPTOP, [], {"actor": role(3), "critic": role(3, share_with="actor")}),
        (GPUS, [], {"actor": role(2, 4, gpus_per_worker=1, strategy="STRICT_SPREAD")}),
        (GPUS, [], {"actor": role(labels={"zone": "a"})}),
        ([], GROWS, {"actor": role(2, 2), "critic": role(labels={"zone": "a"})}),
        (LAPTOP, [NodeGroup({"CPU": 1}, None, math.inf)], {"actor": role(50)}),
    ],
)
def test_demands_that_fit_are_accepted(present, addable, roles) -> None:
    check_demands(pool_demands(roles), present, addable, data_cpus=1)


@pytest.mark.parametrize(
    ("present", "addable", "roles", "words"),
    [
        (LAPTOP, [], {"actor": role(2), "critic": role(2)},
         r"pools.critic \(2 x \(1 CPU\)\) .* use 3 CPU of 4; the cluster has 1 x \(4 CPU\) and no "
         "autoscaler; lower num_workers"),
        (LAPTOP, [], {"actor": role(), "reward": role(gpus_per_worker=1)},
         r"pools.reward \(1 x \(1 CPU, 1 GPU\)\) can never be placed: no node can hold one"),
        (LAPTOP, [], {"rollout": role(resources={"fast": 1})}, "1 fast"),
        (GPUS, [], {"actor": role(2, strategy="STRICT_PACK", gpus_per_worker=1)}, "STRICT_PACK"),
        (GPUS, [], {"actor": role(3, strategy="STRICT_SPREAD")}, "a node for each worker"),
        (GPUS, [], {"critic": role(labels={"zone": "b"})}, "zone=b.*no node can hold one"),
        (LAPTOP, GROWS, {"actor": role(2, 3)},
         r"use 1 CPU of 6; the cluster has 1 x \(4 CPU\), its autoscaler may run up to "
         r"3 x \(2 CPU\)"),
    ],
)  # fmt: skip
def test_demands_that_can_never_be_placed_are_refused_by_name(
    present, addable, roles, words
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_demands(pool_demands(roles), present, addable, data_cpus=1)


@pytest.mark.parametrize("workers", [2, [2, 8]])
def test_a_worker_larger_than_any_node_is_refused_although_the_totals_suffice(workers) -> None:
    four = [NodeGroup({"CPU": 8, "GPU": 4}, None, 4)]
    cluster = ClusterConfig.model_validate({"num_workers": workers, "gpus_per_worker": 8})
    words = (
        r"num_workers=\[?2.* \(2 x \(1 CPU, 8 GPU\)\) can never be placed: no node can hold one; "
    )
    with pytest.raises(ConfigError, match=words + r".* up to 4 x \(8 CPU, 4 GPU\)"):
        check_demands(worker_demands(cluster), LAPTOP, four, data_cpus=1)
