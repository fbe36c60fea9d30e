"""Configs load, take overrides, and raise errors that name the remedy."""

from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from medgpt.config.base import ConfigError
from medgpt.config.loading import load, validate
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.reward_model import RewardModelConfig
from medgpt.config.stages import (
    CorpusConfig,
    PipelineConfig,
    PretrainConfig,
    SFTConfig,
)

PRETRAIN = """
[run]
dir = "runs/a"
[model.architecture]
kind = "qwen2"
[tokenizer]
mode = "train"
[[data.sources]]
name = "first"
paths = ["data/first"]
license = "CC0-1.0"
[train]
global_batch_size = 8
micro_batch_size = 2
"""
SECOND_SOURCE = '[[data.sources]]\nname = "second"\npaths = ["x"]\nlicense = "CC0-1.0"\n'


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.toml"
    path.write_text(PRETRAIN, "utf-8")
    return path


def error_message(path: Path, *overrides: str, cls: type[BaseModel] = PretrainConfig) -> str:
    with pytest.raises(ConfigError) as error:
        load(cls, path, overrides)
    return str(error.value)


def test_the_file_overrides_defaults_and_the_command_line_the_file(toml: Path) -> None:
    config = load(PretrainConfig, toml, ["train.micro_batch_size=1", "train.epochs=3"])
    assert (config.train.micro_batch_size, config.train.epochs) == (1, 3)
    assert config.train.global_batch_size == 8
    assert config.optimizer.learning_rate == 3e-4


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("tokenizer.mode=train", "train"),
        ('tokenizer.mode="train"', "train"),
        ("run.seed=7", 7),
        ("optimizer.learning_rate=1e-6", 1e-6),
        ("engine.offload_optimizer=true", True),
        ("data.sources.0.name=other", "other"),
        ("data.sources.0.mapping.text={{ a }} is = b", "{{ a }} is = b"),
        ("optimizer.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("cluster.num_workers=[1, 4]", (1, 4)),
    ],
)
def test_an_override_is_a_toml_assignment_or_a_bare_word(
    toml: Path, override: str, value: object
) -> None:
    value_at_key: object = load(PretrainConfig, toml, [override])
    for name in override.split("=")[0].split("."):
        value_at_key = value_at_key[int(name)] if name.isdigit() else getattr(value_at_key, name)  # type: ignore[index]
    assert value_at_key == value


def test_an_override_reaches_into_a_list_and_leaves_the_rest(toml: Path) -> None:
    toml.write_text(PRETRAIN + SECOND_SOURCE, "utf-8")
    config = load(PretrainConfig, toml, ['data.sources.0.paths=["/a", "s3://b/c"]'])
    assert [source.name for source in config.data.sources] == ["first", "second"]
    assert config.data.sources[0].paths == ("/a", "s3://b/c")
    assert config.data.sources[1].paths == (str(toml.parent / "x"),)


