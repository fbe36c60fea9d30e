"""The pages say what is there: files, links, commands, keys and counts."""

import ast
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from typer.main import get_command

from medgpt.cli import app
from medgpt.config.data import SourceConfig
from medgpt.config.evaluation import EvalConfig
from medgpt.config.loading import load, validate
from medgpt.config.ppo_rewards import PPORewardConfig
from medgpt.config.stages import CorpusConfig, PretrainConfig, SFTConfig
from medgpt.config.tune import TuneStageConfig
from medgpt.data.sources.deny_list import DenyConfig
from medgpt.eval.tasks.mcq_formats import LAYOUTS
from medgpt.planning.hardware import HardwareFile
from medgpt.reference import BEGIN, END, STAGES, reference, replace_block
from medgpt.runs import CHANGEABLE_KEYS
from medgpt.sample_corpus.exam_questions import exam_questions
from medgpt.sample_corpus.generator import CorpusGenerator
from medgpt.sample_corpus.held_out import EXCLUDED_CONDITIONS
from medgpt.sample_corpus.knowledge import load_knowledge
from medgpt.sample_corpus.preference_pairs import preference_pairs

ROOT = Path(__file__).parent.parent
GENERATED = {"runs", "build", "dist", "__pycache__"}
FOLDERS = sorted(
    path
    for path in ROOT.iterdir()
    if path.is_dir() and not path.name.startswith(".") and path.name not in GENERATED
)
PAGES = {  # by path from the root; the configuration reference is checked by its own tests
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8").split(BEGIN)[0]
    for path in [*ROOT.glob("*.md"), *(p for folder in FOLDERS for p in folder.rglob("*.md"))]
    if not GENERATED & set(path.relative_to(ROOT).parts)
}
READMES = ["README.md", "README.zh.md"]  # the second has the structure of the first
CONFIGS = (ROOT / "configs" / "README.md").read_text("utf-8")
COMMANDS = set(get_command(app).commands)  # pyright: ignore[reportAttributeAccessIssue]
MAX_README_LINES = 250
MAX_IMAGE_BYTES = 150_000
NOT_A_PATH = {"medgpt/role"}  # a label of Kubernetes
FILE_KINDS = "html|json|jsonl|md|parquet|py|sh|toml|txt|yaml"
SOURCE = {"name": "x", "paths": ["x.jsonl"], "license": "MIT"}
RUN = {"run": {"dir": "x"}}

every_page = pytest.mark.parametrize("page", sorted(PAGES))
both_readmes = pytest.mark.parametrize("page", READMES)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def toml_blocks(text: str) -> list[dict]:
    return [tomllib.loads(block) for block in blocks(text, "toml")]


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", without_blocks(text))


