"""The command that a job runs, from what was typed on the laptop."""

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgpt.config.base import ConfigError, absolute
from medgpt.config.evaluation import EvalConfig
from medgpt.config.loading import read_tree, validate
from medgpt.config.stages import PipelineConfig
from medgpt.config.tune import TuneStageConfig
from medgpt.stages.pipeline_stages import CONFIGS, read_stages, stage_overrides

STAGES: dict[str, type[Any]] = {**CONFIGS, "tune": TuneStageConfig, "pipeline": PipelineConfig}


@dataclass(frozen=True)
class Command:
    """`medgpt` with these arguments, in a copy of the folder where they were typed."""

    stage: str
    config: Any
    overrides: tuple[str, ...]
    files: tuple[str, ...]
    """Config files that the copy must hold, relative to it; the stage's own is the first."""
    configs: tuple[Any, ...]
    """Of the stage, or of all stages of a pipeline, in order."""

    @property
    def run_dir(self) -> str:
        return self.config.run.dir

    @property
    def typed(self) -> tuple[str, ...]:
        """STAGE CONFIG OVERRIDES"""
        return (self.stage, self.files[0], *self.overrides)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of `medgpt`, which wants the model of an evaluation by itself."""
        named = [str(self.config.model.name)] if isinstance(self.config, EvalConfig) else []
        return (self.stage, *named, self.files[0], *self.overrides)

    def texts(self) -> list[str]:
        """All that the user wrote for it."""
        return [*self.arguments, *(Path(name).read_text("utf-8") for name in self.files)]


def read_command(stage: str, path: Path, overrides: list[str]) -> Command:
    """Check all that `medgpt STAGE CONFIG OVERRIDES` needs, and make it mean the same elsewhere.

    Relative paths become absolute by further overrides. A relative run.dir is refused: what lands
    on the disk of a node that goes away is missed late.

    Raises:
        ConfigError: a config is wrong, or lies where the copy cannot have it.
    """
    cls = STAGES.get(stage)
    if cls is None:
        close = difflib.get_close_matches(stage, STAGES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(STAGES)}"
        raise ConfigError(f"no stage {stage} can be submitted; {hint}")
    tree = read_tree(path, overrides)
    config = validate(cls, tree)
    configs, files, overrides = (config,), [_in_copy(path)], [*overrides]
    if isinstance(config, PipelineConfig):
        configs = tuple(one.config for one in read_stages(config))
        for number, raw in enumerate(tree["stages"]):
            files += [] if Path(raw["config"]).is_absolute() else [_in_copy(Path(raw["config"]))]
            added = _stage_additions(config, number, configs[number])
            more = [*config.stages[number].overrides, *added]
            overrides = [
                *overrides,
                *([_assigned(f"stages.{number}.overrides", more)] * bool(added)),
            ]
        del tree["stages"]
    if isinstance(config, TuneStageConfig):
        base = Path(tree.pop("base"))
        del tree["search"]
        files += [] if base.is_absolute() else [_in_copy(base)]
        if added := _base_additions(base, config):
            overrides = [*overrides, _assigned("overrides", [*config.overrides, *added])]
    overrides += _additions(tree, config)
    if isinstance(config, EvalConfig) and config.model.name is None:
        raise ConfigError("missing key model.name; name the run or model to score")
    return Command(stage, config, tuple(overrides), tuple(files), configs)


def _in_copy(path: Path) -> str:
    """`path` relative to the folder that is copied. Raises ConfigError: it is not in there."""
    here = Path.cwd().resolve()
    found = path.resolve()
    if not found.is_relative_to(here):
        raise ConfigError(
            f"{path} is outside of {here}, which the job gets a copy of; put it inside, or submit "
            "from a folder that holds both"
        )
    return str(found.relative_to(here))


def _stage_additions(config: PipelineConfig, number: int, checked: Any) -> list[str]:
    stage = config.stages[number]
    tree = read_tree(Path(stage.config), stage_overrides(config, stage))
    return _additions(tree, checked)


def _base_additions(base: Path, config: TuneStageConfig) -> list[str]:
    """The search gives every trial a run directory, whatever the base's is."""
    tree = read_tree(base, config.overrides)
    return _additions({name: tree[name] for name in tree if name != "run"}, config.stage)


def _additions(tree: dict[str, Any], config: Any) -> list[str]:
    """Overrides that make relative paths absolute. Raises ConfigError: run.dir is one."""
    found = dict(_relative_paths(tree, config.model_dump(mode="json")))
    if "run.dir" in found:
        raise ConfigError(
            f"run.dir={tree['run']['dir']!r}: a submitted job needs an absolute path or URI, which "
            "all nodes reach; its working directory is a cached copy"
        )
    return [_assigned(key, value) for key, value in found.items()]


def _assigned(key: str, value: str | list[str]) -> str:
    return f"{key}={json.dumps(value, ensure_ascii=False)}"  # as TOML writes it


def _relative_paths(raw: Any, checked: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, absolute) of what is a relative path in `raw`; a config changes no other text."""
    if isinstance(raw, dict):
        for name, value in raw.items():
            yield from _relative_paths(value, checked[name], f"{key}.{name}" if key else name)
    elif isinstance(raw, list) and any(isinstance(item, dict) for item in raw):
        for number, item in enumerate(raw):
            yield from _relative_paths(item, checked[number], f"{key}.{number}")
    elif raw != checked and (texts := _texts(raw)) and texts != (changed := _texts(checked)):
        assert all(new in (old, absolute(old)) for old, new in zip(texts, changed, strict=True))
        yield key, checked


def _texts(value: Any) -> list[str]:
    """A text, or those in a list of nothing else; else nothing."""
    items = value if isinstance(value, list) else [value]
    return items if all(isinstance(item, str) for item in items) else []
