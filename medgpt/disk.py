"""Turn a full disk or an unreachable store into a ConfigError that names the remedy."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from medgpt.config.base import ConfigError

# matched by text: safetensors, pyarrow and Ray wrap the error and keep only its message
DISK_FULL_TEXTS = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
# errors of remote stores' clients after their own retries
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
    """Raise ConfigError for errors that mean a full disk or an unreachable store at `target`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ConfigError):
            raise
        if message := _matching_text(error, DISK_FULL_TEXTS):
            raise ConfigError(
                f"run.dir={run_dir}: {message} while writing {target}; free space and repeat the "
                "command, and the run continues from its newest complete checkpoint"
            ) from None
        if "://" in run_dir and (message := _matching_text(error, UNREACHABLE_TEXTS)):
            raise ConfigError(
                f"run.dir={run_dir}: the store does not answer ({message}) at {target}; repeat the "
                "command when it does, and the run continues from its newest complete checkpoint"
            ) from None
        raise


def _matching_text(error: Exception, texts: tuple[str, ...]) -> str | None:
    return next((text for text in texts if text in str(error)), None)
