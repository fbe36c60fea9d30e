"""What a Ray Train worker runs. The controller imports this file too: it is light until called."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medgpt.artifacts import commit, committed, entries
from medgpt.config.base import ConfigError
from medgpt.config.dpo import DPOConfig
from medgpt.config.reward_model import RewardConfig
from medgpt.config.stages import TrainStageConfig
from medgpt.disk import storage_errors
from medgpt.runs import Run
from medgpt.train.start_barrier import Gate

if TYPE_CHECKING:
    from ray.util.queue import Queue

    from medgpt.train.lm_objective import Objective
    from medgpt.train.progress import Posted


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """All that a worker is told."""

    run_dir: str
    config: TrainStageConfig
    progress: "Queue"
    gate: Gate


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

    from medgpt.engine.setup import keep_freed_memory
    from medgpt.train.preparation import TOKENIZER, load_tokenizer
    from medgpt.train.progress import Posted
    from medgpt.train.samples import write_samples

    config, device = job.config, get_device()
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    if device.type == "cpu":
        keep_freed_memory()
    else:
        torch.cuda.set_device(device)  # of this thread
    if not job.gate.passed():
        return
    tokenizer = load_tokenizer((run.folder / TOKENIZER).url)
    progress = Posted(job.progress)
    try:
        if isinstance(config, DPOConfig):
            from medgpt.train.dpo import train_offline

            export = train_offline(run, config, tokenizer, device, progress)
        else:
            export = _train(job, run, tokenizer, device, progress)
    finally:
        progress.flush()
    if committed(run.model) is None:
        _export(run, config, export)
    if dist.get_rank() == 0 and config.report.prompts:
        write_samples(run, config, device)
    dist.barrier()


def _train(
    job: WorkerJob, run: Run, tokenizer: Any, device: Any, progress: "Posted"
) -> Callable[[Path], None]:
    """Train on the exact stream; returns what writes the model into a folder on all ranks."""
    from ray.exceptions import RayActorError
    from ray.train import get_preemption_info

    from medgpt.train.loop import NodeEnds, Trainer

    config = job.config
    if isinstance(config, RewardConfig):
        from medgpt.train.reward_objective import RewardObjective

        objective = RewardObjective(config, tokenizer, device)
    else:
        objective = _language_modelling(job, run, tokenizer, device)
    trainer = Trainer(
        run,
        config,
        objective,
        device=device,
        progress=progress,
        node_ends=lambda: get_preemption_info() is not None,
    )
    try:
        trainer.fit()
    except NodeEnds as end:  # Ray Train counts this kind of error as a preemption, not as a failure
        raise RayActorError(error_msg=str(end), preempted=True) from None

    def export(directory: Path) -> None:
        objective.finish(trainer)
        objective.export(trainer.engine, directory)

    return export


def _export(run: Run, config: TrainStageConfig, write: Callable[[Path], None]) -> None:
    """All ranks write the model. Raises ConfigError on all of them if the disk of one is full."""
    import torch.distributed as dist

    from medgpt.train.checkpointing import raise_together
    from medgpt.train.model_card import model_card

    refusal, files = None, []
    try:
        with storage_errors(run.folder.url, "model"):
            with run.model.staging() as directory:
                write(directory)
                if dist.get_rank() == 0:
                    (directory / "README.md").write_text(model_card(run, config), "utf-8")
                    files = entries(directory)
            if dist.get_rank() == 0:
                commit(run.model, files)
    except ConfigError as error:
        refusal = error
        with suppress(ConfigError), storage_errors(run.folder.url, "model"):
            run.model.remove()
    raise_together(refusal)


def _language_modelling(job: WorkerJob, run: Run, tokenizer: Any, device: Any) -> "Objective":
    """The objective; rank 0 tells what changed if the base speaks another vocabulary."""
    import torch.distributed as dist

    from medgpt.train.lm_objective import Objective
    from medgpt.train.preparation import first_texts

    config = job.config
    unmeasured = dist.get_rank() == 0 and "vocabulary" not in run.manifest
    objective = Objective(
        config, tokenizer, device, probe=first_texts(config) if unmeasured else ()
    )
    if unmeasured and objective.vocabulary is not None:
        run.update_manifest(vocabulary=objective.vocabulary.facts())
        job.progress.put(str(objective.vocabulary))
    return objective
