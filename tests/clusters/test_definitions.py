"""Cluster definitions against Ray's schema, rules and scheduler, without a cloud."""

import re
import subprocess
import sys

import pytest
from ray._private.label_utils import validate_node_labels

from medgpt.config.pools import RoleConfig
from medgpt.config.train import ClusterConfig
from tests.clusters.definitions import (
    ALL,
    CLOUDS,
    CLUSTERS,
    HEADS,
    LAUNCHED,
    ROOT,
    autoscaling,
    definition,
    groups,
    launched,
    manifest,
    ray_job,
    schedule,
)

ROLES = ["data", "rollout", "train"]


@pytest.mark.parametrize("name", ALL)
def test_ray_accepts_the_definition_and_workers_start_from_zero(name: str) -> None:
    assert sorted(groups(name)) == ROLES
    for group in groups(name).values():
        assert group.min_worker_nodes == 0
        assert group.max_worker_nodes > 0
    assert autoscaling(name).get_idle_timeout_s() in (60, 600)


@pytest.mark.parametrize("name", ALL)
def test_the_head_gets_no_work(name: str) -> None:
    nodes = autoscaling(name).get_node_type_configs()
    (head,) = [config for key, config in nodes.items() if key in HEADS]
    assert not head.resources.get("CPU")
    assert not head.resources.get("GPU")
    assert head.labels == {"role": "head"}
    assert launched(schedule(name, ({"CPU": 1}, {})))
    if name in CLOUDS:
        (start,) = [c for c in definition(name)["head_start_ray_commands"] if "--head" in c]
        assert "--num-cpus=0 --num-gpus=0 --labels=role=head" in start


@pytest.mark.parametrize("name", ALL)
def test_groups_have_the_same_labels_everywhere(name: str) -> None:
    for role, group in groups(name).items():
        assert group.labels["role"] == role
        market = "spot" if role == "data" else "on-demand"
        assert group.labels["ray.io/market-type"] == market
        assert ("ray.io/accelerator-type" in group.labels) == ("GPU" in group.resources)
        own = {k: v for k, v in group.labels.items() if not k.startswith("ray.io/")}
        validate_node_labels(own)  # as of a user of `ray start --labels`


@pytest.mark.parametrize("name", ALL)
def test_labels_of_a_config_bring_nodes_of_their_group(name: str) -> None:
    workers = ClusterConfig(labels={"role": "train"})
    rollout = RoleConfig(labels={"role": "rollout"})
    gpu = {"GPU": 1} if "GPU" in groups(name)["train"].resources else {}
    reply = schedule(
        name,
        ({"CPU": 1, **gpu}, workers.labels),
        ({"CPU": 1, **gpu}, rollout.labels),
        ({"CPU": 1}, {"role": "data"}),
    )
    assert launched(reply) == {"train": 1, "rollout": 1, "data": 1}
    assert not reply.infeasible_resource_requests


@pytest.mark.parametrize("name", [*CLOUDS, "kuberay"])
def test_data_tasks_bring_no_gpus(name: str) -> None:
    assert launched(schedule(name, *[({"CPU": 1}, {})] * 20)) == {"data": 2}


@pytest.mark.parametrize("name", ALL)
def test_demands_that_no_group_can_meet_are_infeasible(name: str) -> None:
    assert schedule(name, ({"CPU": 1}, {"role": "poet"})).infeasible_resource_requests
    assert schedule(name, ({"CPU": 1, "GPU": 9}, {})).infeasible_resource_requests


@pytest.mark.parametrize("name", CLOUDS)
def test_clouds_have_authentication_and_no_public_address(name: str) -> None:
    tree = definition(name)
    assert tree["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for kind in ("head", "worker"):
        for command in tree[f"{kind}_start_ray_commands"]:
            assert "clusters/node.sh" in command or command.endswith("ray stop")
    assert "export RAY_AUTH_MODE=token" in (CLUSTERS / "node.sh").read_text("utf-8")
    assert tree["provider"]["use_internal_ips"]
    (start,) = [c for c in tree["head_start_ray_commands"] if "--head" in c]
    assert "--dashboard-host=127.0.0.1" in start
    private = [c for c in tree["worker_start_ray_commands"] if "ray start" in c]
    assert all("--temp-dir=$HOME/private/" in command for command in [start, *private])
    assert "chmod 700 ~/private" in (CLUSTERS / "setup.sh").read_text("utf-8")


@pytest.mark.parametrize("name", CLOUDS)
def test_spot_nodes_are_watched(name: str) -> None:
    (watch,) = [c for c in definition(name)["worker_start_ray_commands"] if "spot_notice" in c]
    assert f"spot_notice.py {name} --address $RAY_HEAD_IP:6379" in watch


def test_nothing_looks_like_a_secret() -> None:
    for path in [p for p in CLUSTERS.rglob("*") if p.is_file() and "build" not in p.parts]:
        text = path.read_text("utf-8")
        shapes = (
            r"\b(AKIA|ASIA|LTAI)\w{12,}",
            r"-----BEGIN",
            r"\b[0-9a-fA-F]{32,}\b",
            r"(?i)(secret|password|token|key)['\"]?\s*[:=]\s*['\"]?\w{16,}",
        )
        for shape in shapes:
            assert not re.search(shape, text), f"{path}: {shape}"


def test_files_that_the_definitions_name_exist() -> None:
    for path in [*CLUSTERS.glob("*.yaml"), *CLUSTERS.glob("*.sh"), *CLUSTERS.glob("kuberay/**/*")]:
        if not path.is_file():
            continue
        named = re.findall(
            r"\b((?:clusters|configs|jobs)/[\w./-]*\w\.(?:py|sh|toml|txt))", path.read_text("utf-8")
        )
        for name in named:
            assert (ROOT / name).exists(), f"{path.name} names {name}"


@pytest.mark.parametrize("script", ["up.sh", "down.sh", "common.sh", "setup.sh", "node.sh"])
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(CLUSTERS / script)], check=True)


@pytest.mark.parametrize("name", ALL)
def test_jobs_can_read_the_autoscaling_limits_of_a_definition(name: str) -> None:
    path = CLUSTERS / ("kuberay/cluster/raycluster.yaml" if name == "kuberay" else f"{name}.yaml")
    program = (
        f"import sys; sys.path.insert(0, {str(CLUSTERS)!r}); import publish_limits as p; from "
        f"pathlib import Path; c = p.cluster_config(p.load_definition(Path({str(path)!r})))\n"
        "print(sorted((g.name, g.max_count, g.resources['CPU']) for g in c.node_group_configs))"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    expected = sorted(
        (key, group.max_worker_nodes, int(group.resources["CPU"]))
        for key, group in groups(name).items()
    )
    assert out.strip() == str(expected)


def test_versions_are_those_of_the_pinned_tree() -> None:
    pins = (ROOT / "jobs/constraints.txt").read_text("utf-8")
    (version,) = re.findall(r"^ray==(.+)$", pins, re.MULTILINE)
    assert manifest("cluster/raycluster.yaml")["spec"]["rayVersion"] == version
    assert ray_job()["spec"]["rayClusterSpec"]["rayVersion"] == version
    assert LAUNCHED[0] == "local"
