"""Packages the current folder for a job: a zip with code and configs."""

import logging
import zipfile
from pathlib import Path

from medgpt.cluster.ray_internals import create_package
from medgpt.config.base import ConfigError

# .gitignore patterns; folders without a trailing slash, else Ray would walk through them
EXCLUDES = (
    *(".git", "__pycache__", ".*_cache", "*.egg-info", ".venv*", "venv", "node_modules"),
    *("/runs", "/data", "/build", "/dist"),
    *(".env*", ".netrc", ".pypirc", "*.pem", "*.key", "id_rsa*", "id_ed25519*"),
    *(".aws", ".ssh", ".kube", ".config"),
)
MAX_PACKAGE_MB = 100  # Ray keeps the package in the memory of the head, and accepts up to 500


def package_working_dir(folder: Path, target: Path) -> frozenset[str]:
    """Write the zip `target` without EXCLUDES and the patterns of .gitignore and .rayignore.

    Returns:
        The names of the files in the zip.

    Raises:
        ConfigError: the zip is too large.
    """
    silent_logger = logging.getLogger(__name__)
    create_package(
        str(folder), target, include_gitignore=True, excludes=list(EXCLUDES), logger=silent_logger
    )
    with zipfile.ZipFile(target) as archive:
        entries = archive.infolist()
    if target.stat().st_size > MAX_PACKAGE_MB * 2**20:
        largest = sorted(entries, key=lambda entry: entry.compress_size)[-3:]
        largest_files = ", ".join(
            f"{entry.filename} ({entry.compress_size >> 20} MiB)" for entry in largest
        )
        raise ConfigError(
            f"{folder}: the job would get a copy of more than {MAX_PACKAGE_MB} MiB, of it "
            f"{largest_files}; name in .rayignore what it does not need"
        )
    return frozenset(entry.filename for entry in entries)
