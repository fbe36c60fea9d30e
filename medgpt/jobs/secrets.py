"""Secrets of a job by name: their values are on the cluster and are never sent with the job.

MEDGPT_SECRETS in the runtime_env of the job lists them: `HF_TOKEN,S3_KEY=/etc/secrets/s3`. A bare
name must be in the environment of every node; a file is read by every process on its node.
"""

import os
from collections.abc import MutableMapping
from pathlib import Path

SECRETS_VARIABLE = "MEDGPT_SECRETS"
WORKER_SETUP_HOOK = "medgpt.jobs.secrets.fill_environment"


class MissingSecret(RuntimeError):
    """A secret is missing; the message names it and where it should be."""


def load_secrets(environment: MutableMapping[str, str]) -> None:
    """Set all listed secrets in `environment`. Raise MissingSecret if one is missing."""
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
    """Set the secrets in a Ray worker; Ray calls it first (worker_process_setup_hook)."""
    load_secrets(os.environ)
