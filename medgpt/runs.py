"""Run directories: config, manifest, metrics, checkpoints and model."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel

from medgpt.artifacts import MANIFEST, Folder, committed
from medgpt.config.base import ConfigError
from medgpt.config.loading import RENAMED_KEYS, validate

PACKAGES = ("ray", "torch", "transformers", "deepspeed", "peft", "trl", "pyarrow", "tokenizers")
CHANGEABLE_KEYS = {  # sections and keys that do not alter the result
    "run.allow_changes",
    "run.dir",
    "cluster",
    "report",
    "gates",
    "model.parent",
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
    "ptx.data.max_malformed_share",
    "pool.batch_tokens",
    "pool.batch_replies",
    "pools",
    "diagnosis",
    "ppo.micro_batch_tokens",
    "ppo.checkpoint_every",
    "ppo.keep_checkpoints",
    "ppo.log_every",
    "ppo.audit",
    "rollout.batch_tokens",
    "rollout.gpu_memory_share",
    "stages.config",  # the run of each stage compares the contents of its file
    "base",  # a file whose contents are compared
    "overrides",
    "tune.num_trials",
    "tune.max_concurrent",
    "tune.max_failures",
}
FIXED_KEYS = {  # exceptions in the sections above
    "pools.reference_in_actor",
    "pools.actor.engine.precision",
    "pools.critic.engine.precision",
    "pools.reward.precision",
    "pools.reference.precision",
    "pools.rollout.precision",
}


class Run:
    """A run directory. `Run.open` distinguishes new, unfinished and finished runs."""

    def __init__(self, url: str) -> None:
        self.folder = Folder(url)
        self.data = self.folder / "data"
        self.plan = self.folder / "plan"
        self.checkpoints = self.folder / "checkpoints"
        self.model = self.folder / "model"
        self.accepted_changes: list[str] = []
        """Config changes that run.allow_changes accepted, as `key was 1, is 2`."""

    @classmethod
    def open(cls, stage: str, config: BaseModel, *, run_dir: str, allow_changes: bool) -> "Run":
        """Open the run at `run_dir` and record config and environment, unless it is finished.

        Raises ConfigError if the folder is unusable or of another run, or the config has changed.
        """
        run = cls._from_dir(run_dir)
        if run.folder.exists("config.toml"):
            run._check_unchanged(stage, config, allow_changes)
        else:
            run._check_empty()
        if run.finished:
            return run
        try:
            run.write_config(config)
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            started = run.manifest.get("started", now)
            run.update_manifest(stage=stage, started=started, **environment())
        except OSError as error:
            raise ConfigError(
                f"run.dir={run_dir} cannot be written ({error.strerror or error}); choose "
                "another folder"
            ) from None
        return run

    @classmethod
    def _from_dir(cls, run_dir: str) -> "Run":
        if "://" not in run_dir and not Path(run_dir).is_absolute():
            raise ConfigError(
                f"run.dir={run_dir} is relative, but workers have other working directories; give "
                "an absolute path or a URI"
            )
        try:
            run = cls(run_dir)
            run.folder.exists(MANIFEST)
        except Exception as error:  # every kind of store has its own classes
            raise ConfigError(
                f"run.dir={run_dir}: {error}; give an absolute path, or a URI that fsspec knows, "
                "with credentials for it"
            ) from None
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

    def write_config(self, config: BaseModel) -> None:
        """Write config.toml if it changed."""
        text = tomli_w.dumps(_config_tree(config))
        if not self.folder.exists("config.toml") or self.folder.read_text("config.toml") != text:
            self.folder.write_text("config.toml", text)

    def _check_empty(self) -> None:
        """Raise ConfigError unless the folder is new or empty."""
        url, root = self.folder.url, self.folder.root
        if self.folder.fs.isfile(root):
            raise ConfigError(f"run.dir={url} is a file; choose a new or empty folder")
        if foreign := [name for name in self.folder.names() if not name.startswith(".")]:
            raise ConfigError(
                f"run.dir={url} holds {foreign[0]} but no config.toml; choose a new or empty folder"
            )

    def _check_unchanged(self, stage: str, config: BaseModel, allow_changes: bool) -> None:
        """Raise ConfigError if another stage or another config began the run."""
        began_as = self.manifest.get("stage", stage)
        if began_as != stage:
            raise ConfigError(
                f"run.dir={self.folder.url} is a run of stage {began_as}; choose another folder "
                f"for {stage}"
            )
        recorded, new = self.config, _config_tree(config)
        renames = list(_rename_keys(recorded, new))
        changes = [*renames, *_differences(_with_defaults(type(config), recorded), new)]
        if changes and not allow_changes:
            raise ConfigError(
                f"run.dir={self.folder.url} began with another config: {'; '.join(changes)}. "
                "Restore it, choose another run.dir, or accept with run.allow_changes=true"
            )
        self.accepted_changes = changes

    def checkpoint_steps(self, prefix: str = "step-") -> list[int]:
        """Return the steps of all checkpoint folders, complete or not, oldest first."""
        names = [n for n in self.checkpoints.names() if n.startswith(prefix)]
        return sorted(int(name.removeprefix(prefix)) for name in names)

    def checkpoint(self, step: int) -> Folder:
        return self.checkpoints / f"step-{step:08d}"

    def newest_checkpoint(self) -> tuple[Folder, dict[str, Any]] | None:
        """Return folder and manifest of the newest complete checkpoint, where a run resumes."""
        for step in reversed(self.checkpoint_steps()):
            if manifest := committed(self.checkpoint(step), verify=True):
                return self.checkpoint(step), manifest
        return None

    def prune_checkpoints(self, *, newest: int, keep: int, best_step: int | None) -> None:
        """Remove all checkpoints but the best and the last `keep` up to step `newest`.

        `newest` was just committed; later folders are damaged or remains of an attempt that died.
        """
        steps = self.checkpoint_steps()
        complete = [s for s in steps if s <= newest and committed(self.checkpoint(s))]
        kept = {*complete[-keep:], best_step}
        for step in steps:
            if step > newest or step not in kept:
                self.checkpoint(step).remove()

    def metrics(self) -> list[dict[str, Any]]:
        """Return one dict per step of metrics.jsonl, with all that its newest attempt logged."""
        if not self.folder.exists("metrics.jsonl"):
            return []
        # the last line may be incomplete
        *lines, _ = self.folder.read_text("metrics.jsonl").split("\n")
        merged: dict[int, dict[str, Any]] = {}
        for text in lines:
            line: dict[str, Any] = json.loads(text)
            old = merged.get(line["step"], line)
            if line["attempt"] >= old["attempt"]:
                same = line["attempt"] == old["attempt"]
                merged[line["step"]] = {**old, **line} if same else line
        return [merged[step] for step in sorted(merged)]


def _config_tree(config: BaseModel) -> dict[str, Any]:
    """Return the config as TOML holds it: with all defaults, without None."""
    return config.model_dump(mode="json", exclude_none=True)


def _with_defaults(cls: type[BaseModel], tree: dict[str, Any]) -> dict[str, Any]:
    """Add newer keys to a config of an older version; return it unchanged if it is invalid now."""
    try:
        return _config_tree(validate(cls, tree))
    except ConfigError:
        return tree


def _rename_keys(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    """Rename keys of `old` as in `new`; yield `tune.mark is now tune.metric`."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return
    for name, new_name in RENAMED_KEYS.items():
        if name in old and name not in new and new_name in new:
            old[new_name] = old.pop(name)
            yield f"{prefix}{name} is now {prefix}{new_name}"
    for key in sorted(old.keys() & new.keys()):
        yield from _rename_keys(_as_section(old[key]), _as_section(new[key]), f"{prefix}{key}.")


def _differences(
    old: dict[str, Any], new: dict[str, Any], prefix: str = "", *, changeable: bool = False
) -> Iterator[str]:
    """Yield the forbidden changes, as `train.epochs was 1, is 2`."""
    for key in sorted(old.keys() | new.keys()):
        path = f"{prefix}{key}"
        before, after = _as_section(old.get(key)), _as_section(new.get(key))
        if before == after:
            continue
        listed = re.sub(r"\.\d+\.", ".", path)
        is_changeable = (changeable or listed in CHANGEABLE_KEYS) and path not in FIXED_KEYS
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{path}.", changeable=is_changeable)
        elif not is_changeable:
            was, now = ("unset" if v is None else repr(v) for v in (old.get(key), new.get(key)))
            yield f"{path} was {was}, is {now}"


def _as_section(value: Any) -> Any:
    """Return a list of sections as a section with keys 0, 1, ...; other values unchanged."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return {str(number): item for number, item in enumerate(value)}
    return value


def environment() -> dict[str, Any]:
    """Return versions, git commit and hardware for the manifest."""
    return {
        "versions": {
            "medgpt": importlib.metadata.version("medgpt"),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "git_sha": _git_sha(Path(__file__).parent.parent),
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        },
    }


def _git_sha(root: Path) -> str | None:
    """Return the commit of the checkout that medgpt runs from, None outside a checkout."""
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    command = [git, "-C", str(root), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
