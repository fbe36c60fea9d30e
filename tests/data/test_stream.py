from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medgpt.data.encode import Encoded
from medgpt.data.order import num_chunks
from medgpt.data.records import Origin
from medgpt.data.shards import ShardWriter, data_version, write_index
from medgpt.data.stream import (
    Plan,
    Row,
    Step,
    StreamSpec,
    assemble,
    training_stream,
    unpack,
    validation_rows,
)
from medgpt.runs import Folder, commit

MAX_LENGTH = 32
NUM_SAMPLES = 240


def sample_tokens(number: int) -> list[int]:
    """Token t of sample n is 1000 * n + t, so a token tells where it comes from."""
    length = 1 + (number * 37) % 90
    return [1000 * number + t for t in range(length)]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> StreamSpec:
    """Three shards, a validation split, two epochs."""
    folder = Folder(str(tmp_path_factory.mktemp("data")))
    files = []
    for split, numbers in (("train", range(NUM_SAMPLES)), ("validation", range(240, 270))):
        names = []
        for shard, part in enumerate(np.array_split(numbers, 3)):
            with ShardWriter(folder, f"{split}-{shard}.parquet") as writer:
                for n in part.tolist():
                    ids = np.array(sample_tokens(n), np.int32)
                    encoded = Encoded(input_ids=ids, targets=ids % 1000 > 3)
                    origin = Origin(source="s", file="f", row=n)
                    writer.add(encoded, content_hash=f"{n:032x}", source=shard % 2, origin=origin)
            names += [file.name for file in writer.files]
            files += writer.files
        files += write_index(folder, split, names)
    commit(folder, files)
    return StreamSpec(
        data_url=folder.url,
        max_length=MAX_LENGTH,
        global_batch_size=12,
        seed=0,
        epochs=2,
        max_steps=None,
        weights=None,
    )


def stream(plan: Plan, *, rank: int, world_size: int, start: int) -> Iterator[tuple[int, Row]]:
    """(step, row) of a worker, as its training stream, but in this process."""
    table = plan.table(rank=rank, world_size=world_size, start=start)
    url = plan.spec.data_url
    if table.num_rows:
        yield from unpack(assemble(table, url=url, split="train", version=data_version(url)))


def batches(plan: Plan, *, world_size: int, start: int = 0) -> dict[int, list[tuple[int, ...]]]:
    """step -> the token tuples of its rows, sorted, over all workers."""
    steps: dict[int, list[tuple[int, ...]]] = {s: [] for s in range(start, plan.num_steps)}
    for rank in range(world_size):
        for step, row in stream(plan, rank=rank, world_size=world_size, start=start):
            steps[step].append(tuple(row.input_ids.tolist()))
    return {step: sorted(rows) for step, rows in steps.items()}


def pieces(row: Row) -> Iterator[tuple[str, int, list[int]]]:
    stops = np.cumsum(row.lengths)
    for i, stop in enumerate(stops):
        ids = row.input_ids[stop - row.lengths[i] : stop].tolist()
        yield row.sample_ids[i], row.chunks[i], ids


def test_rows_hold_the_tokens_of_their_chunks(spec: StreamSpec) -> None:
    plan = Plan(spec)
    numbers = {name.decode(): n for n, name in enumerate(plan.index.sample_id)}
    for _, row in stream(plan, rank=0, world_size=1, start=0):
        assert row.targets.tolist() == [token % 1000 > 3 for token in row.input_ids]
        for name, chunk, ids in pieces(row):
            start = chunk * (MAX_LENGTH - 1)
            assert ids == sample_tokens(numbers[name])[start : start + MAX_LENGTH]


def test_every_epoch_trains_every_target_once(spec: StreamSpec) -> None:
    plan = Plan(spec)
    expected = sorted(t for n in range(NUM_SAMPLES) for t in sample_tokens(n)[1:])
    trained: dict[int, list[int]] = {0: [], 1: []}
    chunks: dict[int, int] = {0: 0, 1: 0}
    for step, row in stream(plan, rank=0, world_size=1, start=0):
        for _, _, ids in pieces(row):
            trained[plan.epoch_of(step)] += ids[1:]
            chunks[plan.epoch_of(step)] += 1
    assert [sorted(tokens) for tokens in trained.values()] == [expected, expected]
    assert set(chunks.values()) == {num_chunks(plan.index.length, MAX_LENGTH).sum()}


