from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medgpt.artifacts import Folder, commit
from medgpt.data.loader import plan as plan_module
from medgpt.data.loader import stream as stream_module
from medgpt.data.loader.epoch_order import VALIDATION
from medgpt.data.loader.plan import Plan, PlanSettings, find_plan, make_plan
from medgpt.data.loader.stream import (
    PackedRow,
    StepRows,
    assemble_rows,
    read_first_rows,
    training_stream,
    unpack_rows,
)
from medgpt.data.sources.records import Origin
from medgpt.data.tokenized.encode import EncodedSample
from medgpt.data.tokenized.index import SampleIndex, num_chunks
from medgpt.data.tokenized.shards import ShardWriter, data_version, read_index, write_index

MAX_LENGTH = 32
NUM_SAMPLES = 240


def sample_tokens(number: int) -> list[int]:
    """Token t of sample n is 1000 * n + t, so that every token identifies its origin."""
    length = 1 + (number * 37) % 90
    return [1000 * number + t for t in range(length)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three shards and a validation split."""
    folder = Folder(str(tmp_path_factory.mktemp("data")))
    files = []
    for split, numbers in (("train", range(NUM_SAMPLES)), ("validation", range(240, 270))):
        names = []
        for shard, part in enumerate(np.array_split(numbers, 3)):
            with ShardWriter(folder, f"{split}-{shard}.parquet") as writer:
                for n in part.tolist():
                    ids = np.array(sample_tokens(n), np.int32)
                    encoded = EncodedSample(input_ids=ids, targets=ids % 1000 > 3)
                    origin = Origin(source="s", file="f", row=n)
                    writer.add(encoded, content_hash=f"{n:032x}", source=shard % 2, origin=origin)
            names += [file.name for file in writer.files]
            files += writer.files
        files += write_index(folder, split, names)
    commit(folder, files)
    return folder.url


MakePlan = Callable[..., Plan]


@pytest.fixture(scope="module")
def planned(data: str, tmp_path_factory: pytest.TempPathFactory) -> MakePlan:
    """Makes a plan, of two epochs by default."""

    def make(
        *, global_batch_size: int = 12, max_steps: int | None = None, **changes: object
    ) -> Plan:
        order = PlanSettings(
            data_version=data_version(data),
            max_length=MAX_LENGTH,
            seed=0,
            epochs=2,
            weights=None,
            max_rows=None,
        )._replace(**changes)
        url = str(tmp_path_factory.mktemp("plan"))
        make_plan(url, data, order)
        return Plan(url, global_batch_size=global_batch_size, max_steps=max_steps)

    return make


@pytest.fixture(scope="module")
def plan(planned: MakePlan) -> Plan:
    return planned()


@pytest.fixture(scope="module")
def index(data: str) -> SampleIndex:
    return read_index(Folder(data), "train")


def stream(
    plan: Plan, data: str, *, rank: int, world_size: int, start: int
) -> Iterator[tuple[int, PackedRow]]:
    """(step, row) of a worker, as in its training stream, but without Ray."""
    for plan_rows in plan.read(rank=rank, world_size=world_size, start=start):
        if plan_rows.num_rows:
            batch = assemble_rows(plan_rows, url=data, split="train", version=plan.data_version)
            yield from unpack_rows(batch)


def batches(
    plan: Plan, data: str, *, world_size: int, start: int = 0
) -> dict[int, list[tuple[int, ...]]]:
    """step -> the token tuples of its rows, sorted, over all workers."""
    steps: dict[int, list[tuple[int, ...]]] = {s: [] for s in range(start, plan.num_steps)}
    for rank in range(world_size):
        for step, row in stream(plan, data, rank=rank, world_size=world_size, start=start):
            steps[step].append(tuple(row.input_ids.tolist()))
    return {step: sorted(rows) for step, rows in steps.items()}


def row_chunks(row: PackedRow) -> Iterator[tuple[str, int, list[int]]]:
    stops = np.cumsum(row.lengths)
    for i, stop in enumerate(stops):
        ids = row.input_ids[stop - row.lengths[i] : stop].tolist()
        yield row.sample_ids[i], row.chunks[i], ids


def test_rows_hold_the_tokens_of_their_chunks(plan: Plan, data: str, index: SampleIndex) -> None:
    numbers = {name.decode(): n for n, name in enumerate(index.sample_id)}
    for _, row in stream(plan, data, rank=0, world_size=1, start=0):
        assert row.targets.tolist() == [token % 1000 > 3 for token in row.input_ids]
        assert row.repeat == [0] * len(row.chunks)
        for name, chunk, ids in row_chunks(row):
            start = chunk * (MAX_LENGTH - 1)
            assert ids == sample_tokens(numbers[name])[start : start + MAX_LENGTH]


def test_every_epoch_trains_every_target_once(plan: Plan, data: str, index: SampleIndex) -> None:
    expected = sorted(t for n in range(NUM_SAMPLES) for t in sample_tokens(n)[1:])
    trained: dict[int, list[int]] = {0: [], 1: []}
    chunks: dict[int, int] = {0: 0, 1: 0}
    for step, row in stream(plan, data, rank=0, world_size=1, start=0):
        for _, _, ids in row_chunks(row):
            trained[plan.epoch_of(step)] += ids[1:]
            chunks[plan.epoch_of(step)] += 1
    assert [sorted(tokens) for tokens in trained.values()] == [expected, expected]
    assert set(chunks.values()) == {num_chunks(index.length, MAX_LENGTH).sum()}


def test_every_epoch_has_another_order(plan: Plan, data: str) -> None:
    steps = batches(plan, data, world_size=1)
    assert steps[0] != steps[len(steps) // 2]


def test_only_the_last_batch_of_an_epoch_is_short(planned: MakePlan, data: str) -> None:
    plan = planned(global_batch_size=7)
    sizes = [len(rows) for rows in batches(plan, data, world_size=1).values()]
    assert sizes == [plan.batch_rows(step) for step in range(plan.num_steps)]
    ends = [step for step, size in enumerate(sizes) if size < 7]
    assert ends == [plan.first_step[1] - 1, plan.first_step[2] - 1]
    assert all(sizes)


@settings(deadline=None, max_examples=25)
@given(world_size=st.integers(1, 8), start=st.integers(0, 30))
def test_a_global_batch_is_the_same_on_any_number_of_workers_from_any_step(
    plan: Plan, data: str, world_size: int, start: int
) -> None:
    uninterrupted = batches(plan, data, world_size=1)
    resumed = batches(plan, data, world_size=world_size, start=min(start, plan.num_steps))
    assert resumed == {step: rows for step, rows in uninterrupted.items() if step >= start}


def test_unpacked_samples_stream_like_packed_rows(planned: MakePlan, data: str) -> None:
    plan = planned(max_length=None)
    seen: dict[int, list[str]] = {0: [], 1: []}
    for rank in range(3):
        for step, row in stream(plan, data, rank=rank, world_size=3, start=0):
            ((name, _, ids),) = row_chunks(row)
            assert ids == sample_tokens(ids[0] // 1000)
            seen[plan.epoch_of(step)].append(name)
    assert [len(set(names)) for names in seen.values()] == [NUM_SAMPLES, NUM_SAMPLES]
    assert [len(names) for names in seen.values()] == [NUM_SAMPLES, NUM_SAMPLES]


def test_answers_and_prompts_stream_with_their_optional_columns(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "data"))
    several = {
        "sequence_lengths": np.array([2, 3], np.int32),
        "grades": np.array([1, 0], np.float32),
    }
    files = []
    for split, extras in (("train", several), ("validation", {"messages": '[["user", "q"]]'})):
        with ShardWriter(folder, f"{split}-0.parquet") as writer:
            for n in range(3):
                ids = np.arange(5, dtype=np.int32) + 10 * n
                encoded = EncodedSample(input_ids=ids, targets=ids > 2, **extras)
                origin = Origin(source="s", file="f", row=n)
                writer.add(encoded, content_hash=f"{n:032x}", source=0, origin=origin)
        files += [*writer.files, *write_index(folder, split, [f"{split}-0.parquet"])]
    commit(folder, files)
    order = PlanSettings(
        data_version(folder.url), None, seed=0, epochs=1, weights=None, max_rows=None
    )
    make_plan(str(tmp_path / "plan"), folder.url, order)
    plan = Plan(str(tmp_path / "plan"), global_batch_size=2, max_steps=None)

    answers = read_first_rows(plan, folder.url, epoch=0, rank=0, world_size=1, limit=9)
    prompts = read_first_rows(plan, folder.url, epoch=VALIDATION, rank=0, world_size=1, limit=9)

    assert sorted(row.input_ids[0] for row in answers) == [0, 10, 20]
    for row in answers:
        assert row.sequence_lengths is not None
        assert row.grades is not None
        assert (row.sequence_lengths.tolist(), row.grades.tolist()) == ([2, 3], [1.0, 0.0])
        assert row.messages is None
    assert [row.messages for row in prompts] == ['[["user", "q"]]'] * 3
    assert [row.sequence_lengths for row in prompts] == [None] * 3


def test_shares_of_workers_differ_by_at_most_one_row(plan: Plan, data: str) -> None:
    shares = np.zeros((5, plan.num_steps), int)
    for rank in range(5):
        for step, _ in stream(plan, data, rank=rank, world_size=5, start=0):
            shares[rank, step] += 1
    assert (np.ptp(shares, axis=0) <= 1).all()
    assert shares.max(0).tolist() == [-(-plan.batch_rows(s) // 5) for s in range(plan.num_steps)]


@pytest.mark.parametrize("max_steps", [1, 9, 10_000])
def test_max_steps_ends_the_plan_early_and_changes_no_earlier_step(
    plan: Plan, planned: MakePlan, data: str, max_steps: int
) -> None:
    cut = planned(max_steps=max_steps, max_rows=max_steps * 12)
    assert cut.num_steps == min(max_steps, plan.num_steps)
    assert len(cut.num_rows) == (1 if max_steps < plan.first_step[1] else 2)
    steps = batches(cut, data, world_size=2)
    assert steps == {s: r for s, r in batches(plan, data, world_size=2).items() if s < max_steps}


def test_weights_decide_the_shares_of_an_epoch(
    planned: MakePlan, data: str, index: SampleIndex
) -> None:
    plan = planned(weights=(1.0, 3.0), epochs=1)
    sources = dict(zip(index.sample_id.astype(str), index.source, strict=True))
    tokens = [0, 0]
    for _, row in stream(plan, data, rank=0, world_size=1, start=0):
        for name, chunk, ids in row_chunks(row):
            tokens[sources[name]] += len(ids) - (chunk > 0)
    assert abs(tokens[1] / sum(tokens) - 0.75) < 0.005 * 0.75


def test_plans_of_two_seeds_hold_the_same_chunks_in_another_order(
    planned: MakePlan, data: str
) -> None:
    first, second = (batches(planned(seed=seed), data, world_size=1) for seed in (0, 1))
    assert first[0] != second[0]


def test_a_plan_is_reused_until_its_data_or_settings_change(data: str, tmp_path: Path) -> None:
    settings = PlanSettings("a", MAX_LENGTH, seed=3, epochs=1, weights=(1.0, 2.0), max_rows=None)
    url = str(tmp_path / "plan")
    assert find_plan(url, settings) is None
    make_plan(url, data, settings)
    manifest = find_plan(url, settings)
    assert manifest is not None
    (epoch,) = manifest["epochs"]
    assert epoch["num_tokens"] > 0.95 * epoch["num_rows"] * MAX_LENGTH
    for change in ({"seed": 4}, {"epochs": 2}, {"data_version": "b"}, {"weights": None}):
        assert find_plan(url, settings._replace(**change)) is None


def test_starting_late_reads_no_earlier_row_group_of_the_plan(
    planned: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "ROW_GROUP", 8)
    plan = planned(global_batch_size=4)
    whole = [part.num_rows for part in plan.read(rank=0, world_size=1, start=0)]
    late = [part.num_rows for part in plan.read(rank=0, world_size=1, start=plan.num_steps - 2)]
    assert max(whole) == 8
    assert len(whole) > 30
    assert len(late) <= 2


def flat(steps: list[StepRows]) -> list[tuple[int, list[list[int]]]]:
    return [(step.step, [row.input_ids.tolist() for row in step.rows]) for step in steps]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_ray_data_delivers_the_plan_in_its_order(
    plan: Plan, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plan.max_length is not None
    monkeypatch.setattr(stream_module, "TOKENS_PER_TASK", 8 * plan.max_length)
    monkeypatch.setattr(stream_module, "TASKS_PER_PIPELINE", 5)  # several pipelines in turn
    for rank, world_size, start in ((0, 1, 0), (1, 2, 9)):
        share = {"rank": rank, "world_size": world_size, "start": start}
        steps = list(training_stream(plan, data, **share))
        assert [step.step for step in steps] == list(range(start, plan.num_steps))
        assert [step.epoch for step in steps] == [plan.epoch_of(s.step) for s in steps]
        rows = [(s, r.input_ids.tolist()) for s, r in stream(plan, data, **share)]
        assert [(s, ids) for s, lists in flat(steps) for ids in lists] == rows
        for step in steps:
            assert step.num_rows == -(-plan.batch_rows(step.step) // world_size)
    assert list(training_stream(plan, data, rank=0, world_size=1, start=plan.num_steps)) == []


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_worker_without_rows_still_gets_every_step(planned: MakePlan, data: str) -> None:
    plan = planned(global_batch_size=2, max_steps=3)
    steps = list(training_stream(plan, data, rank=2, world_size=3, start=0))
    assert [(step.step, step.rows, step.num_rows) for step in steps] == [
        (0, [], 1),
        (1, [], 1),
        (2, [], 1),
    ]


def test_validation_rows_are_shared_among_workers(plan: Plan, data: str) -> None:
    def rows(world_size: int, limit: int) -> list[list[int]]:
        return sorted(
            row.input_ids.tolist()
            for rank in range(world_size)
            for row in read_first_rows(
                plan, data, epoch=VALIDATION, rank=rank, world_size=world_size, limit=limit
            )
        )

    all_rows = rows(1, 10_000)
    expected = sorted(t for n in range(240, 270) for t in sample_tokens(n))
    assert sorted({token for row in all_rows for token in row}) == expected
    assert rows(2, 10_000) == all_rows
    assert rows(2, 5) == rows(1, 5)
    assert len(rows(2, 5)) == 5
