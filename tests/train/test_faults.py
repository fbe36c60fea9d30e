"""A rank dies at each step of writing and committing a checkpoint and in each collective."""

import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from medgpt.artifacts import committed
from medgpt.config.stages import PretrainConfig
from medgpt.runs import Run
from medgpt.train.preparation import prepare
from tests.train.audits import assert_every_chunk_once
from tests.train.cases import pretrain_config
from tests.train.ranks import Point, recorded, run_ranks
from tests.train.test_resume import train_losses

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]
EVERY = 8  # steps between checkpoints; the death comes at the second
IN_CI = 5


@dataclass
class Quiet:
    """A run that nothing happened to, what it did, and its state before the first step."""

    prepared: Path
    corpus: Path
    losses: dict[int, float]
    points: list[Point]

    def config(self, folder: Path) -> PretrainConfig:
        return config_of(folder, self.corpus)


def config_of(folder: Path, corpus: Path) -> PretrainConfig:
    every = {"checkpoint_every": EVERY, "eval_every": 100, "keep_checkpoints": 1, "epochs": 1}
    return pretrain_config(folder, corpus, train=every)


@pytest.fixture(scope="module")
def quiet(ray_session: None, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Quiet:
    folder = tmp_path_factory.mktemp("quiet")
    config = config_of(folder / "run", tiny_corpus)
    run = Run.open("pretrain", config, run_dir=config.run.dir, allow_changes=False)
    data = prepare(run, config, lambda *_: None).data
    run.update_manifest(data={k: v for k, v in data.items() if k != "files"})
    shutil.copytree(run.folder.url, folder / "prepared")
    assert run_ranks(config, folder) == [0, 0], logs(folder)
    assert_every_chunk_once(run)
    return Quiet(folder / "prepared", tiny_corpus, train_losses(run), recorded(folder))


def logs(folder: Path) -> str:
    return "\n".join(path.read_text("utf-8")[-3000:] for path in folder.glob("rank-*.log"))


def moments(quiet: Quiet) -> list[Point]:
    """Of each rank: all file events from the second checkpoint on to the third, the middle of its
    largest file, and before and after the first of each kind of collective from there on."""
    found = []
    for rank in range(2):
        mine = [point for point in quiet.points if point.rank == rank]
        names = [point.what for point in mine]
        first = next(i for i, name in enumerate(names) if name.endswith(f"step-{2 * EVERY:08d}"))
        third = [i for i, name in enumerate(names) if f"step-{3 * EVERY:08d}" in name]
        window = mine[first : third[0] if third else None]
        files = [point for point in window if point.kind == "file"]
        found += files
        found.append(replace(files[0], kind="write"))
        seen: set[str] = set()
        for point in window:
            if point.kind == "before" and point.what not in seen:
                seen.add(point.what)
                found += [point, replace(point, kind="after")]
    return found


def assert_survives(quiet: Quiet, folder: Path, point: Point) -> None:
    """The run dies at `point`, leaves complete checkpoints only, and continues as if it had not."""
    shutil.copytree(quiet.prepared, folder / "run")
    config = quiet.config(folder / "run")
    run = Run(config.run.dir)
    codes = run_ranks(config, folder, point)
    assert codes[point.rank] in (-signal.SIGKILL, -signal.SIGXFSZ), f"{point} did not happen"
    assert codes[1 - point.rank] != 0, f"the other rank went on without {point}"
    newest = run.newest_checkpoint()
    assert newest is not None
    assert newest[1]["position"]["step"] in (EVERY, 2 * EVERY), point
    for step in run.checkpoint_steps():
        complete = committed(run.checkpoint(step))
        assert complete is None or committed(run.checkpoint(step), verify=True), point
    assert run_ranks(config, folder) == [0, 0], f"{point}\n{logs(folder)}"
    assert train_losses(run) == pytest.approx(quiet.losses, abs=1e-6), point
    assert_every_chunk_once(run)
    assert run.checkpoint_steps() == [max(quiet.losses)], point  # nothing half-written stays


def test_a_death_inside_a_write_or_commit_or_collective_costs_nothing(
    quiet: Quiet, tmp_path: Path
) -> None:
    points = moments(quiet)
    kinds = [
        next(p for p in points if p.kind == "write" and p.rank == 1),  # half a file
        next(p for p in points if p.what.startswith("open") and "manifest" in p.what),
        next(p for p in points if p.what.startswith("os.rename")),  # the manifest is written
        next(p for p in points if p.what.startswith("shutil.rmtree")),  # it is committed
        next(p for p in points if p.kind == "after" and "all_gather_object" in p.what),
    ]
    assert len(kinds) == IN_CI
    for number, point in enumerate(kinds):
        print(point)
        (tmp_path / str(number)).mkdir()
        assert_survives(quiet, tmp_path / str(number), point)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_death_at_any_moment_costs_nothing(quiet: Quiet, tmp_path: Path, rank: int) -> None:
    points = [point for point in moments(quiet) if point.rank == rank]
    assert {p.kind for p in points} == {"file", "write", "before", "after"}
    for number, point in enumerate(points):
        print(point)
        (tmp_path / str(number)).mkdir()
        assert_survives(quiet, tmp_path / str(number), point)