def section(page: str, title: str) -> str:
    """What stands under a heading, up to the next heading of its level or above."""
    [(level, rest)] = re.findall(
        rf"^(##+) {re.escape(title)}\n(.*)", PAGES[page], re.DOTALL | re.MULTILINE
    )
    return re.split(rf"^#{{1,{len(level)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    titles = re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def shell_commands(text: str) -> Iterator[list[str]]:
    """What follows `medgpt` in shell blocks and code spans, as words."""
    for block in blocks(text, "bash"):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            words = shlex.split(line, comments=True)
            if "medgpt" in words:
                yield words[words.index("medgpt") + 1 :]
    for span in code_spans(text):
        if span.startswith("medgpt "):
            yield shlex.split(span)[1:]


def keys_of_the_reference() -> tuple[set[str], set[str]]:
    """(every `section.key`, the sections that are no lists)."""
    keys, sections, headers = set(), set(), []
    for line in reference().splitlines():
        if line.startswith("**"):
            headers = re.findall(r"`\[+([\w.]+)\]+`", line)
            sections |= set(re.findall(r"`\[([\w.]+)\]`", line))
        elif row := re.match(r"\| `(\w+)` \|", line):
            keys |= {f"{header}.{row.group(1)}" for header in headers}
    return keys, sections


def check_toml(block: dict) -> None:
    """Load an example as the config, or the part of one, that it is."""
    match block:
        case {"rules": _}:
            validate(DenyConfig, block)
        case {"deny": _}:
            validate(SourceConfig, {**SOURCE, **block})
        case {"nodes": _}:
            validate(HardwareFile, block)
        case {"reward": section}:
            assert set(block) == {"reward"}
            validate(PPORewardConfig, section)
        case {"search": _}:
            base = {"base": str(ROOT / "configs/debug/ppo.toml"), "overrides": ["judge.every=5"]}
            validate(TuneStageConfig, {**RUN, **base, **block})
        case {"gates": _}:
            points = [{"path": "x"}]
            tasks = {"mcq": [{"paths": ["x"], "layout": "sample"}], "key_points": points}
            own = {"nll": [{"general": True}], "triage": [{}], "model": {"parent": "x"}}
            validate(EvalConfig, {**RUN, **tasks, **own, **block})
        case {"mcq": _} | {"nll": _} | {"triage": _} | {"safety": _}:
            validate(EvalConfig, {**RUN, **block})
        case {"data": {"sources": {"mapping": mapping}}}:
            validate(SourceConfig, {**SOURCE, "mapping": mapping})
        case {"data": _} | {"model": _}:
            base = {**RUN, "model": {"name": "x"}, "data": {"sources": [SOURCE]}}
            validate(SFTConfig if "run" in block else PretrainConfig, {**base, **block})
        case _:
            raise AssertionError(f"what is {sorted(block)}? say it in check_toml")


def test_the_reference_is_what_the_config_says():
    renewed = replace_block(CONFIGS)
    assert renewed == CONFIGS, "run: python -m medgpt.reference configs/README.md"
    assert CONFIGS.index(BEGIN) < CONFIGS.index(END)


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


@both_readmes
def test_the_readme_is_short(page: str):
    assert len(PAGES[page].splitlines()) <= MAX_README_LINES


@both_readmes
def test_the_readme_names_every_command_and_every_package(page: str):
    assert {words[0] for words in shell_commands(PAGES[page])} == COMMANDS
    title = {"README.md": "Layout", "README.zh.md": "目录结构"}[page]
    named = set(re.findall(r"`(medgpt/\w+)/`", section(page, title)))
    packages = {f"medgpt/{path.parent.name}" for path in ROOT.glob("medgpt/*/__init__.py")}
    assert named == packages


def test_the_chinese_readme_has_the_structure_of_the_english_one():
    english, chinese = (PAGES[page] for page in READMES)
    assert toml_blocks(english) == toml_blocks(chinese)
    assert [*shell_commands(english)] == [*shell_commands(chinese)]
    for pattern in (r"^#+ ", r"^\| ", r"^- ", r"^!\[", r"^```"):
        counts = [len(re.findall(pattern, text, re.MULTILINE)) for text in (english, chinese)]
        assert counts[0] == counts[1], pattern


@every_page
def test_commands_of_a_page_exist(page: str):
    assert {words[0] for words in shell_commands(PAGES[page])} <= COMMANDS | {"STAGE"}
    for module in re.findall(r"python -m ((?:medgpt|tests)\.[\w.]*\w)", PAGES[page]):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@every_page
def test_configs_of_commands_load_with_their_overrides(page: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    for words in shell_commands(PAGES[page]):
        stage = words[1] if words[0] in ("submit", "plan") and words[1:] else words[0]
        paths = [word for word in words if re.fullmatch(r"configs/\S+\.toml", word)]
        if stage not in STAGES or not paths:
            continue
        overrides = [word for word in words if re.match(r"[a-z][\w.-]*=", word)]
        load(STAGES[stage], Path(paths[0]), overrides)
    assert load(CorpusConfig, Path("configs/debug/corpus.toml"), ["region=US"]).region == "US"


def test_the_readme_pretrains():
    assert re.findall(r"medgpt pretrain (configs/\S+\.toml)", PAGES["README.md"])
    assert re.findall(r"medgpt pretrain (configs/\S+\.toml)", PAGES["medgpt/train/README.md"])


@every_page
def test_files_that_a_page_names_exist(page: str):
    folders = "configs|jobs|tests|medgpt|clusters"
    file = rf"(?<![\w/.-])(?:{folders})/[\w./-]*\w\.(?:{FILE_KINDS})\b"
    for path in re.findall(file, PAGES[page]):
        assert (ROOT / path).exists(), path
    for span in code_spans(PAGES[page]):
        for path in re.findall(rf"(?<!\S)(?:{folders})/[\w./*-]*(?!\S)", span):
            assert path in NOT_A_PATH or any(ROOT.glob(path.rstrip("/"))), path


@every_page
def test_links_and_anchors_of_a_page_resolve(page: str):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(PAGES[page])):
        assert not re.match(r"\w+:", target), f"{target}: pages link to the repository only"
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text("utf-8").split(BEGIN)[0]), target


@every_page
def test_examples_of_configs_load(page: str):
    for block in toml_blocks(PAGES[page]):
        check_toml(block)


