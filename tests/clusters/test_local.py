"""The local cluster scales from zero workers and stops everything that it started."""

import json
import stat
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from medgpt.runs import Run
from tests.clusters.local_cluster import LocalCluster, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster() as cluster:
        yield cluster


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def submit(cluster: LocalCluster, run: Path, base: Path, corpus: Path, *overrides: str) -> str:
    quoted = [
        *[f"run.dir={run}", f"model.name={base}", f'data.sources.0.paths=["{corpus}/sft"]'],
        *["train.max_steps=3", "train.epochs=1", "report.prompts=[]"],
        *['cluster.labels={role="train"}', *overrides],
    ]
    arguments = " ".join(f"'{argument}'" for argument in quoted)
    return f"ray job submit --working-dir . -- medgpt sft configs/debug/sft.toml {arguments}"


def test_the_local_cluster_is_private_and_requires_the_token(cluster: LocalCluster) -> None:
    assert mode(cluster.private) == 0o700
    assert mode(cluster.token) == 0o600
    assert mode(cluster.token.parent) == 0o700
    assert (cluster.private / "ray" / "session_latest").exists()  # and what is spilled lies below
    jobs = f"{cluster.url}/api/jobs/"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(jobs)
    headers = {"Authorization": f"Bearer {cluster.token.read_text()}"}
    with urllib.request.urlopen(urllib.request.Request(jobs, headers=headers)) as answer:
        assert json.load(answer) == []
    listening = [
        c.laddr.ip
        for process in cluster.processes()
        for c in process.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == int(cluster.url.rsplit(":", 1)[1])
    ]
    assert set(listening) == {"127.0.0.1"}
    assert cluster.token.read_text() not in cluster.said


def test_jobs_on_the_local_cluster_can_read_the_autoscaling_limits(cluster: LocalCluster) -> None:
    program = "print(json.dumps(dict(state.get_max_resources_from_cluster_config())))"
    most = cluster.run_program(program)
    assert most["CPU"] == 2 * 2 + 4 + 4


@pytest.mark.slow
def test_a_job_starts_from_zero_workers_and_leaves_none(
    cluster: LocalCluster, base: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    assert cluster.num_raylets() == 1
    job = cluster.start(
        submit(cluster, tmp_path / "run", base, tiny_corpus, "cluster.num_workers=2")
    )
    wait_until(lambda: cluster.num_raylets() >= 3, "two nodes more", 300)
    out, _ = job.communicate(timeout=400)
    assert job.returncode == 0, out
    assert (
        "waiting up to 600 s for the cluster to grow: needs 3 CPU in total (with data tasks), "
        "the cluster has 0 now" in out
    )
    run = Run(str(tmp_path / "run"))
    assert run.finished
    assert run.manifest["world_size"] == 2
    wait_until(lambda: cluster.num_raylets() == 1, "without workers again", 240)

    token = cluster.token.read_text()
    for path in [*cluster.private.rglob("*"), *(tmp_path / "run").rglob("*")]:
        if path.is_file():
            assert token.encode() not in path.read_bytes(), path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("cluster.num_workers=20", "needs 21 CPU in all (data tasks included), the cluster has 12"),
        ("cluster.gpus_per_worker=1", "GPU in all (data tasks included), the cluster has 0 at"),
    ],
)
def test_a_job_that_can_never_be_placed_is_refused(
    cluster: LocalCluster, base: Path, tiny_corpus: Path, tmp_path: Path, override: str, reason: str
) -> None:
    batch = "train.global_batch_size=80"
    job = cluster.start(submit(cluster, tmp_path / "run", base, tiny_corpus, override, batch))
    out, _ = job.communicate(timeout=120)
    assert job.returncode != 0
    assert reason in out
    assert cluster.num_raylets() == 1


@pytest.mark.slow
def test_a_job_whose_labels_no_node_has_says_so_and_ends(
    cluster: LocalCluster, base: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    overrides = ['cluster.labels={role="poet"}', "cluster.wait_s=20"]
    job = cluster.start(submit(cluster, tmp_path / "run", base, tiny_corpus, *overrides))
    out, _ = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "its autoscaler has no free nodes that could hold this" in out
    assert "after cluster.wait_s=20 s" in out


def test_down_ends_what_up_started_and_nothing_else(ray_session: None) -> None:
    import ray

    with LocalCluster() as cluster:
        assert cluster.num_raylets() == 1
        others = [p for p in psutil.process_iter() if "raylet" in p.name()]
        others = [process for process in others if process not in cluster.processes()]
        assert others
    assert cluster.processes() == []
    assert not cluster.private.exists()
    assert cluster.token.exists()
    assert all(process.is_running() for process in others)
    assert ray.is_initialized()
