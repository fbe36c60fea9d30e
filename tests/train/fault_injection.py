"""Train on two ranks without Ray and kill one of them at a chosen moment.

Python's audit events mark each step of a write and commit; torch's collectives are wrapped.
Each rank reads its rows itself, because starting Ray would take most of the time.
"""

import datetime
import json
import multiprocessing as mp
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
COLLECTIVES = (
    *("all_reduce", "barrier", "broadcast_object_list", "all_gather_object", "broadcast"),
    *("all_gather_into_tensor", "reduce_scatter_tensor", "reduce"),
)
HALF_FILE_BYTES = 1 << 16  # bytes
TIMEOUT_S = 60
Kind = Literal["file", "write", "full", "before", "after"]


@dataclass(frozen=True)
class FaultPoint:
    """A moment of a rank: its `index`-th file event or collective.

    kind file: death before the event; write: death inside the write after it; full: from it on no
    file may be longer than HALF_FILE_BYTES; before, after: death around the collective.
    """

    rank: int
    kind: Kind
    index: int
    what: str


def run_ranks(
    config: Any, folder: Path, fault: FaultPoint | None = None, environment: Mapping[str, str] = {}
) -> list[int | None]:
    """Train and return the exit codes; the events of each rank are in `folder`/rank-N.json."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__, "medgpt.train.loop", "medgpt.train.lm_objective"])
    store = folder / "store"
    store.unlink(missing_ok=True)
    processes = [
        context.Process(target=_rank, args=(rank, store, config, folder, fault, environment))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(2 * TIMEOUT_S)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def recorded_points(folder: Path) -> list[FaultPoint]:
    """Return all moments of both ranks in order."""
    return [
        FaultPoint(rank, "file" if kind == "file" else "before", index, what)
        for rank in range(2)
        for kind, index, what in json.loads((folder / f"rank-{rank}.json").read_text("utf-8"))
    ]


def _rank(
    rank: int,
    store: Path,
    config: Any,
    folder: Path,
    fault: FaultPoint | None,
    environment: Mapping[str, str],
) -> None:
    os.environ.update(environment)
    with (folder / f"rank-{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if fault and fault.kind == "write":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it and gets an error instead
    injector = FaultInjector(fault if fault and fault.rank == rank else None)
    import torch
    import torch.distributed as dist

    from medgpt.runs import Run
    from medgpt.train import loop
    from medgpt.train.lm_objective import LanguageModelObjective
    from medgpt.train.preparation import TOKENIZER, load_tokenizer

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2, timeout=timeout
    )
    loop.training_stream = _training_stream_without_ray
    run, device = Run(config.run.dir), torch.device("cpu")
    objective = LanguageModelObjective(config, load_tokenizer((run.folder / TOKENIZER).url), device)
    injector.install()
    callbacks = {"progress": None, "is_preempted": lambda: False}
    loop.Trainer(run, config, objective, device=device, **callbacks).fit()
    (folder / f"rank-{rank}.json").write_text(json.dumps(injector.recorded), "utf-8")


def _training_stream_without_ray(plan: Any, data_url: str, **part: int | float) -> Iterator[Any]:
    """Yield the steps of `training_stream` without Ray Data."""
    from medgpt.data.loader import stream

    del part["data_cpus"]
    rows = (
        row
        for table in plan.read(**part)
        for row in stream.unpack_rows(
            stream.assemble_rows(table, url=data_url, split="train", version=plan.data_version)
        )
    )
    return stream._group_by_step(
        plan, rows, world_size=int(part["world_size"]), start=int(part["start"])
    )


class FaultInjector:
    """Records the moments of this process and kills it at the chosen one."""

    def __init__(self, fault: FaultPoint | None) -> None:
        self.fault = fault
        self.recorded: list[tuple[str, int, str]] = []
        self.num_file_events = self.num_collectives = 0

    def install(self) -> None:
        import torch.distributed as dist

        for name in COLLECTIVES:
            setattr(dist, name, self._wrap_collective(name, getattr(dist, name)))
        sys.addaudithook(self._on_file_event)

    def _on_file_event(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in FILE_EVENTS or "/checkpoints/" not in str(args[0]):
            return
        name = str(args[0]).split("/checkpoints/")[1]
        self.recorded.append(("file", self.num_file_events, f"{event} {name}"))
        index, self.num_file_events = self.num_file_events, self.num_file_events + 1
        if self.fault is None or self.fault.index != index:
            return
        if self.fault.kind == "file":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault.kind in ("write", "full"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (HALF_FILE_BYTES, resource.RLIM_INFINITY))

    def _wrap_collective(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            index, self.num_collectives = self.num_collectives, self.num_collectives + 1
            callers = [f.name for f in traceback.extract_stack() if "/medgpt/" in f.filename]
            self.recorded.append(("collective", index, f"{name} in {'.'.join(callers[-3:])}"))
            self._die_if_chosen("before", index)
            result = collective(*args, **kwargs)
            self._die_if_chosen("after", index)
            return result

        return call

    def _die_if_chosen(self, kind: Kind, index: int) -> None:
        if self.fault and (self.fault.kind, self.fault.index) == (kind, index):
            os.kill(os.getpid(), signal.SIGKILL)
