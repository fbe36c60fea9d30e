"""A submitted search on a cluster that scales from zero workers and back."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from medgpt.config.tune import TuneStageConfig
from medgpt.tune.results import trials_url
from medgpt.tune.trial_records import TrialRecords
from tests.clusters.local_cluster import LocalCluster, wait_until
from tests.tune.cases import search_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
TRAIN, ROLLOUT, DATA = (f'labels={{role="{role}"}}' for role in ("train", "rollout", "data"))
ALONE = (  # a trial fills two nodes
    *("ppo.max_iterations=600", "ppo.prompt_epochs=400", "ppo.epochs=16", "judge.every=50"),
    *("diagnosis.window=2", "diagnosis.max_kl=30.0", "optimizer.learning_rate=1e-6"),
    f"pools.actor={{cpus_per_worker=1,engine={{zero_stage=0}},{TRAIN}}}",
    f"pools.critic={{cpus_per_worker=1,engine={{zero_stage=0}},{TRAIN}}}",
)
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
    config, words = search(tmp_path, base, SHORT)
    assert cluster.num_raylets() == 1
    job = cluster.start(f"{submit} configs/debug/tune.toml {words}")
    wait_until(lambda: cluster.num_raylets() >= 5, "four nodes more", 400)
    out, _ = job.communicate(timeout=400)
    assert job.returncode == 0, out
    assert statuses(config) == {"001": "finished", "002": "finished"}, out
    assert "2 trials at a time" in out
    wait_until(lambda: cluster.num_raylets() == 1, "without workers again", 240)
    roles = cluster.run_program(
        "print(json.dumps([node['Labels'].get('role') for node in ray.nodes()]))"
    )
    assert roles.count("train") >= 2  # actor and critic of one trial fill a node
    assert {"head", "data", "rollout"} < set(roles)


def test_nodes_of_a_stopped_trial_are_released_while_others_train(
    cluster: LocalCluster, base: Path, tmp_path: Path
) -> None:
    wild = 'search={"optimizer.learning_rate"={loguniform=[0.3,0.31]}}'
    config, words = search(tmp_path, base, (*SHORT, *ALONE), wild)
    job = cluster.start(f"medgpt submit tune configs/debug/tune.toml {words}")
    try:
        wait_until(lambda: cluster.num_raylets() >= 7, "two trials on four nodes for training", 300)
        wait_until(lambda: statuses(config).get("002") == "diverged", "the end of a trial", 200)
        assert cluster.num_raylets() <= 8  # one more where both trials read data at once
        wait_until(lambda: cluster.num_raylets() <= 6, "without the nodes of the trial", 200)
        assert statuses(config)["001"] == "running"
        assert job.poll() is None
    finally:
        cluster.start(f"medgpt job stop {config.run.dir}").communicate(timeout=60)


def search(
    folder: Path, base: Path, of_base: Sequence[str], *more: str
) -> tuple[TuneStageConfig, str]:
    """Return the config, and overrides that turn configs/debug/tune.toml into it."""
    overrides = f"[{', '.join(repr(one) for one in of_base)}]"
    config = search_config(folder, base, *SEARCH, *more, of_base=overrides)
    words = [f"run.dir={config.run.dir}", f"base={config.base}", f"overrides={overrides}"]
    return config, shlex.join([*words, *SEARCH, *more])


def statuses(config: TuneStageConfig) -> dict[str, str]:
    """Return the statuses of the trials by name."""
    return {record.name: record.status for record in TrialRecords(trials_url(config)).all()}
