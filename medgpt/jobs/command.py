"""The command that a job runs, from what was typed on the laptop."""

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgpt.config.base import ConfigError, absolute_path
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
    """`medgpt` with these arguments, in a copy of the folder where they were typed."""

    stage: str
    config: Any
    overrides: tuple[str, ...]
    config_files: tuple[str, ...]
    """Config files that the copy must hold, relative to it; the stage's own is the first."""
    configs: tuple[Any, ...]
    """Of the stage, or of all stages of a pipeline, in order."""

    @property
    def run_dir(self) -> str:
        return self.config.run.dir

    @property
    def submit_arguments(self) -> tuple[str, ...]:
        """STAGE CONFIG OVERRIDES"""
        return (self.stage, self.config_files[0], *self.overrides)

    @property
    def cli_arguments(self) -> tuple[str, ...]:
        """Of `medgpt`, which wants the model of an evaluation by itself."""
        named = [str(self.config.model.name)] if isinstance(self.config, EvalConfig) else []
        return (self.stage, *named, self.config_files[0], *self.overrides)

    def user_texts(self) -> list[str]:
        """All that the user wrote for it."""
        return [*self.cli_arguments, *(Path(name).read_text("utf-8") for name in self.config_files)]


def resolve_command(stage: str, path: Path, overrides: list[str]) -> JobCommand:
    """Check all that `medgpt STAGE CONFIG OVERRIDES` needs, and make it mean the same elsewhere.

    Relative paths become absolute by further overrides. A relative run.dir is refused: what lands
    on the disk of a node that goes away is missed late.

    Raises:
        ConfigError: a config is wrong, or lies where the copy cannot have it.
    """
    cls = SUBMITTABLE_CONFIGS.get(stage)
    if cls is None:
        close = difflib.get_close_matches(stage, SUBMITTABLE_CONFIGS, n=1)
        hint = (
            f"did you mean {close[0]}?" if close else f"there are {', '.join(SUBMITTABLE_CONFIGS)}"
        )
        raise ConfigError(f"no stage {stage} can be submitted; {hint}")
    tree = read_tree(path, overrides)
    config = validate(cls, tree)
    configs, files, overrides = (config,), [_relative_to_working_dir(path)], [*overrides]
    if isinstance(config, PipelineConfig):
        configs = tuple(stage.config for stage in load_stages(config))
        for number, stage_tree in enumerate(tree["stages"]):
            files += (
                []
                if Path(stage_tree["config"]).is_absolute()
                else [_relative_to_working_dir(Path(stage_tree["config"]))]
            )
            path_overrides = _absolute_stage_paths(config, number, configs[number])
            more = [*config.stages[number].overrides, *path_overrides]
            overrides = [
                *overrides,
                *([_override(f"stages.{number}.overrides", more)] * bool(path_overrides)),
            ]
        del tree["stages"]
    if isinstance(config, TuneStageConfig):
        base = Path(tree.pop("base"))
        del tree["search"]
        files += [] if base.is_absolute() else [_relative_to_working_dir(base)]
        if path_overrides := _absolute_base_paths(base, config):
            overrides = [*overrides, _override("overrides", [*config.overrides, *path_overrides])]
    overrides += _absolute_path_overrides(tree, config)
    if isinstance(config, EvalConfig) and config.model.name is None:
        raise ConfigError("missing key model.name; name the run or model to score")
    return JobCommand(stage, config, tuple(overrides), tuple(files), configs)


def _relative_to_working_dir(path: Path) -> str:
    """`path` relative to the folder that is copied. Raises ConfigError: it is not in there."""
    working_dir = Path.cwd().resolve()
    resolved = path.resolve()
    if not resolved.is_relative_to(working_dir):
        raise ConfigError(
            f"{path} is outside of {working_dir}, which the job gets a copy of; put it inside, or "
            "submit from a folder that holds both"
        )
    return str(resolved.relative_to(working_dir))


def _absolute_stage_paths(config: PipelineConfig, number: int, checked: Any) -> list[str]:
    stage = config.stages[number]
    tree = read_tree(Path(stage.config), stage_overrides(config, stage))
    return _absolute_path_overrides(tree, checked)


def _absolute_base_paths(base: Path, config: TuneStageConfig) -> list[str]:
    """The search gives every trial a run directory, whatever the base's is."""
    tree = read_tree(base, config.overrides)
    return _absolute_path_overrides(
        {name: tree[name] for name in tree if name != "run"}, config.base_config
    )


def _absolute_path_overrides(tree: dict[str, Any], config: Any) -> list[str]:
    """Overrides that make relative paths absolute. Raises ConfigError: run.dir is one."""
    absolute_paths = dict(_relative_paths(tree, config.model_dump(mode="json")))
    if "run.dir" in absolute_paths:
        raise ConfigError(
            f"run.dir={tree['run']['dir']!r}: a submitted job needs an absolute path or URI, which "
            "all nodes reach; its working directory is a cached copy"
        )
    return [_override(key, value) for key, value in absolute_paths.items()]


def _override(key: str, value: str | list[str]) -> str:
    return f"{key}={json.dumps(value, ensure_ascii=False)}"  # as TOML writes it


def _relative_paths(raw: Any, checked: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, absolute) of what is a relative path in `raw`; a config changes no other text."""
    if isinstance(raw, dict):
        for name, value in raw.items():
            yield from _relative_paths(value, checked[name], f"{key}.{name}" if key else name)
    elif isinstance(raw, list) and any(isinstance(item, dict) for item in raw):
        for number, item in enumerate(raw):
            yield from _relative_paths(item, checked[number], f"{key}.{number}")
    elif (
        raw != checked
        and (texts := _as_text_list(raw))
        and texts != (changed := _as_text_list(checked))
    ):
        assert all(
            new in (old, absolute_path(old)) for old, new in zip(texts, changed, strict=True)
        )
        yield key, checked


def _as_text_list(value: Any) -> list[str]:
    """A text, or those in a list of nothing else; else nothing."""
    items = value if isinstance(value, list) else [value]
    return items if all(isinstance(item, str) for item in items) else []
