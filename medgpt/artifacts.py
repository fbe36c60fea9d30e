"""Folders on local paths and fsspec URIs, and artifacts: folders with a manifest written last.

An artifact (data shards, checkpoint, export) is a folder whose manifest.json names every file with
size and checksum. medgpt ignores a folder without a manifest or whose files do not match it, so it
needs no rename and no lock, which object stores do not have.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FileEntry:
    name: str
    size: int
    xxh128: str


def checksum(path: Path) -> str:
    """Return the XXH3 128-bit hash of a file, as `xxhsum -H2` prints it."""
    with path.open("rb") as file:
        return stream_checksum(file)


def stream_checksum(file: Any) -> str:
    """Return the XXH3 128-bit hash of the rest of an open binary file."""
    return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


class Folder:
    """A folder at a path or URI."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.fs, self.root = fsspec.url_to_fs(self.url, use_listings_cache=False)
        self.is_local = type(self.fs) is LocalFileSystem  # subclasses may write elsewhere

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        return bool(self.fs.exists(self.path(name)))

    def size(self, name: str) -> int:
        return int(self.fs.size(self.path(name)))

    def checksum(self, name: str) -> str:
        with self.fs.open(self.path(name), "rb") as file:
            return stream_checksum(file)

    def read_text(self, name: str) -> str:
        return self.fs.cat_file(self.path(name)).decode()

    def write_text(self, name: str, text: str) -> None:
        """Replace the file atomically: a reader sees the old or the new text."""
        if self.is_local:
            self.fs.makedirs(self.root, exist_ok=True)
            target = Path(self.path(name))
            partial = target.with_name(f".{target.name}.{uuid4().hex}")
            try:
                with partial.open("w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())  # or a power cut could leave an empty file
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
        else:  # an object becomes visible when its upload is complete
            self.fs.pipe_file(self.path(name), text.encode())

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_text(name))

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def read_jsonl(self, name: str) -> list[Any]:
        """Return the value of each complete line; the last may be half a line."""
        # splitlines would also split at U+2028, which JSON leaves unescaped in strings
        *lines, _ = self.read_text(name).split("\n")
        return [json.loads(line) for line in lines]

    def write_jsonl(self, name: str, values: Iterable[Any]) -> None:
        lines = (json.dumps(value, ensure_ascii=False) + "\n" for value in values)
        self.write_text(name, "".join(lines))

    def names(self) -> list[str]:
        """Return the sorted names of all entries; empty if the folder does not exist."""
        if not self.fs.exists(self.root):
            return []
        return sorted(entry.rsplit("/", 1)[-1] for entry in self.fs.ls(self.root, detail=False))

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each file in the folder."""
        if not self.fs.exists(self.root):
            return {}
        entries = self.fs.ls(self.root, detail=True)
        return {e["name"].rsplit("/", 1)[-1]: e["size"] for e in entries if e["type"] == "file"}

    def remove(self) -> None:
        if self.fs.exists(self.root):
            self.fs.rm(self.root, recursive=True)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Yield a local folder to write to; its files are in this folder on exit."""
        if self.is_local:
            self.fs.makedirs(self.root, exist_ok=True)
            yield Path(self.root)
            return
        with tempfile.TemporaryDirectory(prefix="medgpt-") as scratch:
            yield Path(scratch)
            for path in sorted(p for p in Path(scratch).rglob("*") if p.is_file()):
                self.fs.put_file(str(path), self.path(str(path.relative_to(scratch))))

    @contextmanager
    def local(self) -> Iterator[Path]:
        """Yield a local folder with the files, copied if this folder is remote."""
        if self.is_local:
            yield Path(self.root)
            return
        with tempfile.TemporaryDirectory(prefix="medgpt-") as scratch:
            self.copy_to(Path(scratch))
            yield Path(scratch)

    def copy_to(self, directory: Path) -> None:
        """Copy all files to a local folder; create it if missing."""
        directory.mkdir(exist_ok=True)
        sources = self.fs.find(self.root)  # stores differ in what they do with a whole folder
        targets = [directory / os.path.relpath(source, self.root) for source in sources]
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        self.fs.get(sources, [str(target) for target in targets])


def file_entries(directory: Path, names: Sequence[str] | None = None) -> list[FileEntry]:
    """Return size and checksum of the named files in a local folder, by default of all."""
    paths = (
        sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
        if names is None
        else [directory / name for name in names]
    )
    return [FileEntry(str(p.relative_to(directory)), p.stat().st_size, checksum(p)) for p in paths]


def commit(folder: Folder, files: Sequence[FileEntry], **facts: Any) -> None:
    """Make the folder an artifact by writing its manifest. All `files` must be in place."""
    folder.write_json(MANIFEST, {**facts, "files": [vars(file) for file in files]})


def committed(folder: Folder, *, verify: bool = False) -> dict[str, Any] | None:
    """Return the manifest of a complete artifact, else None. `verify` also checks checksums."""
    if not folder.exists(MANIFEST):
        return None
    try:
        manifest = folder.read_json(MANIFEST)
    except ValueError:  # truncated
        return None
    for file in manifest["files"]:
        name = file["name"]
        if not folder.exists(name) or folder.size(name) != file["size"]:
            return None
        if verify and folder.checksum(name) != file["xxh128"]:
            return None
    return manifest
