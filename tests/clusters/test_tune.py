"""A submitted search on a cluster that starts from no workers, and ends without any."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from medgpt.tune.record import Records
from medgpt.tune.results import trials_url
from tests.clusters.local import LocalCluster, wait_until
from tests.tune.cases import search_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
TRAIN, ROLLOUT, DATA = (f'labels={{role="{role}"}}' for role in ("train", "rollout", "data"))
SHORT = (
    "ppo.max_iterations=2",
    f"pools.actor={{cpus_per_worker=0.5,engine={{zero_stage=0}},{TRAIN}}}",
    f"pools.critic={{cpus_per_worker=0.5,engine={{zero_stage=0}},{TRAIN}}}",
    f"pools.rollout={{cpus_per_worker=0.5,{ROLLOUT}}}",
    f"pools.reward={{cpus_per_worker=0.2,{DATA}}}",
    f"pools.reference={{cpus_per_worker=0.2,{DATA}}}",
)
SEARCH = ("tune.num_trials=2", "tune.scheduler=none", "check.seeds=0")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster() as cluster:
        yield cluster


@pytest.mark.parametrize(
    "submit", ["medgpt submit tune", "ray job submit --working-dir . -- medgpt tune"]
)
def test_a_search_brings_nodes_of_all_groups_and_leaves_none(
    cluster: LocalCluster, base: Path, tmp_path: Path, submit: str
) -> None:
    of_base = f"[{', '.join(repr(one) for one in SHORT)}]"
    config = search_config(tmp_path, base, *SEARCH, of_base=of_base)
    overrides = [
        f"run.dir={config.run.dir}", f"base={config.base}", f"overrides={of_base}", *SEARCH,
    ]  # fmt: skip
    assert cluster.raylets() == 1
    job = cluster.with_it(f"{submit} configs/debug/tune.toml {shlex.join(overrides)}")
    wait_until(lambda: cluster.raylets() >= 5, "four nodes more", 400)
    out, _ = job.communicate(timeout=400)
    assert job.returncode == 0, out
    found = Records(trials_url(config)).all()
    assert {record.name: record.status for record in found} == {
        "001": "finished", "002": "finished"
    }, out  # fmt: skip
    assert "2 trials at a time" in out
    wait_until(lambda: cluster.raylets() == 1, "without workers again", 240)
    roles = cluster.ask("print(json.dumps([node['Labels'].get('role') for node in ray.nodes()]))")
    assert roles.count("train") >= 2  # actor and critic of one trial fill a node
    assert {"head", "data", "rollout"} < set(roles)