def test_epochs_come_in_another_order(spec: StreamSpec) -> None:
    steps = batches(Plan(spec), world_size=1)
    assert steps[0] != steps[len(steps) // 2]


def test_only_the_last_batch_of_an_epoch_is_short(spec: StreamSpec) -> None:
    plan = Plan(replace(spec, global_batch_size=7))
    sizes = [len(rows) for rows in batches(plan, world_size=1).values()]
    assert sizes == [plan.batch_rows(step) for step in range(plan.num_steps)]
    ends = [step for step, size in enumerate(sizes) if size < 7]
    assert ends == [plan.first_step[1] - 1, plan.first_step[2] - 1]
    assert all(sizes)


@settings(deadline=None, max_examples=25)
@given(world_size=st.integers(1, 8), start=st.integers(0, 30))
def test_a_global_batch_is_the_same_on_any_number_of_workers_from_any_step(
    spec: StreamSpec, world_size: int, start: int
) -> None:
    plan = Plan(spec)
    whole = batches(plan, world_size=1)
    resumed = batches(plan, world_size=world_size, start=min(start, plan.num_steps))
    assert resumed == {step: rows for step, rows in whole.items() if step >= start}


def test_workers_shares_differ_by_one_row_at_most(spec: StreamSpec) -> None:
    plan = Plan(spec)
    shares = np.zeros((5, plan.num_steps), int)
    for rank in range(5):
        for step, _ in stream(plan, rank=rank, world_size=5, start=0):
            shares[rank, step] += 1
    assert (np.ptp(shares, axis=0) <= 1).all()
    assert shares.max(0).tolist() == [-(-plan.batch_rows(s) // 5) for s in range(plan.num_steps)]


@pytest.mark.parametrize("max_steps", [1, 9, 10_000])
def test_max_steps_cuts_the_plan_and_changes_nothing_before(
    spec: StreamSpec, max_steps: int
) -> None:
    whole, cut = Plan(spec), Plan(replace(spec, max_steps=max_steps))
    assert cut.num_steps == min(max_steps, whole.num_steps)
    steps = batches(cut, world_size=2)
    assert steps == {s: r for s, r in batches(whole, world_size=2).items() if s < max_steps}


def test_weights_decide_the_shares_of_an_epoch(spec: StreamSpec) -> None:
    plan = Plan(replace(spec, weights=(1.0, 3.0), epochs=1))
    sources = dict(zip(plan.index.sample_id.astype(str), plan.index.source, strict=True))
    tokens = [0, 0]
    for _, row in stream(plan, rank=0, world_size=1, start=0):
        for name, chunk, ids in pieces(row):
            tokens[sources[name]] += len(ids) - (chunk > 0)
    assert abs(tokens[1] / sum(tokens) - 0.75) < 0.005 * 0.75


def test_the_plan_depends_on_the_seed_only_through_its_order(spec: StreamSpec) -> None:
    one, two = (batches(Plan(replace(spec, seed=seed)), world_size=1) for seed in (0, 1))
    assert one[0] != two[0]


def flat(steps: list[Step]) -> list[tuple[int, list[list[int]]]]:
    return [(step.step, [row.input_ids.tolist() for row in step.rows]) for step in steps]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_ray_data_delivers_the_plan_in_its_order(spec: StreamSpec) -> None:
    plan = Plan(spec)
    for rank, world_size, start in ((0, 1, 0), (1, 2, 9)):
        steps = list(training_stream(plan, rank=rank, world_size=world_size, start=start))
        assert [step.step for step in steps] == list(range(start, plan.num_steps))
        assert [step.epoch for step in steps] == [plan.epoch_of(s.step) for s in steps]
        rows = [
            (s, r.input_ids.tolist())
            for s, r in stream(plan, rank=rank, world_size=world_size, start=start)
        ]
        assert [(s, ids) for s, lists in flat(steps) for ids in lists] == rows
        for step in steps:
            assert step.num_rows == -(-plan.batch_rows(step.step) // world_size)
    assert list(training_stream(plan, rank=0, world_size=1, start=plan.num_steps)) == []


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_worker_without_rows_still_gets_every_step(spec: StreamSpec) -> None:
    plan = Plan(replace(spec, global_batch_size=2, max_steps=3))
    steps = list(training_stream(plan, rank=2, world_size=3, start=0))
    assert [(step.step, step.rows, step.num_rows) for step in steps] == [
        (0, [], 1),
        (1, [], 1),
        (2, [], 1),
    ]


def test_validation_rows_are_shared_among_workers(spec: StreamSpec) -> None:
    def rows(world_size: int, limit: int) -> list[list[int]]:
        return sorted(
            row.input_ids.tolist()
            for rank in range(world_size)
            for row in validation_rows(spec, rank=rank, world_size=world_size, limit=limit)
        )

    everything = rows(1, 10_000)
    held_out = sorted(t for n in range(240, 270) for t in sample_tokens(n))
    assert sorted({token for row in everything for token in row}) == held_out
    assert rows(2, 10_000) == everything
    assert rows(2, 5) == rows(1, 5)
    assert len(rows(2, 5)) == 5
