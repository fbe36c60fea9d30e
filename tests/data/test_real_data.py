"""The real datasets load with configuration only, without code for any of them."""

import re
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

from medgpt.config.data import SourceConfig
from medgpt.config.loading import load
from medgpt.config.reward_model import RewardModelConfig
from medgpt.config.stages import PretrainConfig, SFTConfig
from medgpt.data.sources.deny_list import DenyList
from medgpt.data.sources.file_slices import list_slices
from medgpt.data.sources.readers import read_slice
from medgpt.data.sources.records import Conversation, Document, Preferences, Record, Reject

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
NAMES = {
    "pretrain": ["cmekg", "medquad", "tcm-shanghan"],
    "sft": [
        "huatuo",
        "toyhom",
        "cmdd",
        "cmtmedqa",
        "disc-med",
        "cpsycoun",
        "smile",
        "smile-depression",
        "emollm",
        "mts-dialog",
        "pubmedqa",
    ],
}
ALL = list(chain.from_iterable(NAMES.values()))

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not there"),
]


@cache
def sources() -> dict[str, SourceConfig]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # paths in the configs are relative to the repository
        pretrain = load(PretrainConfig, ROOT / "configs/real/pretrain.toml")
        sft = load(SFTConfig, ROOT / "configs/real/sft.toml")
    assert [s.name for s in pretrain.data.sources] == NAMES["pretrain"]
    assert [s.name for s in sft.data.sources] == NAMES["sft"]
    return {s.name: s for s in (*pretrain.data.sources, *sft.data.sources)}


@cache
def records(name: str) -> list[Record | Reject]:
    source = sources()[name]
    return [
        item for file_slice in list_slices(source, 32) for item in read_slice(file_slice, source)
    ]


@cache
def manifest_sources() -> dict[str, tuple[str, int]]:
    """file -> license and rows, as SOURCES.md lists them."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (DATA / "SOURCES.md").read_text("utf-8").splitlines()
        if re.match(r"\| \w+/", line)
    ]
    return {row[0]: (row[5], int(row[6])) for row in cells}


@pytest.mark.parametrize("name", ALL)
def test_every_row_is_a_record_or_a_counted_reject(name: str) -> None:
    items = records(name)
    [path] = sources()[name].paths
    license, rows = manifest_sources()[str(Path(path).resolve().relative_to(DATA.resolve()))]
    assert len(items) == rows
    assert [item.row for item in items] == list(range(1, rows + 1))
    malformed = sum(isinstance(item, Reject) for item in items)
    print(f"{name}: {rows} rows in, {rows - malformed} records, {malformed} rejects")
    assert malformed < 0.01 * rows
    assert license.startswith(sources()[name].license)


@pytest.mark.parametrize("name", ALL)
def test_the_stage_decides_between_documents_and_conversations(name: str) -> None:
    record_type = Document if name in NAMES["pretrain"] else Conversation
    assert all(isinstance(item, (record_type, Reject)) for item in records(name))


def test_real_patients_are_sensitive() -> None:
    sensitive = {name for name, source in sources().items() if source.sensitive}
    assert sensitive == {"cmdd", "toyhom", "huatuo", "smile", "smile-depression"}


@pytest.mark.parametrize("name", ["cmdd", "cpsycoun", "smile", "emollm", "cmtmedqa"])
def test_dialogues_keep_several_turns(name: str) -> None:
    turns = [len(r.messages) for r in records(name) if isinstance(r, Conversation)]
    assert sum(turns) / len(turns) > 4


def test_relations_read_as_sentences() -> None:
    first = records("cmekg")[0]
    assert isinstance(first, Document)
    assert first.text.startswith("13—三体综合征，又称Patau综合征。多见于新生儿。")
    assert "常见症状有" in first.text
    assert first.text.endswith("患者应到儿科就诊。")
    for item in records("cmekg"):
        assert isinstance(item, Document)
        # no list, key or empty clause of the raw row is left
        assert not re.search(r"[\[\]{}]'|': |。。|，。|有。|\n", item.text), item.row


def test_real_preferences_are_ranked_or_compare_nothing() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        reward = load(RewardModelConfig, ROOT / "configs/real/reward.toml")
    counts = {}
    for source in reward.data.sources:
        items = [item for part in list_slices(source, 32) for item in read_slice(part, source)]
        preferences = [item for item in items if isinstance(item, Preferences)]
        assert not any(isinstance(item, Reject) and item.malformed for item in items)
        counts[source.name] = (
            len(items),
            len(preferences),
            sum(len(item.answers) for item in preferences),
        )
    # most questions in counsel-chat have one answer; disc-cmd has six systems per patient
    assert counts == {"counsel-chat": (700, 179, 1033), "disc-cmd": (114, 114, 684)}


def test_few_records_break_the_deny_list() -> None:
    denied = {}
    for name in ALL:
        deny = DenyList.load(sources()[name].deny)
        valid = [r for r in records(name) if not isinstance(r, Reject)]
        denied[name] = sum(isinstance(deny.check(r), Reject) for r in valid) / len(valid)
    print({name: f"{share:.2%}" for name, share in denied.items()})
    assert max(denied.values()) < 0.03
    assert denied["toyhom"] > 0  # its first row promises to clear the blood of waste
