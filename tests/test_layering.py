"""Imports point one way, so each layer can be read, and tested, without the ones above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "medgpt").rglob("*.py"))
LAYERS = [
    *(
        "config",
        "reference",
        "disk",
        "artefacts",
        "runs",
        "metrics",
        "algos",
        "data",
        "medical",
        "models",
        "engine",
        "train",
    ),
    *("rlhf", "tune", "eval", "planning", "jobs", "cli", "__main__", "__init__"),
]
HOMES = {  # the only layers that may import these libraries
    "ray": {"data", "train", "rlhf", "tune", "eval", "planning", "jobs"},
    "deepspeed": {"engine"},
    "transformers": {"data", "models"},
    "tokenizers": {"data", "models"},
    "peft": {"models"},
    "trl": {"data", "train"},
    "optuna": {"tune"},
    "typer": {"cli"},
    "torch": {"algos", "data", "models", "engine", "train", "rlhf", "tune", "eval"},
}
EXCEPTIONS = {("medgpt/train/offline.py", "transformers")}  # of TRL


def layer(path: Path) -> str:
    return path.relative_to(ROOT / "medgpt").parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path} has a relative import"
            assert not node.level, f"{path} has a relative import"
            names.add(node.module)
    return names


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
        ("medgpt.config", {"torch", "ray", "typer"}),
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
