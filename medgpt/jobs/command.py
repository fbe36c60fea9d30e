"""Resolves a command typed on the laptop to the command that a job runs on the cluster."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgpt.config.base import ConfigError, absolute_path, did_you_mean
from medgpt.config.evaluation import EvalConfig
from medgpt.config.loading import read_tree, validate
from medgpt.config.stages import PipelineConfig
from medgpt.config.tune import TuneStageConfig
from medgpt.stages.pipeline_stages import STAGE_CONFIGS, load_stages, stage_overrides

SUBMITTABLE_CONFIGS: dict[str, type[Any]] = {
    **STAGE_CONFIGS,
    "tune": TuneStageConfig,
    "pipeline": PipelineConfig,
}


@dataclass(frozen=True)
class JobCommand:
    """A `medgpt` command that runs in a copy of the current folder."""

    stage: str
    config: Any
    overrides: tuple[str, ...]
    config_files: tuple[str, ...]
    """Config files that the package must contain, as relative paths; the stage's own is first."""
    configs: tuple[Any, ...]
    """The config of the stage, or those of all stages of a pipeline, in order."""

    @property
    def run_dir(self) -> str:
        return self.config.run.dir

    @property
    def submit_arguments(self) -> tuple[str, ...]:
        """Arguments of `medgpt submit`: STAGE CONFIG OVERRIDES."""
        return (self.stage, self.config_files[0], *self.overrides)

    @property
    def cli_arguments(self) -> tuple[str, ...]:
        """Arguments of `medgpt`, which takes the model of an evaluation separately."""
        named = [str(self.config.model.name)] if isinstance(self.config, EvalConfig) else []
        return (self.stage, *named, self.config_files[0], *self.overrides)

    def user_texts(self) -> list[str]:
        """Return all text that the user wrote: the arguments and the config files."""
        return [*self.cli_arguments, *(Path(name).read_text("utf-8") for name in self.config_files)]


def resolve_command(stage: str, path: Path, overrides: list[str]) -> JobCommand:
    """Validate `medgpt STAGE CONFIG OVERRIDES` and make it independent of this machine.

    Further overrides make relative paths absolute. A relative run.dir is refused: it would be on
    the disk of a node, and be lost with it.

    Raises:
        ConfigError: a config is invalid, or outside of the current folder.
    """
    cls = SUBMITTABLE_CONFIGS.get(stage)
    if cls is None:
        hint = did_you_mean(stage, SUBMITTABLE_CONFIGS)
        raise ConfigError(f"stage {stage} cannot be submitted; {hint}")
    tree = read_tree(path, overrides)
    config = validate(cls, tree)
    configs, other_files, added = (config,), list[Path](), list[str]()
    if isinstance(config, PipelineConfig):
        configs = tuple(stage.config for stage in load_stages(config))
        other_files = [Path(stage_tree["config"]) for stage_tree in tree.pop("stages")]
        for number, item in enumerate(config.stages):
            stage_tree = read_tree(Path(item.config), stage_overrides(config, item))
            if paths := _absolute_path_overrides(stage_tree, configs[number]):
                added.append(_override(f"stages.{number}.overrides", [*item.overrides, *paths]))
    if isinstance(config, TuneStageConfig):
        base = Path(tree.pop("base"))
        other_files = [base]
        del tree["search"]
        base_tree = read_tree(base, config.overrides)
        base_tree.pop("run", None)  # every trial gets a run.dir of its own
        if paths := _absolute_path_overrides(base_tree, config.base_config):
            added.append(_override("overrides", [*config.overrides, *paths]))
    added += _absolute_path_overrides(tree, config)
    if isinstance(config, EvalConfig) and config.model.name is None:
        raise ConfigError("missing key model.name; name the run or model to score")
    files = [path, *(file for file in other_files if not file.is_absolute())]
    relative = tuple(_relative_to_working_dir(file) for file in files)
    return JobCommand(stage, config, (*overrides, *added), relative, configs)


def _relative_to_working_dir(path: Path) -> str:
    """Return `path` relative to the current folder. Raise ConfigError if it is outside of it."""
    working_dir = Path.cwd().resolve()
    resolved = path.resolve()
    if not resolved.is_relative_to(working_dir):
        raise ConfigError(
            f"{path} is outside of {working_dir}, which the job gets a copy of; put it inside, or "
            "submit from a folder that holds both"
        )
    return str(resolved.relative_to(working_dir))


def _absolute_path_overrides(tree: dict[str, Any], config: Any) -> list[str]:
    """Return overrides that make relative paths absolute. Raise ConfigError if run.dir is one."""
    absolute_paths = dict(_relative_paths(tree, config.model_dump(mode="json")))
    if "run.dir" in absolute_paths:
        raise ConfigError(
            f"run.dir={tree['run']['dir']!r}: a submitted job needs an absolute path or URI, which "
            "all nodes reach; its working directory is a cached copy"
        )
    return [_override(key, value) for key, value in absolute_paths.items()]


def _override(key: str, value: str | list[str]) -> str:
    return f"{key}={json.dumps(value, ensure_ascii=False)}"  # JSON strings are TOML strings


def _relative_paths(raw: Any, checked: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key, absolute path) of relative paths in `raw`: the only strings a config changes."""
    if isinstance(raw, dict):
        for name, value in raw.items():
            yield from _relative_paths(value, checked[name], f"{key}.{name}" if key else name)
    elif isinstance(raw, list) and any(isinstance(item, dict) for item in raw):
        for number, item in enumerate(raw):
            yield from _relative_paths(item, checked[number], f"{key}.{number}")
    elif (texts := _as_text_list(raw)) and texts != (changed := _as_text_list(checked)):
        pairs = zip(texts, changed, strict=True)
        assert all(new in (old, absolute_path(old)) for old, new in pairs)
        yield key, checked


def _as_text_list(value: Any) -> list[str]:
    """Return a string or a list of strings as a list; an empty list for anything else."""
    items = value if isinstance(value, list) else [value]
    return items if all(isinstance(item, str) for item in items) else []
