"""A full disk or a store that does not answer, in words that a user can act on."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from medgpt.config.base import ConfigError

# by their words: safetensors, pyarrow and Ray wrap the error, and only the text comes through
DISK_FULL_TEXTS = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
# where a run directory has a scheme: what its clients say after their own tries
UNREACHABLE_TEXTS = (
    "Could not connect to the endpoint URL",  # s3
    "Connection was closed before we received a valid response",
    "Connect timeout on endpoint URL",
    "Read timeout on endpoint URL",
    "Cannot connect to host",  # gs, az, http
    "Server disconnected",
    "Max retries exceeded with url",  # oss
)


@contextmanager
def storage_errors(run_dir: str, target: str) -> Iterator[None]:
    """Raises ConfigError in place of an error that says why `what` could not be written or read."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ConfigError):
            raise
        if message := _matching_text(error, DISK_FULL_TEXTS):
            raise ConfigError(
                f"run.dir={run_dir}: {message} while writing {target}; free space and repeat the "
                "command, the run continues from its newest complete checkpoint"
            ) from None
        if "://" in run_dir and (message := _matching_text(error, UNREACHABLE_TEXTS)):
            raise ConfigError(
                f"run.dir={run_dir}: the store does not answer ({message}) at {target}; repeat the "
                "command when it does, the run continues from its newest complete checkpoint"
            ) from None
        raise


def _matching_text(error: Exception, texts: tuple[str, ...]) -> str | None:
    return next((text for text in texts if text in str(error)), None)
