"""Errors of a full disk or an unreachable store are recognized by class and errno."""

import errno
import os

import pytest
from ray.exceptions import RayTaskError
from safetensors import SafetensorError

from medgpt.config.base import ConfigError
from medgpt.disk import storage_errors

BUCKET = "s3://bucket/run"


def in_a_task(error: Exception) -> Exception:
    """Return the error as `ray.get` raises it."""
    traceback = f"Traceback:\n{type(error).__module__}.{type(error).__qualname__}: {error}"
    return RayTaskError("work", traceback, error).as_instanceof_cause()


def wrapped(error: Exception) -> Exception:
    """Return another error with this one as its cause."""
    wrapper = RuntimeError("cannot write")
    wrapper.__cause__ = error
    return wrapper


def endpoint_error() -> Exception:
    from botocore.exceptions import EndpointConnectionError

    return EndpointConnectionError(endpoint_url="http://127.0.0.1:1")


def explained(error: Exception, run_dir: str = "/run") -> str:
    with pytest.raises(ConfigError) as info, storage_errors(run_dir, "metrics"):
        raise error
    return str(info.value)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_recognized_by_errno(code: int) -> None:
    error = OSError(code, "words of a library")
    for variant in (error, wrapped(error), in_a_task(error)):
        assert f"run.dir=/run: {os.strerror(code)} while writing metrics" in explained(variant)


def test_a_full_disk_is_recognized_in_errors_of_rust_libraries() -> None:
    error = SafetensorError("I/O error: No space left on device (os error 28)")
    for variant in (error, wrapped(error), in_a_task(error)):
        assert "No space left on device while writing metrics" in explained(variant)


def test_an_unreachable_store_is_recognized_by_class() -> None:
    error = endpoint_error()
    for variant in (error, wrapped(error), in_a_task(error)):
        message = explained(variant, BUCKET)
        assert "the store does not answer (EndpointConnectionError) at metrics" in message


def test_a_store_error_is_recognized_in_the_text_of_a_ray_error() -> None:
    text = f"Traceback:\nbotocore.exceptions.EndpointConnectionError: {endpoint_error()}"
    assert "the store does not answer" in explained(RuntimeError(text), BUCKET)


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.EIO, "No space left on device"),
        ValueError("Could not connect to the endpoint URL"),
        endpoint_error(),
    ],
)
def test_other_errors_pass_through_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as info, storage_errors("/run", "metrics"):
        raise error
    assert info.value is error


def test_kept_errors_are_not_raised() -> None:
    kept: list[ConfigError] = []
    with storage_errors("/run", "metrics", kept):
        raise OSError(errno.ENOSPC, "full")
    with storage_errors("/run", "metrics", kept):
        raise ConfigError("of a worker")
    assert [str(error)[:15] for error in kept] == ["run.dir=/run: N", "of a worker"]
