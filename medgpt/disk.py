"""A full disk, in words that a user can act on."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from medgpt.config import ConfigError

# by their words: safetensors, pyarrow and Ray wrap the error, and only the text comes through
FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


@contextmanager
def full_disk_told(run_dir: str, what: str) -> Iterator[None]:
    """Raises ConfigError in place of an error that says there is no space left for `what`."""
    try:
        yield
    except Exception as error:
        reasons = [reason for reason in FULL if reason in str(error)]
        if not reasons or isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"run.dir={run_dir}: {reasons[0]} while writing {what}; free space and repeat the "
            "command, the run continues from its newest complete checkpoint"
        ) from None
