"""Secrets of a job by name: their values are on the cluster and never travel with the job.

MEDGPT_SECRETS, in the job's runtime_env, lists them: `HF_TOKEN,S3_KEY=/etc/secrets/s3`. A bare name
must be in the environment of every node; with a file, every process reads it where it starts.
"""

import os
from collections.abc import MutableMapping
from pathlib import Path

SECRETS_VARIABLE = "MEDGPT_SECRETS"
WORKER_SETUP_HOOK = "medgpt.jobs.secrets.fill_environment"


class MissingSecret(RuntimeError):
    """The message names the secret and the place where it should be."""


def load_secrets(environment: MutableMapping[str, str]) -> None:
    """Put all listed secrets into `environment`. Raises MissingSecret."""
    for item in filter(None, environment.get(SECRETS_VARIABLE, "").split(",")):
        name, _, file = item.partition("=")
        if file:
            try:
                environment[name] = Path(file).read_text("utf-8").strip()
            except OSError as error:
                raise MissingSecret(
                    f"--secret-env {name}={file}: {error.strerror} on {os.uname().nodename}; mount "
                    "the secret there on every node"
                ) from None
        elif not environment.get(name):
            raise MissingSecret(
                f"--secret-env {name} is not in the environment of Ray on {os.uname().nodename}; "
                "set it where Ray is started on every node, or name a file: "
                f"--secret-env {name}=/etc/secrets/{name.lower()}"
            )


def fill_environment() -> None:
    """What Ray calls in every worker before anything else (worker_process_setup_hook)."""
    load_secrets(os.environ)
