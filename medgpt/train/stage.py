"""A supervised stage from config to finished run: prepare, train on Ray Train, export."""

import threading
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue

from medgpt.config import ConfigError, TrainStageConfig
from medgpt.data.stream import StreamSpec
from medgpt.metrics import ConsoleReporter
from medgpt.runs import Run, commit, committed, entries
from medgpt.train import session
from medgpt.train.prepare import TOKENIZER, load_tokenizer, prepare


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """All that a worker is told."""

    run_dir: str
    config: TrainStageConfig
    progress: Queue


def run_stage(stage: str, config: TrainStageConfig) -> Run:
    """Run or resume `stage`; a finished run is returned as it is.

    Raises:
        ConfigError: whatever the user can repair, in words.
    """
    run = Run.open(
        stage, config, run_dir=config.run.dir, allow_changes=config.run.allow_changes
    )
    reporter = ConsoleReporter(stage)
    try:
        if run.finished:
            reporter.say(f"{run.folder.url} is finished; choose another run.dir to train again")
            return run
        reporter.say(f"run directory {run.folder.url}")
        session.connect(config.cluster)
        session.await_resources(config.cluster, reporter.say)
        data = prepare(run, config, reporter.advance)
        reporter.say(_describe(data))
        run.update_manifest(
            seed=config.run.seed,
            parents=_parents(config),
            data={key: value for key, value in data.items() if key != "files"},
        )
        _train(run, config, reporter)
        run.update_manifest(finished=True, timings=_timings(run))
        reporter.say(f"model in {run.model.url}")
    finally:
        reporter.close()
    return run


def _train(run: Run, config: TrainStageConfig, reporter: ConsoleReporter) -> None:
    """Start the workers and show their progress until they are done."""
    cluster = config.cluster
    resources = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    progress = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": WorkerJob(run_dir=run.folder.url, config=config, progress=progress)},
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={name: n for name, n in resources.items() if n},
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=run.folder.url,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
        ),
    )
    (run.folder / "ray").remove()  # Ray's own record of an earlier attempt is not to be resumed
    stop = threading.Event()
    refused: list[ConfigError] = []
    display = threading.Thread(
        target=_show, args=(progress, stop, config, reporter, refused), daemon=True
    )
    display.start()
    reporter.advance("starting workers", 0, cluster.num_workers)
    try:
        trainer.fit()
    finally:
        stop.set()
        display.join()
        progress.shutdown()
    if refused:
        raise refused[0]


def _show(
    progress: Queue,
    stop: threading.Event,
    config: TrainStageConfig,
    reporter: ConsoleReporter,
    refused: list[ConfigError],
) -> None:
    """Print what rank 0 reports, until `stop` and nothing is left; keep errors in `refused`."""
    latest: dict[str, float] = {}
    while True:
        try:
            item = progress.get(timeout=0.5)
        except Empty:
            if stop.is_set():
                return
            continue
        if isinstance(item, ConfigError):
            refused.append(item)
            continue
        step, total, metrics = item
        latest |= metrics
        facts = "  ".join(
            f"{label} {latest[name]:{form}}"
            for label, name, form in (
                ("loss", "train/loss", ".3f"),
                ("validation", "validation/loss", ".3f"),
                ("tokens/s", "train/tokens_per_s", ",.0f"),
            )
            if name in latest
        )
        due = step % config.train.log_every == 0 or step == total
        reporter.advance("training", step, total, facts, say=due and "train/loss" in metrics)


def train_worker(settings: dict[str, Any]) -> None:
    """Runs in each Ray Train worker.

    A ConfigError ends the training without a failure, because Ray Train would start again; it
    reaches the driver with the progress.
    """
    job: WorkerJob = settings["job"]
    try:
        _train_and_export(job, Run(job.run_dir))
    except ConfigError as error:
        job.progress.put(error)


def _train_and_export(job: WorkerJob, run: Run) -> None:
    import torch
    import torch.distributed as dist
    from ray.train.torch import get_device

    from medgpt.train.objective import Objective
    from medgpt.train.samples import write_samples
    from medgpt.train.worker import Trainer

    config, device = job.config, get_device()
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    tokenizer = load_tokenizer((run.folder / TOKENIZER).url)
    objective = Objective(config, tokenizer, device)
    trainer = Trainer(
        run, config, stream_spec(run, config), objective, device=device, progress=job.progress
    )
    trainer.fit()
    if committed(run.model) is None:
        with run.model.staging() as directory:
            objective.export(trainer.engine, Path(directory))
            dist.barrier()
            files = entries(directory) if dist.get_rank() == 0 else []
        if dist.get_rank() == 0:
            commit(run.model, files)
    if dist.get_rank() == 0 and config.report.prompts:
        write_samples(run, config, device)
    dist.barrier()


def stream_spec(run: Run, config: TrainStageConfig) -> StreamSpec:
    """The part of the config that decides the order of data."""
    weights = [source.weight for source in config.data.sources]
    return StreamSpec(
        data_url=run.data.url,
        max_length=config.data.max_length,
        global_batch_size=config.train.global_batch_size,
        seed=config.run.seed,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        weights=None if weights[0] is None else tuple(w for w in weights if w is not None),
    )


def _describe(data: dict[str, Any]) -> str:
    set_aside = sum(sum(source["set_aside"].values()) for source in data["sources"].values())
    rows = sum(source["rows"] for source in data["sources"].values())
    return (
        f"{rows:,} rows: {data['num_samples']:,} to train on ({data['num_tokens']:,} tokens), "
        f"{data['validation']['num_samples']:,} held out, {set_aside:,} set aside"
    )


def _parents(config: TrainStageConfig) -> list[str]:
    """The run whose model this one starts from, if it is one."""
    name = config.model.name
    return [name] if name else []


def _timings(run: Run) -> dict[str, float]:
    lines = run.metrics()
    return {"training_s": lines[-1]["time_s"]} if lines else {}
