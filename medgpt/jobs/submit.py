"""`medgpt submit`: check the config, package the folder, start the job, follow it."""

import os
import re
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from ray.job_submission import JobStatus, JobSubmissionClient

from medgpt.config.base import ConfigError
from medgpt.jobs import client as jobs
from medgpt.jobs import secrets
from medgpt.jobs.command import JobCommand, resolve_command
from medgpt.jobs.package import package_working_dir
from medgpt.jobs.preflight import check_capacity

SUPERVISE_COMMAND = ("python", "-m", "medgpt.jobs.supervise", "python", "-m", "medgpt")
PREFLIGHT_COMMAND = ("python", "-m", "medgpt.jobs.preflight")
PREFLIGHT_TIMEOUT_S = 300
ERROR_PREFIX = "medgpt: "
SECRET_PATTERN = re.compile(r"[A-Za-z_]\w*(=/[^,=]+)?")


def run_submit(
    stage: str,
    config: Path,
    overrides: Sequence[str],
    address: str,
    secret_env: Sequence[str],
    detach: bool,
) -> int:
    """Start or resume a run on a cluster and return the exit status of its command.

    Raises:
        ConfigError: the config is invalid, the run has a job already, or the cluster can never
            hold its workers.
    """
    command = resolve_command(stage, config, list(overrides))
    _check_secrets(secret_env, command.user_texts())
    client = jobs.connect(address)
    earlier = jobs.list_run_jobs(client, command.run_dir)
    if running := [job for job in earlier if not job.has_ended]:
        raise ConfigError(
            f"run.dir={command.run_dir} is in use by job {running[0].id}; watch it with "
            f"`medgpt job logs {running[0].id} --follow`, or stop it with `medgpt job stop`"
        )
    attempt = 1 + max((job.attempt for job in earlier), default=0)
    name = f"{jobs.job_id_prefix(command.run_dir)}-{attempt}"
    with tempfile.TemporaryDirectory(prefix="medgpt-") as scratch:
        package = Path(scratch) / "code.zip"
        _check_config_files(command, package_working_dir(Path.cwd(), package))
        runtime_env = _runtime_env(package, secret_env)
        _check_capacity(client, address, command, runtime_env)
        _submit_job(client, name, command, runtime_env)
    print(f"submitted {name}: {'resumes' if attempt > 1 else 'begins'} {command.run_dir}")
    if detach:
        print(f"watch it with `medgpt job logs {name} --follow --address {address}`")
        return 0
    return follow_job(client, jobs.find_job(client, name))


def run_status(name: str | None, address: str) -> None:
    """Print the status of the job with this id or run directory; None: of all jobs.

    Raises:
        ConfigError: there is no such job.
    """
    client = jobs.connect(address)
    for job in jobs.list_jobs(client) if name is None else [jobs.find_job(client, name)]:
        print(job)


def run_logs(name: str, address: str, follow: bool) -> int:
    """Print the output of a job; if it is followed, return the exit status of its command."""
    client = jobs.connect(address)
    job = jobs.find_job(client, name)
    if follow:
        return follow_job(client, job)
    print(client.get_job_logs(job.id), end="")
    return 0


def run_stop(name: str, address: str) -> None:
    """Stop a job. Raise ConfigError if there is no such job or it does not end."""
    client = jobs.connect(address)
    print(jobs.stop_job(client, jobs.find_job(client, name)))


def follow_job(client: JobSubmissionClient, job: jobs.Job) -> int:
    """Print the output of a job until it ends; return the exit status of its command."""
    try:
        job = jobs.LogFollower(client, job).follow_until_end()
    except KeyboardInterrupt:
        print(f"\n{job.id} is still running; stop it with `medgpt job stop {job.id}`")
        return 130
    print(job)
    if job.details.status == JobStatus.SUCCEEDED:
        return 0
    if job.details.driver_exit_code is None:
        print(job.details.message)  # the job failed, not its command
    return job.details.driver_exit_code or 1


def _check_secrets(items: Sequence[str], texts: Sequence[str]) -> None:
    """Raise ConfigError if an item is not NAME or NAME=FILE, or a text contains the value."""
    for item in items:
        if not SECRET_PATTERN.fullmatch(item):
            raise ConfigError(
                "--secret-env takes NAME, or NAME=FILE with the absolute path of a file on the "
                "cluster's nodes; the value itself must not be given"
            )
        name = item.partition("=")[0]
        value = os.environ.get(name)
        if value and any(value in text for text in texts):
            raise ConfigError(
                f"the value of {name} is in the config or in an override, which everyone on the "
                "cluster can read; remove it, since the job reads it on the cluster"
            )


def _check_config_files(command: JobCommand, packed: frozenset[str]) -> None:
    for name in command.config_files:
        if name not in packed:
            raise ConfigError(
                f"{name} is not in the package of the job: .gitignore, .rayignore or the exclude "
                "list of medgpt matches it; move it to another folder"
            )


def _runtime_env(package: Path, secret_env: Sequence[str]) -> dict[str, Any]:
    runtime_env: dict[str, Any] = {"working_dir": str(package)}
    if secret_env:
        runtime_env["env_vars"] = {secrets.SECRETS_VARIABLE: ",".join(secret_env)}
        runtime_env["worker_process_setup_hook"] = secrets.WORKER_SETUP_HOOK
    return runtime_env


def _check_capacity(
    client: JobSubmissionClient, address: str, command: JobCommand, runtime_env: dict[str, Any]
) -> None:
    """Raise ConfigError if the cluster can never hold the workers of the stage.

    The dashboard lists the current nodes. Only a process on the cluster can read the limits of
    the autoscaler, so if the nodes are not enough, a small job checks those.
    """
    try:
        check_capacity(command.configs, jobs.list_alive_nodes(address), [])
        return
    except ConfigError:
        print("the current nodes are not enough; checking what the autoscaler may add ...")
    job = client.submit_job(
        entrypoint=shlex.join([*PREFLIGHT_COMMAND, *command.submit_arguments]),
        runtime_env=runtime_env,
        submission_id=f"preflight-{uuid4().hex[:8]}",
    )
    deadline = time.monotonic() + PREFLIGHT_TIMEOUT_S
    while not (status := client.get_job_status(job)).is_terminal():
        if time.monotonic() > deadline:
            client.stop_job(job)
            raise ConfigError(
                f"the cluster started no job within {PREFLIGHT_TIMEOUT_S} s; look at {job}"
            )
        time.sleep(jobs.POLL_S)
    output = client.get_job_logs(job)
    client.delete_job(job)
    if status != JobStatus.SUCCEEDED:
        errors = [line for line in output.splitlines() if line.startswith(ERROR_PREFIX)]
        raise ConfigError(
            errors[0].removeprefix(ERROR_PREFIX) if errors else f"preflight: {output}"
        )


def _submit_job(
    client: JobSubmissionClient, name: str, command: JobCommand, runtime_env: dict[str, Any]
) -> None:
    try:
        client.submit_job(
            entrypoint=shlex.join([*SUPERVISE_COMMAND, *command.cli_arguments]),
            runtime_env=runtime_env,
            submission_id=name,
            metadata={jobs.STAGE_KEY: command.stage, jobs.RUN_DIR_KEY: command.run_dir},
        )
    except RuntimeError as error:  # also if another process submitted the run a moment ago
        raise ConfigError(f"the cluster did not accept job {name}: {error}") from None
