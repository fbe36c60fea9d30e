"""README.md says what is there."""

import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from typer.main import get_command

from medgpt.cli import app
from medgpt.config.data import SourceConfig
from medgpt.config.loading import load, validate
from medgpt.config.stages import CorpusConfig, PretrainConfig
from medgpt.data.sources.deny import DenyConfig
from medgpt.eval.tasks.mcq_formats import LAYOUTS
from medgpt.reference import BEGIN, END, reference, replace_block
from medgpt.runs import FREE_TO_CHANGE
from medgpt.sample_corpus.held_out import LEFT_OUT
from medgpt.sample_corpus.knowledge import load_knowledge
from medgpt.sample_corpus.pairs import exam_questions, preferences
from medgpt.sample_corpus.render import Corpus

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PROSE = README.split(BEGIN)[0]
SOURCE = {"name": "x", "paths": ["x.jsonl"], "licence": "MIT"}


def toml_blocks(part: str) -> list[dict]:
    return [tomllib.loads(text) for text in re.findall(r"```toml\n(.*?)```", part, re.DOTALL)]


def section(title: str) -> str:
    return PROSE.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_reference_is_what_the_config_says():
    renewed = replace_block(README)
    assert renewed == README, "run: python -m medgpt.reference README.md"
    assert README.index(BEGIN) < README.index(END)


def test_every_key_is_in_the_reference_with_its_meaning():
    text = reference()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) > 80
    for row in rows:
        key, kind, default, meaning = (c.strip() for c in re.split(r"(?<!\\)\|", row)[1:-1])
        assert all((key, kind, default, meaning)), row
    for model in (PretrainConfig, CorpusConfig):
        for name in model.model_fields:
            assert f"`{name}`" in text or f"[{name}]`" in text


def test_commands_and_files_of_the_readme_exist():
    commands = set(get_command(app).commands)  # pyright: ignore[reportAttributeAccessIssue]
    used = set(re.findall(r"\bmedgpt (\w+) (?:configs|runs)/", PROSE))
    used |= set(re.findall(r"\bmedgpt (submit|job|plan) \w+ ", PROSE))  # of a stage, and of a job
    assert used == commands
    folders, kinds = "configs|jobs|tests|medgpt|clusters", "toml|sh|txt|py|yaml"
    for path in re.findall(rf"(?:{folders})/[\w./-]*\w\.(?:{kinds})", PROSE):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"^\| `([\w./-]+)`", section("Layout"), re.MULTILINE):
        assert (ROOT / path).exists(), path


def test_configs_of_commands_load_with_their_overrides(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    paths = re.findall(r"medgpt pretrain (configs/\S+\.toml)", PROSE)
    assert paths
    for path in paths:
        load(PretrainConfig, Path(path))
    assert load(CorpusConfig, Path("configs/debug/corpus.toml"), ["region=US"]).region == "US"


def test_examples_of_sources_and_mappings_are_valid():
    blocks = toml_blocks(section("Your own data"))
    mappings = [
        block["data"]["sources"]["mapping"]
        for block in blocks
        if "data" in block and isinstance(block["data"]["sources"], dict)
    ]
    assert len(mappings) == 3
    sources = [{**SOURCE, "mapping": mapping} for mapping in mappings]
    sources += [
        source
        for b in blocks
        if "data" in b and isinstance(b["data"]["sources"], list)
        for source in b["data"]["sources"]
    ]
    for source in sources:
        tree = {"run": {"dir": "x"}, "model": {"name": "x"}, "data": {"sources": [source]}}
        validate(PretrainConfig, tree)
    [rules] = [block for block in blocks if "rules" in block]
    validate(DenyConfig, rules)


def test_the_base_model_example_is_valid():
    [block] = toml_blocks(section("Your own base model"))
    tree = {"run": {"dir": "x"}, "data": {"sources": [SOURCE]}, **block}
    assert validate(PretrainConfig, tree).model.name is not None


def test_kinds_of_rows_are_those_of_the_config():
    told = set(re.findall(r"^\| `(\w+)` \| ", section("Your own data"), re.MULTILINE)) - {"kind"}
    assert told | {"auto"} == set(get_args(SourceConfig.model_fields["kind"].annotation))


def test_what_may_change_on_resume_is_complete():
    told = set(re.findall(r"`([\w.]+?)(?:\.\*)?`", section("Interrupted runs")))
    assert FREE_TO_CHANGE - {"run.allow_changes", "run.dir"} <= told


def test_counts_of_the_sample_corpus_are_right():
    corpus = Corpus()
    counts = {
        "pretrain": len(list(corpus.pretraining())),
        "sft": len(list(corpus.dialogues())),
        "prompts": len(list(corpus.prompts())),
        "preference": len(list(preferences(corpus))),
        "mcq": len(list(exam_questions(corpus))),
        "held_out_documents": len(list(corpus.held_out_documents())),
        "held_out_dialogues": len(list(corpus.held_out_dialogues())),
    }
    text = section("The sample corpus")
    for folder, count in counts.items():
        assert f"| `{folder}/` | {count:,} |" in text
    departments = load_knowledge()
    total = sum(len(d.conditions) for d in departments)
    assert f"{total} conditions in {len(departments)} departments" in text
    assert f"renders {total - len(LEFT_OUT)} of them" in text
    for held in corpus.held_out.prompts[:3]:
        assert f"`{held.prompt}`" in text


def test_the_readme_names_no_machine_and_no_foreign_resource():
    assert not re.search(r"/(?:work|home|root|tmp|Users)/", README)
    assert "clinically_reviewed = false" in PROSE
    assert not re.search(r"!\[", README)
    assert PROSE.count("```") % 2 == 0
    assert len(re.findall("```mermaid", PROSE)) == 1


def test_every_layout_of_exams_is_told_with_its_columns():
    told = section("Evaluation")
    for layout in LAYOUTS:
        assert f"`{layout}`" in told
