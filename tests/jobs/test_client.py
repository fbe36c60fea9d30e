"""What a job says is shown once, whatever the connection does; runs have names of their own."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from medgpt.config.base import ConfigError
from medgpt.jobs import client as module
from medgpt.jobs.client import Follower, Job, find, jobs_of, run_id

RUN = "/shared/runs/sft"


def details(number: int, status: JobStatus = JobStatus.RUNNING, run_dir: str = RUN) -> JobDetails:
    return JobDetails(
        type=JobType.SUBMISSION,
        submission_id=f"{run_id(run_dir)}-{number}",
        status=status,
        entrypoint="",
        start_time=1000 + number,
        metadata={module.STAGE: "sft", module.RUN_DIR: run_dir},
    )


class Dashboard:
    """Its log comes in chunks, a list of them for each connection; all but the last break."""

    def __init__(self, *connections: Sequence[str]) -> None:
        self.connections = list(connections)
        self.jobs = [details(1)]

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        if not self.connections:
            raise RuntimeError("no answer")
        for chunk in self.connections.pop(0):
            yield chunk
        if self.connections:
            raise RuntimeError("the connection broke")
        self.jobs = [details(1, JobStatus.SUCCEEDED)]

    def list_jobs(self) -> list[JobDetails]:
        return self.jobs


class Gone(Dashboard):
    def list_jobs(self) -> list[JobDetails]:
        raise ConnectionError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL_S", "RECONNECT_S"):
        monkeypatch.setattr(module, name, 0.01)


def follower(dashboard: Any) -> Follower:
    return Follower(dashboard, Job(details(1)))


def test_each_line_is_shown_once_over_connections_that_break(capsys) -> None:
    dashboard = Dashboard(["a\nb", "b\n"], ["a\n", "bb\nc\nhalf"], ["a\nbb\nc\nhalf of it"])
    ended = follower(dashboard).to_the_end()
    assert ended.details.status == JobStatus.SUCCEEDED
    assert capsys.readouterr().out.splitlines() == ["a", "bb", "c", "half of it"]


def test_a_cluster_that_is_lost_is_told_with_what_to_do(monkeypatch) -> None:
    monkeypatch.setattr(module, "LOST_S", 0.1)
    with pytest.raises(ConfigError, match="submit the same run to a new one, it resumes"):
        follower(Gone()).to_the_end()


def test_jobs_of_a_run_are_in_order_and_no_other_run_s() -> None:
    dashboard: Any = Dashboard()
    other = details(3, run_dir="/elsewhere/runs/sft")
    dashboard.jobs = [details(10), details(9), other, details(1)]
    assert [job.attempt for job in jobs_of(dashboard, RUN)] == [1, 9, 10]
    assert [job.attempt for job in jobs_of(dashboard, f"{RUN}/")] == [1, 9, 10]
    assert find(dashboard, RUN).attempt == 10
    assert find(dashboard, other.submission_id or "").run_dir == "/elsewhere/runs/sft"
    with pytest.raises(ConfigError, match=r"there are sft-\w+-1, "):
        find(dashboard, "nothing")


@pytest.mark.parametrize("run_dir", ["s3://bucket/a b/模型", "/x/sft/", "/"])
def test_an_id_is_what_ray_takes(run_dir: str) -> None:
    assert run_id(run_dir) == run_id(run_dir)
    assert "/" not in run_id(run_dir)
    assert " " not in run_id(run_dir)
