"""Imports point one way, so each layer can be read, and tested, without the ones above it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "medgpt").rglob("*.py"))
LAYERS = [
    *("config", "artifacts", "runs", "metrics", "disk", "reference", "algos", "data"),
    *("sample_corpus", "medical", "models", "engine", "cluster", "train", "rlhf", "tune"),
    *("eval", "planning", "reports", "stages", "jobs", "cli", "__main__", "__init__"),
]
DATA_LAYERS = ["sources", "tokenized", "loader"]
HOMES = {  # the only layers that may import these libraries
    "ray": {"data", "cluster", "train", "rlhf", "tune", "eval", "planning", "stages", "jobs"},
    "deepspeed": {"engine"},
    "transformers": {"data", "models"},
    "tokenizers": {"data", "models"},
    "peft": {"models"},
    "trl": {"data", "train"},
    "optuna": {"tune"},
    "typer": {"cli"},
    "torch": {"algos", "data", "models", "engine", "train", "rlhf", "tune", "eval", "stages"},
}
EXCEPTIONS = {
    ("medgpt/train/dpo.py", "transformers"),  # of TRL
    ("medgpt/stages/chat.py", "transformers"),  # prints tokens as they come
}
RAY_INTERNALS = {
    "medgpt/cluster/ray_internals.py",
    "medgpt/cluster/ray_train_internals.py",
    "medgpt/data/loader/ray_internals.py",
}
"""The only files that may import Ray's private modules."""


def layer(path: Path) -> str:
    return path.relative_to(ROOT / "medgpt").parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Modules that a file imports at its top, in functions and for types alike."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path} has a relative import"
            assert not node.level, f"{path} has a relative import"
            names |= {
                full if (full := f"{node.module}.{alias.name}") in MODULES else node.module
                for alias in node.names
            }
    return names


def private_imports(path: Path) -> Iterator[str]:
    """Names of Ray that a file imports and whose path has a part that Ray keeps to itself."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first == "ray" and any(part.startswith("_") or part == "generated" for part in rest):
                yield name


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    for name in imports(path):
        root, _, rest = name.partition(".")
        if (name_of(path), root) not in EXCEPTIONS:
            assert layer(path) in HOMES.get(root, {layer(path)}), f"{path} imports {root}"
        if root == "medgpt" and rest:
            used = rest.split(".")[0]
            assert LAYERS.index(used) <= LAYERS.index(layer(path)), (
                f"{path} imports {name}, a layer above"
            )


def test_no_module_imports_itself_through_others() -> None:
    graph = {
        name: {used for used in imports(path) if used in MODULES and used != name}
        for name, path in MODULES.items()
    }
    circle: list[str] = []
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = error.args[1]
    assert not circle, f"a circle of imports: {' -> '.join(circle)}"


@pytest.mark.parametrize("path", [p for p in FILES if layer(p) == "data"], ids=name_of)
def test_data_goes_from_sources_to_tokens_to_batches(path: Path) -> None:
    folder = path.relative_to(ROOT / "medgpt" / "data").parts[0]
    for name in imports(path):
        if name == "medgpt.data.loader.ray_internals":
            continue  # what Ray Data keeps private serves all that runs on it
        if name.startswith("medgpt.data.") and folder in DATA_LAYERS:
            used = name.split(".")[2]
            assert DATA_LAYERS.index(used) <= DATA_LAYERS.index(folder), f"{path} imports {name}"


@pytest.mark.parametrize("path", [p for p in FILES if layer(p) in ("medical", "eval")], ids=name_of)
def test_rules_and_tasks_know_nothing_of_the_sample_corpus(path: Path) -> None:
    assert not [name for name in imports(path) if name.startswith("medgpt.sample_corpus")]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_private_modules_of_ray_are_imported_in_three_files(path: Path) -> None:
    if name_of(path) not in RAY_INTERNALS:
        assert not list(private_imports(path))


@pytest.mark.parametrize("path", [p for p in FILES if layer(p) == "algos"], ids=name_of)
def test_algos_imports_torch_and_itself_only(path: Path) -> None:
    foreign = {
        name
        for name in imports(path)
        if name.split(".")[0] not in {"torch", *sys.stdlib_module_names}
        and not name.startswith("medgpt.algos")
    }
    assert not foreign


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("medgpt.cli", {"torch", "ray", "numpy", "pyarrow", "transformers"}),
        ("medgpt.config.loading", {"torch", "ray", "typer"}),
        ("medgpt.config.tune", {"torch", "ray", "typer"}),
        ("medgpt.runs", {"torch", "ray"}),
        ("medgpt.metrics", {"torch", "ray"}),
        ("medgpt.algos.lm", {"ray", "transformers"}),
        ("medgpt.models.generate", {"ray", "deepspeed"}),
    ],
)
def test_a_module_is_imported_without_what_it_does_not_need(module: str, absent: set[str]) -> None:
    code = f"import {module}, sys; print(*sorted({absent!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr
