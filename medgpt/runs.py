"""A run directory: config, manifest, metrics, checkpoints, model. Local paths and fsspec URIs alike.

An artefact (data shards, checkpoint, export) is a folder whose manifest.json, written last, names every file with
size and checksum. A folder without one, or whose files do not match it, does not exist for medgpt: no rename, no
lock, nothing that an object store cannot do.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import tomli_w
import xxhash
from pydantic import BaseModel

from medgpt.config import ConfigError

MANIFEST = "manifest.json"
PACKAGES = ("ray", "torch", "transformers", "deepspeed", "peft", "trl", "pyarrow", "tokenizers")
FREE_TO_CHANGE = {  # sections and keys that do not alter what is trained
    "run.allow_changes",
    "run.dir",
    "cluster",
    "report",
    "train.micro_batch_size",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.audit",
    "engine.zero_stage",
    "engine.offload_optimizer",
    "engine.activation_checkpointing",
    "engine.loss_chunk_tokens",
    "model.attention",
    "data.max_malformed_share",
}


@dataclass(frozen=True)
class FileEntry:
    name: str
    size: int
    xxh128: str


def checksum(path: Path) -> str:
    """xxHash (XXH3, 128 bit) of a file, as `xxhsum -H2` prints it."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


class Folder:
    """A folder at a path or URI."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.fs, self.root = fsspec.url_to_fs(self.url, use_listings_cache=False)
        self.is_local = "file" in _protocols(self.fs)

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.url}/{name}")

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        return bool(self.fs.exists(self.path(name)))

    def read_text(self, name: str) -> str:
        return self.fs.cat_file(self.path(name)).decode()

    def write_text(self, name: str, text: str) -> None:
        """Replace the file at once: a reader sees the old or the new one."""
        if self.is_local:
            self.fs.makedirs(self.root, exist_ok=True)
            target = Path(self.path(name))
            partial = target.with_name(f".{target.name}.{os.getpid()}")
            partial.write_text(text, "utf-8")
            partial.replace(target)
        else:  # an object appears when its upload is complete
            self.fs.pipe_file(self.path(name), text.encode())

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_text(name))

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def names(self) -> list[str]:
        """Names of the entries, sorted; empty if there is no such folder."""
        if not self.fs.exists(self.root):
            return []
        return sorted(entry.rsplit("/", 1)[-1] for entry in self.fs.ls(self.root, detail=False))

    def remove(self) -> None:
        if self.fs.exists(self.root):
            self.fs.rm(self.root, recursive=True)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A local folder to write files to; on exit they are in this folder."""
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
        """The folder's files as a local folder."""
        if self.is_local:
            yield Path(self.root)
            return
        with tempfile.TemporaryDirectory(prefix="medgpt-") as scratch:
            self.fs.get(self.root + "/", scratch + "/", recursive=True)
            yield Path(scratch)


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def entries(directory: Path, names: Sequence[str] | None = None) -> list[FileEntry]:
    """Size and checksum of the named files in a local folder (default: all)."""
    paths = (
        sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
        if names is None
        else [directory / name for name in names]
    )
    return [FileEntry(str(p.relative_to(directory)), p.stat().st_size, checksum(p)) for p in paths]


def commit(folder: Folder, files: Sequence[FileEntry], **facts: Any) -> None:
    """Make the folder an artefact. Everything in `files` must be in place."""
    folder.write_json(MANIFEST, {**facts, "files": [vars(file) for file in files]})


def committed(folder: Folder, *, verify: bool = False) -> dict[str, Any] | None:
    """The manifest of a complete artefact, else None. `verify` also compares checksums (local folders)."""
    if not folder.exists(MANIFEST):
        return None
    manifest = folder.read_json(MANIFEST)
    for file in manifest["files"]:
        if not folder.exists(file["name"]) or folder.fs.size(folder.path(file["name"])) != file["size"]:
            return None
        if verify and folder.is_local:
            if checksum(Path(folder.path(file["name"]))) != file["xxh128"]:
                return None
    return manifest


