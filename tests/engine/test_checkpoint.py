import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import nn

from medgpt.engine.checkpoint import assign_owners
from tests.engine.cases import (
    EngineSetup,
    load_and_train,
    new_engine,
    reference,
    run_all,
    train,
    train_and_save,
    train_step,
)
from tests.engine.test_engine import assert_equal

TwoRanks = Callable[..., list[Any]]
CASES = [
    EngineSetup(0),
    EngineSetup(1),
    EngineSetup(2),
    EngineSetup(3),
    EngineSetup(2, offload=True),
    EngineSetup(3, offload=True),
]
NEXT = [*CASES[1:], CASES[0]]
TWOS, THREES = [2] * len(CASES), [3] * len(CASES)


@pytest.fixture(scope="module")
def one_rank_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Save a checkpoint after two steps at every ZeRO stage."""
    folder = tmp_path_factory.mktemp("one")
    directories = [folder / str(case) for case in CASES]
    run_all(train_and_save, CASES, TWOS, directories)
    return directories


@pytest.fixture(scope="module")
def two_rank_checkpoints(
    tmp_path_factory: pytest.TempPathFactory, two_ranks: TwoRanks
) -> list[Path]:
    folder = tmp_path_factory.mktemp("two")
    directories = [folder / str(case) for case in CASES]
    two_ranks(run_all, train_and_save, CASES, TWOS, directories)
    return directories


def after_resuming(expected: Any) -> Any:
    expected.losses, expected.norms = expected.losses[2:], expected.norms[2:]
    return expected


def test_one_rank_resumes_as_if_never_interrupted(one_rank_checkpoints: list[Path]) -> None:
    for case, directory in zip(CASES, one_rank_checkpoints, strict=True):
        assert_equal(load_and_train(case, 3, directory), after_resuming(train(case, 5)), 1e-7)


def test_two_ranks_resume_as_if_never_interrupted(
    two_rank_checkpoints: list[Path], two_ranks: TwoRanks
) -> None:
    outcomes, _ = two_ranks(run_all, load_and_train, CASES, THREES, two_rank_checkpoints)
    for outcome in outcomes:
        assert_equal(outcome, after_resuming(reference(5)), 5e-6)


def test_two_ranks_resume_a_checkpoint_of_one_rank_at_another_stage(
    one_rank_checkpoints: list[Path], two_ranks: TwoRanks
) -> None:
    outcomes, _ = two_ranks(run_all, load_and_train, NEXT, THREES, one_rank_checkpoints)
    for outcome in outcomes:
        assert_equal(outcome, after_resuming(reference(5)), 1e-5)


def test_one_rank_resumes_a_checkpoint_of_two_ranks_at_another_stage(
    two_rank_checkpoints: list[Path],
) -> None:
    for case, directory in zip(NEXT, two_rank_checkpoints, strict=True):
        assert_equal(load_and_train(case, 3, directory), after_resuming(reference(5)), 1e-5)


def test_bf16_resumes_exactly_from_its_master_weights(tmp_path: Path) -> None:
    for stage in (1, 2, 3):
        case = EngineSetup(stage, precision="bf16")
        train_and_save(case, 2, tmp_path / str(stage))
        resumed = load_and_train(case, 1, tmp_path / str(stage))
        assert_equal(resumed, after_resuming(train(case, 3)), 1e-7)


def test_a_checkpoint_from_before_the_first_step_restores_it(tmp_path: Path) -> None:
    for stage in range(4):
        train_and_save(EngineSetup(stage), 0, tmp_path / str(stage))
        assert_equal(load_and_train(EngineSetup(stage), 2, tmp_path / str(stage)), reference(2))


def test_further_training_does_not_change_a_snapshot(tmp_path: Path) -> None:
    for stage in range(4):
        engine = new_engine(EngineSetup(stage))
        done = [train_step(engine, step) for step in range(2)]
        snapshot = engine.snapshot()
        train_step(engine, 2)
        snapshot.write(tmp_path / str(stage))
        resumed = load_and_train(EngineSetup(stage), 1, tmp_path / str(stage))
        assert_equal(resumed, after_resuming(train(EngineSetup(stage), 3)), 1e-7)
        assert len(done) == engine.steps - 1 == 2


def test_two_ranks_write_whole_fp32_tensors_into_balanced_files(
    two_rank_checkpoints: list[Path],
) -> None:
    params = {name for name, _ in new_engine(EngineSetup(0)).module.named_parameters()}
    for directory in two_rank_checkpoints:
        files = sorted(directory.glob("*.safetensors"))
        names = [f"rank-0000{r}-of-00002.safetensors" for r in (0, 1)]
        assert [f.name for f in files] == names
        assert {path.name for path in directory.iterdir()} == {*names, "engine.json"}
        sizes = [file.stat().st_size for file in files]
        assert max(sizes) < 1.6 * min(sizes)  # three layers are large
        shapes: dict[str, list[int]] = {}
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a mapping
                    part = tensors.get_slice(key)
                    assert key not in shapes
                    assert part.get_dtype() == "F32"
                    shapes[key] = part.get_shape()
        kinds = ("weight", "exp_avg", "exp_avg_sq")
        assert shapes.keys() == {f"{kind}/{name}" for kind in kinds for name in params}
        assert shapes["exp_avg/inner.weight"] == [5, 3]
        counts = json.loads((directory / "engine.json").read_text("utf-8"))
        assert counts == {"steps": 2, "adam_steps": 2}


def test_owners_are_balanced_by_size_and_do_not_depend_on_order() -> None:
    sizes = {"a": 2, "b": 7, "c": 4, "d": 3, "e": 4}
    owners = assign_owners(sizes, 2)
    # b(7) -> 0, c(4) -> 1, e(4) -> 1, d(3) -> 0, a(2) -> 1
    assert owners == {"b": 0, "c": 1, "e": 1, "d": 0, "a": 1}
    assert assign_owners(dict(reversed(sizes.items())), 2) == owners


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    train_and_save(EngineSetup(0), 0, tmp_path)
    other = new_engine(EngineSetup(0), nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="another model"):
        other.load(tmp_path)
