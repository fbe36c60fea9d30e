"""Copy models from URIs (s3://, gs://, file://, ...) to this machine."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import xxhash
from huggingface_hub.constants import HF_HOME

from medgpt.artifacts import Folder
from medgpt.config.base import ConfigError


def local_copy(name: str, key: str = "model.name") -> str:
    """Return `name`, or for a URI the path of a local copy of its folder, made if needed.

    Raises ConfigError, which names the config key `key`, if the URI cannot be read.
    """
    if "://" not in name:
        return name
    with _config_error_if_unreadable(name, key):
        return str(_copy_to_cache(name))


def run_model_folder(run: str) -> Path:
    """Return the absolute model folder of a run, or `run` itself if it is a model.

    Raises ConfigError if `run` is a URI that cannot be read.
    """
    if "://" not in run:
        folder = Path(run).expanduser().absolute()
        return folder / "model" if (folder / "model").is_dir() else folder
    with _config_error_if_unreadable(run, "RUN"):
        inner = Folder(run) / "model"
        return Path(_copy_to_cache(inner.url if inner.names() else run))


def existing_model_folder(run: str) -> Path:
    """Return the same folder; raise ConfigError if it does not exist."""
    folder = run_model_folder(run)
    if not folder.is_dir():
        raise ConfigError(f"RUN={run}: no such folder; give a finished run or a model folder")
    return folder


@contextmanager
def _config_error_if_unreadable(uri: str, key: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # every kind of store has its own exceptions
        raise ConfigError(
            f"{key}={uri}: the URI cannot be read ({error}); check the address and the "
            "credentials, or give a local folder"
        ) from None


@cache
def _copy_to_cache(uri: str) -> Path:
    """Copy the folder into Hugging Face's cache, named after the URI and its files' versions.

    All processes of a machine share the copy.
    """
    folder = Folder(uri)
    if folder.is_local:
        return Path(folder.root)
    versions = [(path, folder.fs.ukey(path)) for path in folder.fs.find(folder.root)]
    if not versions:
        raise FileNotFoundError("there are no files")
    copies = Path(HF_HOME) / "medgpt"
    target = copies / xxhash.xxh3_128_hexdigest(repr((uri, versions)).encode())
    if not target.exists():
        copies.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=copies, prefix=".") as scratch:
            copy = Path(scratch) / "model"
            folder.copy_to(copy)
            with suppress(OSError):  # another process was first
                copy.rename(target)
        assert target.is_dir(), f"{target} was not made"
    return target