class Run:
    """What a stage reads and writes. `Run.open` decides between fresh, resumed and finished."""

    def __init__(self, url: str) -> None:
        self.folder = Folder(url)
        self.data = self.folder / "data"
        self.checkpoints = self.folder / "checkpoints"
        self.model = self.folder / "model"

    @classmethod
    def open(cls, stage: str, config: BaseModel, *, run_dir: str, allow_changes: bool) -> "Run":
        """The run at `run_dir`, begun or to be resumed.

        Raises:
            ConfigError: the folder holds another stage's run, or the config changed since it began.
        """
        run = cls(run_dir)
        tree = config.model_dump(mode="json", exclude_none=True)
        if run.folder.exists("config.toml"):
            run._check_unchanged(stage, tree, allow_changes)
        else:
            if foreign := [name for name in run.folder.names() if not name.startswith(".")]:
                raise ConfigError(
                    f"run.dir={run_dir} holds {foreign[0]} but no config.toml; choose a new or empty folder"
                )
        run.folder.write_text("config.toml", tomli_w.dumps(tree))
        if not run.finished:
            run.update_manifest(stage=stage, **environment())
        return run

    @property
    def manifest(self) -> dict[str, Any]:
        return self.folder.read_json(MANIFEST) if self.folder.exists(MANIFEST) else {"attempt": 0}

    def update_manifest(self, **facts: Any) -> None:
        self.folder.write_json(MANIFEST, {**self.manifest, **facts})

    @property
    def finished(self) -> bool:
        return bool(self.manifest.get("finished"))

    @property
    def config(self) -> dict[str, Any]:
        return tomllib.loads(self.folder.read_text("config.toml"))

    def _check_unchanged(self, stage: str, tree: dict[str, Any], allow_changes: bool) -> None:
        began_as = self.manifest.get("stage", stage)
        if began_as != stage:
            raise ConfigError(
                f"run.dir={self.folder.url} is a run of stage {began_as}; choose another folder for {stage}"
            )
        changes = list(_differences(self.config, tree))
        if changes and not allow_changes:
            raise ConfigError(
                f"run.dir={self.folder.url} was begun with another config: {'; '.join(changes)}. Restore it, choose "
                "another run.dir, or accept with run.allow_changes=true"
            )

    def checkpoint_steps(self) -> list[int]:
        """Steps of all checkpoint folders, complete or not, oldest first."""
        names = [n for n in self.checkpoints.names() if n.startswith("step-")]
        return sorted(int(name.removeprefix("step-")) for name in names)

    def checkpoint(self, step: int) -> Folder:
        return self.checkpoints / f"step-{step:08d}"

    def newest_checkpoint(self) -> tuple[Folder, dict[str, Any]] | None:
        """The newest checkpoint whose files match its manifest: the one truth about where a run stands."""
        for step in reversed(self.checkpoint_steps()):
            if manifest := committed(self.checkpoint(step), verify=True):
                return self.checkpoint(step), manifest
        return None

    def prune_checkpoints(self, *, keep: int, best_step: int | None) -> None:
        """Remove all but the newest `keep` checkpoints and the best."""
        for step in self.checkpoint_steps()[:-keep]:
            if step != best_step:
                self.checkpoint(step).remove()

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl; of a step that was replayed only the last attempt's."""
        if not self.folder.exists("metrics.jsonl"):
            return []
        lines = [json.loads(line) for line in self.folder.read_text("metrics.jsonl").splitlines()]
        merged: dict[int, dict[str, Any]] = {}
        for line in lines:
            old = merged.get(line["step"], {})
            merged[line["step"]] = (
                {**old, **line} if old.get("attempt") == line.get("attempt") else line
            )
        return [merged[step] for step in sorted(merged)]


def _differences(
    old: dict[str, Any], new: dict[str, Any], prefix: str = ""
) -> Iterator[str]:
    for key in sorted(old.keys() | new.keys()):
        path = f"{prefix}{key}"
        before, after = old.get(key), new.get(key)
        if path in FREE_TO_CHANGE or before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{path}.")
        else:
            yield f"{path} was {before!r}, is {after!r}"


def environment() -> dict[str, Any]:
    """Versions, git commit and hardware for the manifest."""
    root = Path(__file__).parent.parent
    git = shutil.which("git")
    sha = (
        subprocess.run([git, "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
        if git
        else None
    )
    return {
        "versions": {
            "medgpt": importlib.metadata.version("medgpt"),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "git_sha": sha.stdout.strip() or None if sha else None,
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        },
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
