"""The output of a job is printed once although connections break; job ids are unique per run."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from medgpt.config.base import ConfigError
from medgpt.jobs import client as module
from medgpt.jobs.client import Job, LogFollower, find_job, job_id_prefix, list_run_jobs

RUN = "/shared/runs/sft"


def job_details(
    number: int, status: JobStatus = JobStatus.RUNNING, run_dir: str = RUN
) -> JobDetails:
    return JobDetails(
        type=JobType.SUBMISSION,
        submission_id=f"{job_id_prefix(run_dir)}-{number}",
        status=status,
        entrypoint="",
        start_time=1000 + number,
        metadata={module.STAGE_KEY: "sft", module.RUN_DIR_KEY: run_dir},
    )


class Dashboard:
    """A dashboard whose log arrives in chunks, a list per connection; all but the last break."""

    def __init__(self, *connections: Sequence[str]) -> None:
        self.connections = list(connections)
        self.jobs = [job_details(1)]

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        if not self.connections:
            raise RuntimeError("no answer")
        for chunk in self.connections.pop(0):
            yield chunk
        if self.connections:
            raise RuntimeError("the connection broke")
        self.jobs = [job_details(1, JobStatus.SUCCEEDED)]

    def list_jobs(self) -> list[JobDetails]:
        return self.jobs


class UnreachableDashboard(Dashboard):
    def list_jobs(self) -> list[JobDetails]:
        raise ConnectionError


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL_S", "RECONNECT_S"):
        monkeypatch.setattr(module, name, 0.01)


def follower(dashboard: Any) -> LogFollower:
    return LogFollower(dashboard, Job(job_details(1)))


def test_each_line_is_shown_once_over_connections_that_break(capsys) -> None:
    dashboard = Dashboard(["a\nb", "b\n"], ["a\n", "bb\nc\nhalf"], ["a\nbb\nc\nhalf of it"])
    ended = follower(dashboard).follow_until_end()
    assert ended.details.status == JobStatus.SUCCEEDED
    assert capsys.readouterr().out.splitlines() == ["a", "bb", "c", "half of it"]


def test_a_lost_cluster_is_an_error_with_a_remedy(monkeypatch) -> None:
    monkeypatch.setattr(module, "UNREACHABLE_TIMEOUT_S", 0.1)
    with pytest.raises(ConfigError, match="submit the same run to a new one, it resumes"):
        follower(UnreachableDashboard()).follow_until_end()


def test_jobs_of_a_run_are_ordered_by_attempt() -> None:
    dashboard: Any = Dashboard()
    other = job_details(3, run_dir="/elsewhere/runs/sft")
    dashboard.jobs = [job_details(10), job_details(9), other, job_details(1)]
    assert [job.attempt for job in list_run_jobs(dashboard, RUN)] == [1, 9, 10]
    assert [job.attempt for job in list_run_jobs(dashboard, f"{RUN}/")] == [1, 9, 10]
    assert find_job(dashboard, RUN).attempt == 10
    assert find_job(dashboard, other.submission_id or "").run_dir == "/elsewhere/runs/sft"
    with pytest.raises(ConfigError, match=r"jobs: sft-\w+-1, "):
        find_job(dashboard, "nothing")


@pytest.mark.parametrize("run_dir", ["s3://bucket/a b/模型", "/x/sft/", "/"])
def test_ray_accepts_the_ids_of_jobs(run_dir: str) -> None:
    assert job_id_prefix(run_dir) == job_id_prefix(run_dir)
    assert "/" not in job_id_prefix(run_dir)
    assert " " not in job_id_prefix(run_dir)
