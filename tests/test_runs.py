import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args
from uuid import uuid4

import pytest

from medgpt.artifacts import FileEntry, Folder, checksum, commit, committed, file_entries
from medgpt.config.base import ConfigError
from medgpt.config.evaluation import EvalConfig
from medgpt.config.loading import validate
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.stages import PipelineStage, PretrainConfig
from medgpt.config.tune import TuneStageConfig
from medgpt.runs import CHANGEABLE_KEYS, FIXED_KEYS, Run


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Return the URL of a missing folder, on a disk and behind a URI."""
    url = str(tmp_path / "run") if request.param == "local" else f"memory://{uuid4().hex}/run"
    yield url
    Folder(url).remove()


def make_config(run_dir: str, **changes: Any) -> PretrainConfig:
    """Return a config; `train__epochs=2` sets a key of a section."""
    tree: dict[str, Any] = {
        "run": {"dir": run_dir},
        "model": {"architecture": {"hidden_size": 64}},
        "tokenizer": {"mode": "train"},
        "data": {"sources": [{"name": "a", "paths": ["/a.jsonl"], "license": "MIT"}]},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        tree.setdefault(section, {})[name] = value
    return validate(PretrainConfig, tree)


def open_run(run_dir: str, *, stage: str = "pretrain", **changes: Any) -> Run:
    config = make_config(run_dir, **changes)
    return Run.open(stage, config, run_dir=run_dir, allow_changes=config.run.allow_changes)


def write_checkpoint(run: Run, step: int, text: str = "weights") -> Folder:
    folder = run.checkpoint(step)
    with folder.staging() as directory:
        (directory / "rank-0.bin").write_text(text)
        files = file_entries(directory, ["rank-0.bin"])
    commit(folder, files, position={"step": step})
    return folder


# folders and artifacts


def test_a_folder_lists_reads_and_removes_files(url: str) -> None:
    folder = Folder(url)
    assert folder.names() == []
    (folder / "sub").write_text("b.txt", "内容")
    folder.write_json("a.json", {"键": [1, 2]})
    assert folder.names() == ["a.json", "sub"]
    assert (folder / "sub").read_text("b.txt") == "内容"
    assert folder.read_json("a.json") == {"键": [1, 2]}
    assert folder.exists("a.json")
    assert not folder.exists("b.json")
    (folder / "sub").remove()
    assert folder.names() == ["a.json"]
    folder.remove()
    folder.remove()
    assert folder.names() == []


def test_writing_again_replaces_a_text(url: str) -> None:
    folder = Folder(url)
    for text in ("a long text", "short"):
        folder.write_text("a.txt", text)
    assert folder.read_text("a.txt") == "short"
    assert folder.names() == ["a.txt"]


def test_staged_files_are_copied_with_their_folders_and_back(url: str) -> None:
    folder = Folder(url)
    with folder.staging() as directory:
        (directory / "sub").mkdir()
        (directory / "sub/b.bin").write_bytes(b"b")
        (directory / "a.bin").write_bytes(b"a")
        files = file_entries(directory)
    assert [file.name for file in files] == ["a.bin", "sub/b.bin"]
    commit(folder, files)
    assert committed(folder, verify=True)
    with folder.local() as directory:
        assert (directory / "sub/b.bin").read_bytes() == b"b"
        assert file_entries(directory) == files  # the manifest is not one of them


def test_the_checksum_is_xxh3_of_128_bit(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.write_bytes(b"")
    assert checksum(path) == "99aa06d3014798d86001c324468d497f"
    assert Folder(str(tmp_path)).checksum("empty") == checksum(path)


def test_an_artifact_is_complete_only_with_a_manifest_and_all_its_files(url: str) -> None:
    folder = Folder(url)
    folder.write_text("a.bin", "aaaa")
    folder.write_text("b.bin", "bbbb")
    assert committed(folder) is None
    with folder.local() as directory:
        files = file_entries(directory)
    commit(folder, files, kind="test")
    manifest = committed(folder)
    assert manifest is not None
    assert (manifest["kind"], manifest["files"][0]) == ("test", vars(files[0]))
    folder.write_text("b.bin", "bbbx")
    assert committed(folder)
    assert committed(folder, verify=True) is None
    folder.write_text("b.bin", "bbb")
    assert committed(folder) is None
    folder.fs.rm(folder.path("b.bin"))
    assert committed(folder) is None


# opening a run


def test_a_new_run_records_its_config_and_environment(url: str) -> None:
    run = open_run(url, run__seed=3)
    assert validate(PretrainConfig, run.config) == make_config(url, run__seed=3)
    manifest = run.manifest
    assert manifest["stage"] == "pretrain"
    assert manifest["versions"]["torch"]
    assert manifest["hardware"]["cpus"] >= 1
    assert manifest["started"]
    assert not run.finished
    assert run.newest_checkpoint() is None
    assert run.metrics() == []


def test_the_same_command_resumes_the_run_and_keeps_its_manifest(url: str) -> None:
    run = open_run(url)
    run.update_manifest(attempt=2, started="then")
    again = open_run(url)
    assert (again.manifest["attempt"], again.manifest["started"]) == (2, "then")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train__micro_batch_size", 8),
        ("train__log_every", 1),
        ("train__audit", True),
        ("train__keep_checkpoints", 9),
        ("cluster__num_workers", 4),
        ("cluster__cpus_per_worker", 2),
        ("report__prompts", ["糖尿病的主要症状包括"]),
        ("engine__activation_checkpointing", True),
        ("run__allow_changes", True),
    ],
)
def test_keys_that_do_not_alter_the_result_may_change(
    tmp_path: Path, key: str, value: object
) -> None:
    url = str(tmp_path / "run")
    open_run(url)
    run = open_run(url, **{key: value})
    section, name = key.split("__")
    assert run.config[section][name] == value


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train__epochs", 2, "train.epochs was 1, is 2"),
        ("train__max_steps", 5, "train.max_steps was unset, is 5"),
        ("train__global_batch_size", 32, "train.global_batch_size was 64, is 32"),
        ("optimizer__learning_rate", 1e-3, "optimizer.learning_rate was 0.0003, is 0.001"),
        ("run__seed", 1, "run.seed was 0, is 1"),
        ("data__max_length", 512, "data.max_length was 1024, is 512"),
        ("tokenizer__vocab_size", 4000, "tokenizer.vocab_size was 8000, is 4000"),
        (
            "model__architecture",
            {"hidden_size": 128},
            "model.architecture.hidden_size was 64, is 128",
        ),
        (
            "data__sources",
            [{"name": "a", "paths": ["/a.jsonl"], "license": "MIT", "weight": 2}],
            "data.sources.0.weight was unset, is 2.0",
        ),
        (
            "data__sources",
            [{"name": n, "paths": ["/a.jsonl"], "license": "MIT"} for n in "ab"],
            "data.sources.1 was unset, is {",
        ),
        ("engine__precision", "fp32", "engine.precision was 'auto', is 'fp32'"),
    ],
)
def test_keys_that_alter_the_result_are_refused_unless_allowed(
    tmp_path: Path, key: str, value: object, words: str
) -> None:
    url = str(tmp_path / "run")
    before = open_run(url).config
    with pytest.raises(ConfigError) as error:
        open_run(url, **{key: value})
    assert words in str(error.value)
    assert str(error.value).count(", is ") == 1
    assert "run.allow_changes=true" in str(error.value)
    assert Run(url).config == before
    run = open_run(url, run__allow_changes=True, **{key: value})
    assert run.config != before
    open_run(url, **{key: value})  # the run keeps the new config


def section_of(cls: Any, names: list[str]) -> Any:
    """Return the class of a nested section, which may be optional."""
    for name in names:
        annotation = cls.model_fields[name].annotation
        cls = next(iter(get_args(annotation)), annotation)
    return cls


def test_keys_that_may_change_exist() -> None:
    for path in CHANGEABLE_KEYS:
        *sections, name = path.split(".")
        first = path.split(".")[0]
        if first == "stages":  # a list of them
            assert name in PipelineStage.model_fields
            continue
        stages = (PretrainConfig, EvalConfig, PPOStageConfig, TuneStageConfig)
        having = [stage for stage in stages if first in stage.model_fields]
        assert any(name in section_of(stage, sections).model_fields for stage in having), path

    for path in FIXED_KEYS:
        *sections, name = path.split(".")
        assert name in section_of(PPOStageConfig, sections).model_fields, path


@pytest.mark.parametrize(
    ("key", "value", "changes"),
    [
        (("reward", "num_workers"), 2, False),
        (("reward", "zero_stage"), 3, False),
        (("actor", "engine"), {"zero_stage": 3}, False),
        (("actor", "engine"), {"precision": "bf16"}, True),
        (("rollout", "precision"), "bf16", True),
        (("reference_in_actor",), True, True),
    ],
)
def test_only_pool_keys_that_alter_numbers_may_not_change(
    tmp_path: Path, key: tuple[str, ...], value: object, changes: bool
) -> None:
    def config(pools: dict[str, Any]) -> PPOStageConfig:
        source = {"name": "a", "paths": ["/a.jsonl"], "license": "MIT"}
        model = {"name": "/sft/model", "lora": {"rank": 4}}
        tree = {"run": {"dir": str(tmp_path / "run")}, "model": model, "pools": pools}
        tree |= {"data": {"sources": [source]}, "reward": {"score_weight": 0.0}}
        return validate(PPOStageConfig, tree)

    def run(pools: dict[str, Any]) -> Run:
        return Run.open("ppo", config(pools), run_dir=str(tmp_path / "run"), allow_changes=False)

    run({})
    pools = {key[-1]: value} if len(key) == 1 else {key[0]: {key[1]: value}}
    if changes:
        with pytest.raises(ConfigError, match=re.escape(f"pools.{'.'.join(key)}")):
            run(pools)
    else:
        run(pools)


def test_a_key_added_by_a_newer_version_is_no_change(tmp_path: Path) -> None:
    run = open_run(str(tmp_path / "run"))
    lines = run.folder.read_text("config.toml").splitlines()
    older = [line for line in lines if not line.startswith(("weight_decay", "rope_theta"))]
    assert len(older) == len(lines) - 2
    run.folder.write_text("config.toml", "\n".join(older))
    open_run(run.folder.url)


def test_a_key_removed_by_a_newer_version_is_a_change(tmp_path: Path) -> None:
    run = open_run(str(tmp_path / "run"))
    text = run.folder.read_text("config.toml").replace("[train]", "[train]\nlost = 1")
    run.folder.write_text("config.toml", text)
    with pytest.raises(ConfigError, match=r"train\.lost was 1, is unset"):
        open_run(run.folder.url)


def test_a_finished_run_is_not_modified(url: str) -> None:
    run = open_run(url)
    run.update_manifest(finished=True)
    files = {name: run.folder.read_text(name) for name in run.folder.names()}
    again = open_run(url, run__allow_changes=True, train__epochs=9, cluster__num_workers=2)
    assert again.finished
    assert {name: again.folder.read_text(name) for name in again.folder.names()} == files
    with pytest.raises(ConfigError, match=r"train\.epochs was 1, is 9"):
        open_run(url, train__epochs=9)


def test_a_run_of_another_stage_is_refused(url: str) -> None:
    open_run(url)
    with pytest.raises(ConfigError, match="is a run of stage pretrain; choose another folder"):
        open_run(url, stage="sft")


def test_a_folder_with_other_things_is_refused(url: str) -> None:
    Folder(url).write_text("thesis.docx", "x")
    with pytest.raises(ConfigError, match=r"holds thesis\.docx but no config\.toml"):
        open_run(url)
    assert Folder(url).names() == ["thesis.docx"]


def test_hidden_files_do_not_make_a_folder_foreign(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").write_text("x")
    open_run(str(tmp_path))
    assert (tmp_path / "config.toml").exists()


@pytest.mark.parametrize(
    ("run_dir", "words"),
    [
        ("runs/a", "is relative"),
        ("nowhere://bucket/run", "Protocol not known: nowhere"),
        ("/proc/version", "is a file"),
        ("/proc/version/run", "cannot be written"),
    ],
)
def test_an_unusable_run_dir_is_refused(run_dir: str, words: str) -> None:
    config = make_config("/unused")
    with pytest.raises(ConfigError, match=f"run.dir={run_dir}.*{words}"):
        Run.open("pretrain", config, run_dir=run_dir, allow_changes=False)


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("oss", "ossfs")])
def test_a_missing_store_package_is_named_in_the_error(scheme: str, package: str) -> None:
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    run_dir = f"{scheme}://bucket/run"
    with pytest.raises(ConfigError, match=f"run.dir={run_dir}: .*nstall {package}"):
        Run.open("pretrain", make_config("/unused"), run_dir=run_dir, allow_changes=False)


# checkpoints


def test_the_newest_complete_checkpoint_is_resumed(url: str) -> None:
    run = open_run(url)
    for step in (100, 1000, 200):
        write_checkpoint(run, step)
    with run.checkpoint(1100).staging() as directory:
        (directory / "rank-0.bin").write_text("half")
    assert run.checkpoint_steps() == [100, 200, 1000, 1100]
    newest = run.newest_checkpoint()
    assert newest is not None
    assert newest[0].url == run.checkpoint(1000).url
    assert newest[1]["position"] == {"step": 1000}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rank-0.bin", "weighty"),  # the size is right
        ("rank-0.bin", "weight"),
        ("rank-0.bin", None),
        ("manifest.json", '{"files": ['),
        ("manifest.json", None),
    ],
    ids=["flipped", "truncated", "missing", "truncated manifest", "no manifest"],
)
def test_a_damaged_checkpoint_is_skipped(url: str, name: str, text: str | None) -> None:
    run = open_run(url)
    for step in (100, 200):
        write_checkpoint(run, step)
    damaged = run.checkpoint(200)
    if text is None:
        damaged.fs.rm(damaged.path(name))
    else:
        damaged.write_text(name, text)
    newest = run.newest_checkpoint()
    assert newest is not None
    assert newest[1]["position"] == {"step": 100}


def test_the_last_checkpoints_and_the_best_are_kept(url: str) -> None:
    run = open_run(url)
    for step in (100, 200, 300, 400):
        write_checkpoint(run, step)
    run.prune_checkpoints(newest=400, keep=2, best_step=100)
    assert run.checkpoint_steps() == [100, 300, 400]


def test_remains_of_a_dead_attempt_do_not_replace_a_good_checkpoint(url: str) -> None:
    run = open_run(url)
    for step in (100, 200, 300):
        write_checkpoint(run, step)
    run.checkpoint(200).fs.rm(run.checkpoint(200).path("rank-0.bin"))
    run.checkpoint(300).write_text("rank-0.bin", "weighty")  # damaged, so the run resumed at 100
    write_checkpoint(run, 150)
    run.prune_checkpoints(newest=150, keep=1, best_step=None)
    assert run.checkpoint_steps() == [150]
    newest = run.newest_checkpoint()
    assert newest is not None
    assert newest[1]["position"] == {"step": 150}


# metrics


def write_metrics(run: Run, *lines: dict[str, float], end: str = "\n") -> None:
    run.folder.write_text("metrics.jsonl", "\n".join(map(json.dumps, lines)) + end)


def test_all_lines_of_a_step_are_merged(url: str) -> None:
    run = open_run(url)
    write_metrics(
        run,
        {"step": 0, "attempt": 1, "time_s": 0, "validation/loss": 9},
        {"step": 1, "attempt": 1, "time_s": 1, "train/loss": 8},
        {"step": 1, "attempt": 1, "time_s": 2, "validation/loss": 7},
    )
    assert run.metrics() == [
        {"step": 0, "attempt": 1, "time_s": 0, "validation/loss": 9},
        {"step": 1, "attempt": 1, "time_s": 2, "train/loss": 8, "validation/loss": 7},
    ]


def test_only_the_newest_attempt_of_a_replayed_step_counts(url: str) -> None:
    run = open_run(url)
    write_metrics(
        run,
        {"step": 1, "attempt": 1, "train/loss": 9},
        {"step": 2, "attempt": 1, "train/loss": 8, "validation/loss": 8},
        {"step": 2, "attempt": 2, "train/loss": 7},
        {"step": 2, "attempt": 1, "train/loss": 6},  # a late line of the first attempt
        {"step": 2, "attempt": 2, "time/checkpoint_s": 5},
    )
    assert run.metrics() == [
        {"step": 1, "attempt": 1, "train/loss": 9},
        {"step": 2, "attempt": 2, "train/loss": 7, "time/checkpoint_s": 5},
    ]


def test_a_partial_last_line_is_ignored(url: str) -> None:
    run = open_run(url)
    write_metrics(run, {"step": 1, "attempt": 1}, {"step": 2, "attempt": 1}, end='\n{"step": 3, "a')
    assert [line["step"] for line in run.metrics()] == [1, 2]


def test_a_file_entry_is_what_the_manifest_holds(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1234")
    (entry,) = file_entries(tmp_path)
    assert FileEntry(**vars(entry)) == entry
    assert (entry.name, entry.size, len(entry.xxh128)) == ("a", 4, 32)


def test_a_key_renamed_by_a_newer_version_is_a_change_that_names_both(tmp_path: Path) -> None:
    run = open_run(str(tmp_path / "run"))
    text = run.folder.read_text("config.toml")
    run.folder.write_text("config.toml", text.replace("license", "licence"))
    rename = "data.sources.0.licence is now data.sources.0.license"
    with pytest.raises(ConfigError, match=rf"another config: {rename}\. Restore"):
        open_run(run.folder.url)
    again = open_run(run.folder.url, run__allow_changes=True)
    assert again.accepted_changes == [rename]
    assert again.folder.read_text("config.toml").count("license") == 1
