"""Every family does what the table in medgpt/models/README.md says, cell by cell."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import cells, role_cells
from tests.models.cells import ANSWERS, QUESTIONS, Refused, Trained
from tests.models.families import FAMILIES, Family

PAGE = Path(__file__).parents[2] / "medgpt" / "models" / "README.md"
CELLS = ("full", "LoRA", "reward", "PPO", "eval", "chat")
IN_EVERY_RUN = {  # one of each kind of difference; the others run with `tests/run.sh --all`
    "qwen2-base": CELLS,  # its generation_config ends at the end of text, not at the end of a turn
    "llama-2": ("full", "chat"),  # SentencePiece's ▁ and bytes
    "qwen3": ("full", "eval"),  # thinking
    "qwen3.5": ("full", "eval"),  # a state crosses packed texts
    "qwen3-moe": ("LoRA",),
    "gemma-2": ("full",),  # logits are capped
    "gpt-oss": ("full",),  # one end for middle turns, another one for last turns
    "minicpm-3": ("LoRA", "PPO"),  # logits are scaled by a property
    "bloom": ("full",),  # alibi, no template
    "opt": ("full", "PPO"),  # dropout in its own code, positions with an offset
    "remote-code": ("LoRA", "PPO"),
    "roberta": ("full",),  # positions begin at padding_idx + 1
    "deberta-v2": ("LoRA",),
}


def table() -> dict[str, dict[str, str]]:
    """Return column -> entry of each family of the page's table."""
    lines = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("|")]
    header, _, *rows = [[entry.strip() for entry in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def refusal(entry: str) -> str | None:
    """Return what the error of a refused cell says, from the page's notes."""
    note = re.fullmatch(r"no \((\d+)\)", entry)
    if note is None:
        return None
    [excerpt] = re.findall(rf"^{note[1]}\. `([^`]+)`", PAGE.read_text("utf-8"), re.MULTILINE)
    return excerpt


def all_cells() -> list[object]:
    return [
        pytest.param(
            name,
            cell,
            id=f"{name}-{cell}",
            marks=[] if cell in IN_EVERY_RUN.get(name, ()) else [pytest.mark.slow],
        )
        for name in FAMILIES
        for cell in CELLS
    ]


@pytest.fixture(scope="module")
def trained(
    family_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Family, int], Trained]:
    """`trained(family, rank)` is the family's fine-tuned model, or the refusal, raised again."""
    kept: dict[tuple[str, int], Trained | Refused] = {}

    def train(family: Family, rank: int = 0) -> Trained:
        key = (family.name, rank)
        if key not in kept:
            folder = tmp_path_factory.mktemp(family.name)
            try:
                kept[key] = cells.train(family, family_folder(family.name), folder, rank=rank)
            except Refused as error:
                kept[key] = error
        result = kept[key]
        if isinstance(result, Refused):
            raise result
        return result

    return train


@pytest.mark.parametrize(("name", "cell"), all_cells())
def test_a_cell_does_what_the_page_says(
    name: str,
    cell: str,
    family_folder: Callable[[str], Path],
    trained: Callable[[Family, int], Trained],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    family, entry = FAMILIES[name], table()[name]

    def run() -> None:
        base = family_folder(name)
        if cell in ("full", "LoRA"):
            result = trained(family, 8 if cell == "LoRA" else 0)
            check_trained(family, base, result)
            assert entry["rows"] == ("padded" if result.is_padded else "packed")
            return
        policy = base if family.masked else trained(family, 0).folder
        match cell:
            case "reward":
                role_cells.reward(family, policy, tmp_path / "full")
                role_cells.reward(family, policy, tmp_path / "LoRA", rank=4)
            case "PPO":
                role_cells.ppo(family, policy, tmp_path / "full")
                role_cells.ppo(family, policy, tmp_path / "LoRA", rank=4)
            case "eval":
                role_cells.evaluation(family, policy)
            case "chat":
                role_cells.chat(family, policy, monkeypatch, capsys)

    if (reason := refusal(entry[cell])) is not None:
        with pytest.raises(Refused, match=re.escape(reason)):
            run()
    else:
        assert entry[cell] == "yes"
        run()


def check_trained(family: Family, base: Path, result: Trained) -> None:
    """The export has the loss that training reported, stops, and answers as it learned."""
    model = cells.plain_model(family, result.folder)
    alone = cells.loss_of_each_row_alone(model, result.batch)
    assert result.loss == pytest.approx(alone, abs=cells.TOLERANCE)
    if result.adapter is not None and not result.vocabulary_changed:
        cells.check_adapter_equals_merged(family, base, result, model)
    if family.masked:
        return
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends)
    assert set(result.last_targets) <= ends
    assert cells.base_ends(base) <= ends
    if result.adapter is None:
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
            found, stopped = cells.plain_answer(family, model, result.folder, question)
            assert found == cells.as_the_tokenizer_spells(result.folder, answer)
            assert stopped


def test_the_page_lists_every_family_and_cell() -> None:
    assert list(table()) == list(FAMILIES)
    assert {tuple(row) for row in table().values()} == {("family", "rows", *CELLS)}