@every_page
def test_keys_that_a_page_names_exist(page: str):
    keys, sections = keys_of_the_reference()
    first = {section.split(".")[0] for section in sections}
    for span in code_spans(PAGES[page]):
        key = re.match(r"([a-z_]+(?:\.\w+)+)(?:\s*=.*)?$", span)
        if not key or re.search(rf"\.(?:{FILE_KINDS})$", key.group(1)):
            continue
        name = re.sub(r"\.\d+", "", key.group(1))
        if name.split(".")[0] in first:
            assert name in keys | sections, name


@every_page
def test_python_of_a_page_imports_what_exists(page: str):
    for block in blocks(PAGES[page], "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("medgpt"):
                module = importlib.import_module(str(node.module))
                assert {alias.name for alias in node.names} <= set(vars(module))


@every_page
def test_a_page_names_no_machine_and_no_foreign_resource(page: str):
    text = PAGES[page]
    assert not re.search(r"/(?:work|home|root|tmp|Users)/", text)
    assert text.count("```") % 2 == 0
    for image in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text):
        file = (ROOT / page).parent / image
        assert ROOT in file.resolve().parents
        assert file.stat().st_size <= MAX_IMAGE_BYTES
    assert len(re.findall(r"!\[", text)) == (1 if page in READMES else 0)
    assert not re.search(r"<(?:img|script|iframe)\b", text)


@both_readmes
def test_the_readme_warns_and_shows_how_data_flows(page: str):
    assert "clinically_reviewed = false" in PAGES[page]
    assert len(blocks(PAGES[page], "mermaid")) == 1


def test_examples_of_sources_and_mappings_are_valid():
    examples = toml_blocks(section("medgpt/data/README.md", "Your own data"))
    examples += toml_blocks(section("medgpt/data/README.md", "What is set aside"))
    mappings = [
        block["data"]["sources"]["mapping"]
        for block in examples
        if "data" in block and isinstance(block["data"]["sources"], dict)
    ]
    assert len(mappings) == 3
    sources = [{**SOURCE, "mapping": mapping} for mapping in mappings]
    sources += [
        source
        for b in examples
        if "data" in b and isinstance(b["data"]["sources"], list)
        for source in b["data"]["sources"]
    ]
    for source in sources:
        tree = {**RUN, "model": {"name": "x"}, "data": {"sources": [source]}}
        validate(PretrainConfig, tree)
    [rules] = [block for block in examples if "rules" in block]
    validate(DenyConfig, rules)


def test_the_base_model_example_is_valid():
    [block] = toml_blocks(section("medgpt/train/README.md", "Your own base model"))
    tree = {**RUN, "data": {"sources": [SOURCE]}, **block}
    assert validate(PretrainConfig, tree).model.name is not None


def test_kinds_of_rows_are_those_of_the_config():
    text = section("medgpt/data/README.md", "Your own data")
    named = set(re.findall(r"^\| `(\w+)` \| ", text, re.MULTILINE)) - {"kind"}
    assert named | {"auto"} == set(get_args(SourceConfig.model_fields["kind"].annotation))


def test_what_may_change_on_resume_is_complete():
    text = section("medgpt/train/README.md", "Interrupted runs")
    named = set(re.findall(r"`([\w.]+?)(?:\.\*)?`", text))
    assert CHANGEABLE_KEYS - {"run.allow_changes", "run.dir"} <= named


def test_counts_of_the_sample_corpus_are_right():
    corpus = CorpusGenerator()
    counts = {
        "pretrain": len(list(corpus.documents())),
        "sft": len(list(corpus.dialogues())),
        "prompts": len(list(corpus.prompts())),
        "preference": len(list(preference_pairs(corpus))),
        "mcq": len(list(exam_questions(corpus))),
        "held_out_documents": len(list(corpus.held_out_documents())),
        "held_out_dialogues": len(list(corpus.held_out_dialogues())),
    }
    text = PAGES["medgpt/sample_corpus/README.md"]
    for folder, count in counts.items():
        assert f"| `{folder}/` | {count:,} |" in text
    departments = load_knowledge()
    total = sum(len(d.conditions) for d in departments)
    assert f"{total} conditions in {len(departments)} departments" in text
    assert f"renders {total - len(EXCLUDED_CONDITIONS)} of them" in text
    for held in corpus.held_out.prompts[:3]:
        assert f"`{held.prompt}`" in text


def test_every_layout_of_exams_is_named_with_its_columns():
    text = section("medgpt/eval/README.md", "Multiple choice")
    for layout in LAYOUTS:
        assert f"`{layout}`" in text
