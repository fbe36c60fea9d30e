"""Turn a full disk or an unreachable store into a ConfigError that names the remedy."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from medgpt.config.base import ConfigError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNREACHABLE = (  # classes by name, because only the clients of stores in use are installed
    "botocore.exceptions.EndpointConnectionError",  # s3
    "botocore.exceptions.ConnectionClosedError",
    "botocore.exceptions.ConnectTimeoutError",
    "botocore.exceptions.ReadTimeoutError",
    "aiohttp.client_exceptions.ClientConnectorError",  # gs, az, http
    "aiohttp.client_exceptions.ClientConnectorDNSError",
    "aiohttp.client_exceptions.ServerDisconnectedError",
    "google.auth.exceptions.TransportError",
    "azure.core.exceptions.ServiceRequestError",
    "requests.exceptions.ConnectionError",  # oss
    "oss2.exceptions.RequestError",
)


@contextmanager
def storage_errors(
    run_dir: str, target: str, kept: list[ConfigError] | None = None
) -> Iterator[None]:
    """Raise errors of a full disk or unreachable store as ConfigError, or add it to `kept`."""
    try:
        yield
    except Exception as error:
        explained = error if isinstance(error, ConfigError) else _explain(error, run_dir, target)
        if explained is None:
            raise
        if kept is None:
            raise explained from None
        kept.append(explained)


def _explain(error: BaseException, run_dir: str, target: str) -> ConfigError | None:
    again = "and the run continues from its newest complete checkpoint"
    if code := _disk_full_code(error):
        return ConfigError(
            f"run.dir={run_dir}: {os.strerror(code)} while writing {target}; free space and repeat "
            f"the command, {again}"
        )
    classes = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(error).__mro__}
    for name in UNREACHABLE if "://" in run_dir else ():
        # Ray keeps only the traceback of errors in data tasks and training workers
        if name in classes or f"{name}:" in str(error):
            return ConfigError(
                f"run.dir={run_dir}: the store does not answer ({name.rpartition('.')[2]}) at "
                f"{target}; repeat the command when it does, {again}"
            )
    return error.__cause__ and _explain(error.__cause__, run_dir, target)


def _disk_full_code(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in DISK_FULL else None
    # Rust libraries (safetensors, tokenizers) and Ray keep only the text of an OSError
    texts = {code: (f"[Errno {code}]", f"(os error {code})") for code in DISK_FULL}
    return next((c for c, marks in texts.items() if any(m in str(error) for m in marks)), None)
