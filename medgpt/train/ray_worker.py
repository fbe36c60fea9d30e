"""The function that each Ray Train worker runs.

The controller imports this module too, so torch is imported only inside the functions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medgpt.artifacts import commit, committed, file_entries
from medgpt.config.base import ConfigError
from medgpt.config.dpo import DPOConfig
from medgpt.config.reward_model import RewardModelConfig
from medgpt.config.stages import SFTConfig, TrainStageConfig
from medgpt.disk import storage_errors
from medgpt.runs import Run
from medgpt.train.start_barrier import StartBarrier

if TYPE_CHECKING:
    from ray.util.queue import Queue

    from medgpt.train.lm_objective import LanguageModelObjective
    from medgpt.train.progress import AsyncQueue

SAMPLES_FILE = "samples.json"


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """Settings of a worker."""

    run_dir: str
    config: TrainStageConfig
    progress: "Queue"
    start_barrier: StartBarrier


def train_worker(settings: dict[str, Any]) -> None:
    """Train and export; runs in each Ray Train worker.

    A ConfigError goes to the driver through the progress queue instead of being raised, because
    Ray Train would restart the workers.
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
    from medgpt.train.progress import AsyncQueue

    config, device = job.config, get_device()
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    if device.type == "cpu":
        keep_freed_memory()
    else:
        torch.cuda.set_device(device)  # for this thread
    if not job.start_barrier.wait():
        return
    tokenizer = load_tokenizer((run.folder / TOKENIZER).url, config.model.trust_remote_code)
    progress = AsyncQueue(job.progress)
    try:
        if isinstance(config, DPOConfig):
            from medgpt.train.dpo import train_dpo

            write_model = train_dpo(run, config, tokenizer, device, progress)
        else:
            write_model = _train_on_stream(job, run, tokenizer, device, progress)
    finally:
        progress.flush()
    if committed(run.model) is None:
        _export_model(run, config, write_model)
    if dist.get_rank() == 0 and config.report.prompts:
        _write_sample_generations(run, config, device)
    dist.barrier()


def _train_on_stream(
    job: WorkerJob, run: Run, tokenizer: Any, device: Any, progress: "AsyncQueue"
) -> Callable[[Path], None]:
    """Train on the exact stream. Returns a collective function that writes the model."""
    from ray.exceptions import RayActorError
    from ray.train import get_preemption_info

    from medgpt.train.loop import Preempted, Trainer

    config = job.config
    if isinstance(config, RewardModelConfig):
        from medgpt.train.reward_objective import RewardObjective

        objective = RewardObjective(config, tokenizer, device)
    else:
        objective = _make_language_model_objective(job, run, tokenizer, device)
    trainer = Trainer(
        run,
        config,
        objective,
        device=device,
        progress=progress,
        is_preempted=lambda: get_preemption_info() is not None,
    )
    try:
        trainer.fit()
    except Preempted as error:
        # Ray Train counts this kind of error as a preemption, not as a failure
        raise RayActorError(error_msg=str(error), preempted=True) from None

    def export(directory: Path) -> None:
        objective.on_train_end(trainer)
        objective.export(trainer.engine, directory)

    return export


def _export_model(run: Run, config: TrainStageConfig, write: Callable[[Path], None]) -> None:
    """Write the model. Raises ConfigError on all ranks if the disk of one is full. Collective."""
    import torch.distributed as dist

    from medgpt.train.collectives import raise_on_all_ranks
    from medgpt.train.model_card import MODEL_CARD_FILE, model_card

    files, errors = [], []
    with storage_errors(run.folder.url, "model", errors):
        with run.model.staging() as directory:
            write(directory)
            if dist.get_rank() == 0:
                (directory / MODEL_CARD_FILE).write_text(model_card(run, config), "utf-8")
                files = file_entries(directory)
        if dist.get_rank() == 0:
            commit(run.model, files)
    if errors:
        with storage_errors(run.folder.url, "model", errors):
            run.model.remove()
    raise_on_all_ranks(errors)


def _write_sample_generations(run: Run, config: TrainStageConfig, device: Any) -> None:
    """Answer (SFT) or continue the report's prompts greedily with the exported model."""
    from medgpt.models.generate import generate_greedy, load_for_generation

    with run.model.local() as directory:
        model, tokenizer = load_for_generation(
            str(directory), device, trust_remote_code=config.model.trust_remote_code
        )
    prompts = config.report.prompts
    texts = generate_greedy(
        model,
        tokenizer,
        prompts,
        are_questions=isinstance(config, SFTConfig),
        max_new_tokens=config.report.max_new_tokens,
    )
    pairs = zip(prompts, texts, strict=True)
    run.folder.write_json(SAMPLES_FILE, [{"prompt": p, "text": t} for p, t in pairs])


def _make_language_model_objective(
    job: WorkerJob, run: Run, tokenizer: Any, device: Any
) -> "LanguageModelObjective":
    """Build the objective; rank 0 records a change of the vocabulary in the manifest."""
    import torch.distributed as dist

    from medgpt.train.corpus_texts import probe_texts
    from medgpt.train.lm_objective import LanguageModelObjective

    config = job.config
    measure_change = dist.get_rank() == 0 and "vocabulary" not in run.manifest
    objective = LanguageModelObjective(
        config, tokenizer, device, probe_texts=probe_texts(config) if measure_change else ()
    )
    if measure_change and objective.vocabulary_change is not None:
        run.update_manifest(vocabulary=objective.vocabulary_change.manifest_entry())
        job.progress.put(str(objective.vocabulary_change))
    return objective