def test_paths_become_absolute_and_uris_stay(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = str(Path.home())
    config = load(PretrainConfig, toml, ['data.sources.0.paths=["a/*.txt", "~/b", "gs://c/d"]'])
    assert config.run.dir == str(toml.parent / "runs/a")
    assert config.data.sources[0].paths == (f"{toml.parent}/a/*.txt", f"{home}/b", "gs://c/d")
    monkeypatch.chdir("/")
    assert load(PretrainConfig, toml).run.dir == "/runs/a"
    assert load(PretrainConfig, toml, ["run.dir=s3://b/r"]).run.dir == "s3://b/r"


def test_a_model_name_is_a_path_where_there_is_one_and_a_hub_id_elsewhere(toml: Path) -> None:
    base = PRETRAIN.replace('[model.architecture]\nkind = "qwen2"', '[model]\nname = "owner/name"')
    toml.write_text(base.replace('mode = "train"', 'mode = "base"'), "utf-8")
    assert load(PretrainConfig, toml).model.name == "owner/name"
    for path in ("./m", "runs/a/model"):
        name = load(PretrainConfig, toml, [f"model.name={path}"]).model.name
        assert name == str(toml.parent / path)
    (toml.parent / "owner/name").mkdir(parents=True)
    assert load(PretrainConfig, toml).model.name == str(toml.parent / "owner/name")


def test_a_submitted_job_needs_an_absolute_run_directory(
    toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert error_message(toml) == (
        "run.dir='runs/a': a submitted job needs an absolute path or URI, its working directory "
        "is a cached copy"
    )
    for good in ("/tmp/a", "s3://b/a", "~/a"):
        load(PretrainConfig, toml, [f"run.dir={good}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=2", "unknown key train.epoch; did you mean train.epochs?"),
        ("trian.epochs=2", "unknown key trian; did you mean train?"),
        (
            "data.sources.0.pahts=['a']",
            "unknown key data.sources.0.pahts; did you mean data.sources.0.paths?",
        ),
        (
            "objective.temperature=2",
            "unknown key objective.temperature; known: kind, mlm_probability, whole_word",
        ),
        (
            "train.epochs=two",
            "train.epochs='two': Input should be a valid integer, "
            "unable to parse string as an integer",
        ),
        ("train.epochs=0", "train.epochs=0: Input should be greater than 0"),
        ("engine.zero_stage=4", "engine.zero_stage=4: Input should be 0, 1, 2 or 3"),
        ("train=3", "train=3: must be a section of keys"),
        ("data.sources=3", 'data.sources=3: must be a list, as ["..."]'),
        ("data.sources=[]", "data.sources=[]: must not be empty"),
        ("data.sources.0.paths=a", "data.sources.0.paths='a': must be a list, as [\"...\"]"),
        ("data.sources.0.paths=[]", "data.sources.0.paths=[]: must not be empty"),
        ("nonsense", "cannot parse override 'nonsense'; write it as section.key=value"),
        (
            "train.global_batch_size=9",
            "train.global_batch_size=9 must be a multiple of train.micro_batch_size=2 x "
            "cluster.num_workers=1; 8 or 10 would do",
        ),
        (
            "cluster.num_workers=5",
            "train.global_batch_size=8 must be a multiple of train.micro_batch_size=2 x "
            "cluster.num_workers=5; 10 would do",
        ),
        (
            "cluster.num_workers=[2, 5]",
            "train.global_batch_size=8 must be at least train.micro_batch_size=2 x "
            "cluster.num_workers=5; 10 would do",
        ),
        *(
            (
                f"cluster.num_workers={wrong}",
                f"cluster.num_workers={shown}: must be an integer > 0, or two as [fewest, most]",
            )
            for wrong, shown in (
                ("0", "0"),
                ("[2, 1]", "[2, 1]"),
                ("[0, 1]", "[0, 1]"),
                ("[1, 2, 3]", "[1, 2, 3]"),
                ("two", "'two'"),
                ("true", "True"),
                ("[1.0, 2]", "[1.0, 2]"),
            )
        ),
        (
            "data.max_length=4096",
            "data.max_length=4096 exceeds model.architecture.max_positions=2048; lower the first "
            "or raise the second",
        ),
        (
            "model.architecture.hidden_size=30",
            "model.architecture: hidden_size=30 must be a multiple of num_heads=4; "
            "change one of them",
        ),
        (
            "model.architecture.num_kv_heads=3",
            "model.architecture: num_kv_heads=3 does not fit num_heads=4 of a qwen2",
        ),
        (
            "model.name=gpt",
            "model: set exactly one of name (a base model) and architecture (fresh weights); both "
            "are set, name=gpt",
        ),
        (
            "tokenizer.mode=extend",
            "tokenizer.mode=extend needs a base model; model.architecture goes with train",
        ),
        (
            "objective.kind=mlm",
            "objective.kind=mlm does not fit model.architecture.kind=qwen2; bert goes with mlm, "
            "qwen2 and llama with clm",
        ),
        (
            "data.sources.0.mapping={user='{{ q }}', chosen='{{ a }}'}",
            "data.sources.0.mapping: set text, or turns, or user (a prompt) and with it assistant, "
            "or chosen and rejected, or answers",
        ),
    ],
)
def test_an_error_names_the_key_the_value_and_the_rule(
    toml: Path, override: str, message: str
) -> None:
    assert error_message(toml, override) == message


def test_a_range_of_workers_need_not_divide_the_batch(toml: Path) -> None:
    config = load(PretrainConfig, toml, ["cluster.num_workers=[1, 3]"])
    assert (config.cluster.min_workers, config.cluster.max_workers) == (1, 3)
    assert config.cluster.workers_text == "[1, 3]"
    fixed = load(PretrainConfig, toml, ["cluster.num_workers=2"]).cluster
    assert (fixed.min_workers, fixed.max_workers, fixed.workers_text) == (2, 2, "2")
    tree = config.model_dump(mode="json", exclude_none=True)  # as a run directory keeps it
    assert tree["cluster"]["num_workers"] == [1, 3]
    assert validate(PretrainConfig, tree) == config
    assert PretrainConfig.model_validate_json(config.model_dump_json()) == config


def test_labels_go_with_a_number_of_workers(toml: Path) -> None:
    config = load(PretrainConfig, toml, ['cluster.labels={role="train"}'])
    assert config.cluster.labels == {"role": "train"}
    message = error_message(toml, 'cluster.labels={role="train"}', "cluster.num_workers=[1, 2]")
    assert "set num_workers to one number instead of [1, 2], or leave labels out" in message


def test_offload_needs_a_partitioned_optimizer(toml: Path) -> None:
    message = error_message(toml, "engine.offload_optimizer=true", "engine.zero_stage=0")
    assert message == "engine: offload_optimizer=true needs zero_stage 1, 2 or 3, not 0"


def test_a_masked_model_neither_answers_nor_continues_prompts(toml: Path) -> None:
    bert = "model.architecture.kind=bert"
    assert "bert cannot generate" in error_message(toml, bert, cls=SFTConfig)
    message = error_message(toml, bert, "objective.kind=mlm", 'report.prompts=["a"]')
    assert message.startswith("report.prompts need a model that generates")


def test_source_names_differ_and_weights_are_for_all_or_none(toml: Path) -> None:
    toml.write_text(PRETRAIN + SECOND_SOURCE, "utf-8")
    assert error_message(toml, "data.sources.1.name=first") == (
        "data: source names must differ, got first, first"
    )
    assert error_message(toml, "data.sources.1.weight=2.0") == (
        "data: set weight for all sources or for none"
    )


def test_a_missing_key_of_a_source_is_the_only_error(toml: Path) -> None:
    toml.write_text(PRETRAIN.replace('license = "CC0-1.0"', ""), "utf-8")
    assert error_message(toml) == "missing key data.sources.0.license"


@pytest.mark.parametrize(
    ("cls", "override", "message"),
    [
        (PretrainConfig, "data.sources.0.licence=MIT", "data.sources.0.licence; {}.license"),
        (
            RewardModelConfig,
            "objective.normalise_on=own",
            "objective.normalise_on; {}.normalize_on",
        ),
        (PPOStageConfig, "ppo.normalise_scores=true", "ppo.normalise_scores; {}.normalize_scores"),
        (PPOStageConfig, "judge.part=[0.0, 0.5]", "judge.part; {}.hash_range"),
    ],
)
def test_a_renamed_key_is_an_error_that_names_the_new_one(
    toml: Path, cls: type[BaseModel], override: str, message: str
) -> None:
    section = override.split("=")[0].rpartition(".")[0]
    message = message.format(f"its name is now {section}")
    assert f"unknown key {message}" in error_message(toml, override, cls=cls)


def test_a_renamed_key_of_a_file_is_not_missing(toml: Path) -> None:
    toml.write_text(PRETRAIN.replace("license", "licence"), "utf-8")
    assert error_message(toml) == (
        "unknown key data.sources.0.licence; its name is now data.sources.0.license"
    )


def test_several_errors_are_reported_at_once(toml: Path) -> None:
    message = error_message(toml, "train.epochs=0", "engine.zer_stage=1")
    assert "train.epochs=0: Input should be greater than 0" in message
    assert "did you mean engine.zero_stage?" in message


def test_a_wrong_value_is_shown_in_at_most_80_characters(toml: Path) -> None:
    message = error_message(toml, f'report.prompts="{"长" * 500}"')
    assert message == f'report.prompts=\'{"长" * 79}...: must be a list, as ["..."]'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x =", "is not a TOML file: Invalid value (at end of document)"),
        ("[run]\ndir = '糖'".encode("gb18030"), "is not a TOML file: 'utf-8' codec"),
        (b"", "missing key run; missing key model; missing key data"),
    ],
)
def test_a_file_that_is_no_config_is_an_error(toml: Path, content: bytes, message: str) -> None:
    toml.write_bytes(content)
    assert error_message(toml).startswith(message)


def test_the_error_of_a_missing_file_says_where_configs_are(tmp_path: Path) -> None:
    assert error_message(tmp_path / "none.toml") == "no such file; configs/ has one for each stage"
    assert error_message(tmp_path).startswith("is not a TOML file")


def test_a_config_never_changes_after_loading(toml: Path) -> None:
    config = load(PretrainConfig, toml)
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize("cls", [PretrainConfig, SFTConfig, CorpusConfig, PipelineConfig])
def test_every_key_is_documented(cls: type) -> None:
    seen, undocumented = [cls], []
    for model in seen:
        for name, field in model.model_fields.items():
            inner = [t for t in (field.annotation, *_arguments(field.annotation)) if _is_section(t)]
            seen += [t for t in inner if t not in seen]
            if not field.description and not inner:
                undocumented.append(f"{model.__name__}.{name}")
    assert undocumented == []


def _arguments(annotation: object) -> tuple:  # type: ignore[type-arg]
    arguments = get_args(annotation)
    return (*arguments, *(a for item in arguments for a in _arguments(item)))


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
