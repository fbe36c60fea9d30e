"""Client of the Ray dashboard: lists, follows and stops jobs."""

import asyncio
import hashlib
import logging
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import requests
from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.state import list_nodes

from medgpt.cluster.capacity import NodeGroup, schedulable_resources
from medgpt.config.base import ConfigError
from medgpt.metrics import ConsoleReporter

STAGE_KEY, RUN_DIR_KEY = "medgpt-stage", "medgpt-run-dir"  # keys in the metadata of a job
PROGRESS_LINE = re.compile(r"\w+: (?P<phase>\D+) (?P<done>\d+)/(?P<total>\d+)(?: +(?P<facts>.*))?")
POLL_S = 0.5
RECONNECT_S = 2
STOP_TIMEOUT_S = 60
UNREACHABLE_TIMEOUT_S = 60.0  # the dashboard may be restarting
MAX_LISTED_NODES = 10_000  # the maximum that Ray lists


@dataclass(frozen=True)
class Job:
    """One attempt of a run on this cluster."""

    details: JobDetails

    @property
    def id(self) -> str:
        return str(self.details.submission_id)

    @property
    def run_dir(self) -> str:
        return (self.details.metadata or {})[RUN_DIR_KEY]

    @property
    def stage(self) -> str:
        return (self.details.metadata or {})[STAGE_KEY]

    @property
    def attempt(self) -> int:
        return int(self.id.rpartition("-")[2])

    @property
    def has_ended(self) -> bool:
        return self.details.status.is_terminal()

    def __str__(self) -> str:
        status, code = self.details.status, self.details.driver_exit_code
        start_time = time.localtime((self.details.start_time or 0) / 1e3)
        started = time.strftime("%Y-%m-%d %H:%M", start_time)
        with_code = f" ({code})" if status == JobStatus.FAILED and code is not None else ""
        return f"{self.id}  {status}{with_code}  since {started}  {self.run_dir}"


def connect(address: str) -> JobSubmissionClient:
    """Connect to a dashboard. Raise ConfigError if none answers or it rejects the token."""
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"--address {address}: give the URL of the cluster's dashboard, http://HOST:8265"
        )
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # else RAY_ADDRESS would be used
    try:
        client = JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ConfigError(
            f"--address {address}: {str(error).splitlines()[0].rstrip('.')}; set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's token"
        ) from None
    except (OSError, RuntimeError, requests.RequestException) as error:
        raise ConfigError(
            f"--address {address}: no Ray dashboard answers ({error}); start the cluster, or "
            "forward its port 8265 to this machine"
        ) from None
    for name in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    return client


def job_id_prefix(run_dir: str) -> str:
    """Return the prefix of the ids of all jobs of a run."""
    name = re.sub(r"[^\w.-]", "-", run_dir.rstrip("/").rpartition("/")[2])
    return f"{name}-{hashlib.sha256(run_dir.rstrip('/').encode()).hexdigest()[:8]}"


def list_jobs(client: JobSubmissionClient) -> list[Job]:
    """Return the jobs started by `medgpt submit`, the newest last."""
    every = client.list_jobs()
    submitted = [Job(details) for details in every if RUN_DIR_KEY in (details.metadata or {})]
    return sorted(submitted, key=lambda job: (job.details.start_time or 0, job.id))


def list_run_jobs(client: JobSubmissionClient, run_dir: str) -> list[Job]:
    """Return the jobs of a run, by attempt."""
    prefix = job_id_prefix(run_dir)
    run_jobs = [job for job in list_jobs(client) if job.id.rpartition("-")[0] == prefix]
    return sorted(run_jobs, key=lambda job: job.attempt)


def find_job(client: JobSubmissionClient, name: str) -> Job:
    """Return the job with this id, or the newest job of the run in this directory.

    Raises:
        ConfigError: there is no such job.
    """
    all_jobs = list_jobs(client)
    matching = [job for job in all_jobs if name in (job.id, job.run_dir)]
    if not matching:
        known = ", ".join(job.id for job in all_jobs) or "none"
        raise ConfigError(f"JOB={name}: no job has this id or run directory; jobs: {known}")
    return matching[-1]


def list_alive_nodes(address: str) -> list[NodeGroup]:
    """Return the current nodes; the dashboard does not report what the autoscaler could add."""
    states: Any = list_nodes(address, limit=MAX_LISTED_NODES, filters=[("state", "=", "ALIVE")])
    return [
        NodeGroup(schedulable_resources(node.resources_total), node.labels, 1) for node in states
    ]


class LogFollower:
    """Prints the output of a job, each line once, reconnecting when a connection breaks."""

    def __init__(self, client: JobSubmissionClient, job: Job) -> None:
        self.client, self.job, self.num_shown_lines = client, job, 0
        self.reporter = ConsoleReporter(job.stage)

    def follow_until_end(self) -> Job:
        """Print the output until the job ends and return the job.

        Raises:
            ConfigError: the cluster no longer answers.
        """
        deadline = time.monotonic() + UNREACHABLE_TIMEOUT_S
        try:
            while True:
                before = self.num_shown_lines
                with suppress(RuntimeError, ClientError, OSError):
                    asyncio.run(self._show_log())
                with suppress(OSError, RuntimeError):
                    if (job := find_job(self.client, self.job.id)).has_ended:
                        return job
                    deadline = time.monotonic() + UNREACHABLE_TIMEOUT_S
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"the cluster has not answered for {UNREACHABLE_TIMEOUT_S:g} s; if its "
                        "head is lost, submit the same run to a new one, it resumes"
                    )
                time.sleep(POLL_S if self.num_shown_lines > before else RECONNECT_S)
        finally:
            self.reporter.close()

    async def _show_log(self) -> None:
        number, rest = 0, ""
        async for chunk in self.client.tail_job_logs(self.job.id):
            *lines, rest = (rest + chunk).split("\n")
            for line in lines:
                number += 1
                self._show_line(number, line)
        if rest:
            self._show_line(number + 1, rest)

    def _show_line(self, number: int, line: str) -> None:
        """Print a line unless it was printed before; on a terminal, show progress as a bar."""
        if number <= self.num_shown_lines:
            return
        self.num_shown_lines = number
        if self.reporter.console.is_terminal and (progress := PROGRESS_LINE.fullmatch(line)):
            done, total = int(progress["done"]), int(progress["total"])
            self.reporter.advance(progress["phase"], done, total, progress["facts"] or "")
        else:
            self.reporter.console.print(line, markup=False)


def stop_job(client: JobSubmissionClient, job: Job) -> Job:
    """Stop a job and wait until it has ended.

    Raises:
        ConfigError: the job did not end in time.
    """
    client.stop_job(job.id)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while not job.has_ended:
        if time.monotonic() > deadline:
            raise ConfigError(f"{job.id} has not ended after {STOP_TIMEOUT_S} s; check its node")
        time.sleep(POLL_S)
        job = find_job(client, job.id)
    return job
