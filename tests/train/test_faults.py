"""A rank is killed at each step of writing a checkpoint and around each collective."""

import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from medgpt.artifacts import committed
from medgpt.config.stages import PretrainConfig
from medgpt.runs import Run
from medgpt.train.preparation import prepare
from tests.train.audit_log import assert_every_chunk_once
from tests.train.fault_injection import FaultPoint, recorded_points, run_ranks
from tests.train.test_resume import train_losses
from tests.train.tiny_configs import pretrain_config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]
CHECKPOINT_EVERY = 8  # steps; the kill comes at the second checkpoint
NUM_QUICK_POINTS = 5


@dataclass
class UninterruptedRun:
    """An uninterrupted run: its prepared folder, losses and fault points."""

    prepared: Path
    corpus: Path
    losses: dict[int, float]
    points: list[FaultPoint]

    def config(self, folder: Path) -> PretrainConfig:
        return make_config(folder, self.corpus)


def make_config(folder: Path, corpus: Path) -> PretrainConfig:
    train_section = {
        "checkpoint_every": CHECKPOINT_EVERY,
        "eval_every": 100,
        "keep_checkpoints": 1,
        "epochs": 1,
    }
    return pretrain_config(folder, corpus, train=train_section)


@pytest.fixture(scope="module")
def uninterrupted(
    ray_session: None, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> UninterruptedRun:
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = make_config(folder / "run", tiny_corpus)
    run = Run.open("pretrain", config, run_dir=config.run.dir, allow_changes=False)
    data = prepare(run, config, lambda *_: None).data
    run.update_manifest(data={k: v for k, v in data.items() if k != "files"})
    shutil.copytree(run.folder.url, folder / "prepared")
    assert run_ranks(config, folder) == [0, 0], rank_logs(folder)
    assert_every_chunk_once(run)
    return UninterruptedRun(
        folder / "prepared", tiny_corpus, train_losses(run), recorded_points(folder)
    )


def rank_logs(folder: Path) -> str:
    return "\n".join(path.read_text("utf-8")[-3000:] for path in folder.glob("rank-*.log"))


def fault_points(uninterrupted: UninterruptedRun) -> list[FaultPoint]:
    """Return the fault points of each rank from its second to its third checkpoint: all file
    events, half of a written file, and before and after the first collective of each kind."""
    chosen = []
    for rank in range(2):
        rank_points = [point for point in uninterrupted.points if point.rank == rank]
        names = [point.what for point in rank_points]
        start = next(
            i for i, name in enumerate(names) if name.endswith(f"step-{2 * CHECKPOINT_EVERY:08d}")
        )
        third = [i for i, name in enumerate(names) if f"step-{3 * CHECKPOINT_EVERY:08d}" in name]
        window = rank_points[start : third[0] if third else None]
        files = [point for point in window if point.kind == "file"]
        chosen += files
        chosen.append(replace(files[0], kind="write"))
        seen: set[str] = set()
        for point in window:
            if point.kind == "before" and point.what not in seen:
                seen.add(point.what)
                chosen += [point, replace(point, kind="after")]
    return chosen


def assert_survives(uninterrupted: UninterruptedRun, folder: Path, point: FaultPoint) -> None:
    """A run killed at `point` leaves only complete checkpoints and resumes with equal losses."""
    shutil.copytree(uninterrupted.prepared, folder / "run")
    config = uninterrupted.config(folder / "run")
    run = Run(config.run.dir)
    codes = run_ranks(config, folder, point)
    assert codes[point.rank] in (-signal.SIGKILL, -signal.SIGXFSZ), f"{point} did not happen"
    assert codes[1 - point.rank] != 0, f"the other rank continued after {point}"
    newest = run.newest_checkpoint()
    assert newest is not None
    assert newest[1]["position"]["step"] in (CHECKPOINT_EVERY, 2 * CHECKPOINT_EVERY), point
    for step in run.checkpoint_steps():
        complete = committed(run.checkpoint(step))
        assert complete is None or committed(run.checkpoint(step), verify=True), point
    assert run_ranks(config, folder) == [0, 0], f"{point}\n{rank_logs(folder)}"
    assert train_losses(run) == pytest.approx(uninterrupted.losses, abs=1e-6), point
    assert_every_chunk_once(run)
    assert run.checkpoint_steps() == [max(uninterrupted.losses)], (
        point
    )  # nothing half-written stays


def test_a_death_inside_a_write_commit_or_collective_loses_no_step(
    uninterrupted: UninterruptedRun, tmp_path: Path
) -> None:
    points = fault_points(uninterrupted)
    kinds = [
        next(p for p in points if p.kind == "write" and p.rank == 1),  # half a file
        next(p for p in points if p.what.startswith("open") and "manifest" in p.what),
        next(p for p in points if p.what.startswith("os.rename")),  # the manifest is written
        next(p for p in points if p.what.startswith("shutil.rmtree")),  # it is committed
        next(p for p in points if p.kind == "after" and "all_gather_object" in p.what),
    ]
    assert len(kinds) == NUM_QUICK_POINTS
    for number, point in enumerate(kinds):
        print(point)
        (tmp_path / str(number)).mkdir()
        assert_survives(uninterrupted, tmp_path / str(number), point)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_death_at_any_moment_loses_no_step(
    uninterrupted: UninterruptedRun, tmp_path: Path, rank: int
) -> None:
    points = [point for point in fault_points(uninterrupted) if point.rank == rank]
    assert {p.kind for p in points} == {"file", "write", "before", "after"}
    for number, point in enumerate(points):
        print(point)
        (tmp_path / str(number)).mkdir()
        assert_survives(uninterrupted, tmp_path / str(number), point)
