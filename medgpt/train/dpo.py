"""DPO and KTO with TRL's trainers, on one rank of a Ray Train worker group.

Tokens, config, run directory and metrics are those of every stage. TRL decides the order of
samples, the loss and what a resume restores: there is no exact stream, and losses are not summed
over the global batch.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback
from trl.trainer.dpo_config import DPOConfig as DPOArguments
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig as KTOArguments
from trl.trainer.kto_trainer import KTOTrainer

from medgpt.artifacts import commit, committed, file_entries
from medgpt.config.dpo import DPOConfig
from medgpt.config.train import OptimizerConfig
from medgpt.data.loader.packed_row import PackedRow
from medgpt.engine.engine import parameter_groups
from medgpt.engine.export import export_weights
from medgpt.engine.schedule import learning_rate
from medgpt.engine.transformers_trainer import load_weights_only, trainer_config, use_process_group
from medgpt.metrics import MetricsWriter
from medgpt.models.freeze import freeze_weights
from medgpt.models.load import SpecialTokenIds, build_model, compute_dtype
from medgpt.models.lora import peft_config
from medgpt.models.model_files import AdapterBase
from medgpt.models.saved_config import save_config
from medgpt.models.stops import generation_config, set_stops
from medgpt.runs import Run
from medgpt.train.checkpointing import begin_attempt
from medgpt.train.collectives import broadcast
from medgpt.train.preference_pairs import paired_examples, read_all_rows, unpaired_examples
from medgpt.train.progress import AsyncQueue, AttemptStarted, StepReport

CHECKPOINT_PREFIX = "checkpoint-"  # of the Hugging Face Trainer
METRIC_NAMES = {  # TRL's names and ours; other metrics are not reported
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "epoch": "train/epoch",
    "rewards/accuracies": "dpo/accuracy",
    "rewards/margins": "dpo/margin",
    "rewards/chosen": "dpo/chosen",
    "rewards/rejected": "dpo/rejected",
    "logps/chosen": "dpo/logprobs_chosen",
    "logps/rejected": "dpo/logprobs_rejected",
    "kl": "dpo/kl",
    "entropy": "dpo/entropy",
    "eval_loss": "validation/loss",
    "eval_rewards/accuracies": "validation/accuracy",
    "eval_rewards/margins": "validation/margin",
}


class _TrlOverrides:
    """Makes a TRL trainer use our tokens, parameter groups and learning rates."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: Any

    def __init__(self, config: OptimizerConfig, **options: Any) -> None:
        self.optimizer_config = config
        super().__init__(**options)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Do nothing: medgpt writes its own model card."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            config = self.optimizer_config
            groups = parameter_groups(model or self.model, config.weight_decay)
            self.optimizer = torch.optim.AdamW(
                groups, lr=config.learning_rate, betas=config.betas, eps=config.eps
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            config = self.optimizer_config

            def learning_rate_factor(step: int) -> float:
                capped_step = min(step, num_training_steps - 1)
                return learning_rate(capped_step, num_training_steps, config) / config.learning_rate

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.create_optimizer(), learning_rate_factor
            )
        return self.lr_scheduler


class PairedTrainer(_TrlOverrides, DPOTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Trains on `paired_examples`."""


class UnpairedTrainer(_TrlOverrides, KTOTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Trains on `unpaired_examples`."""


def train_dpo(
    run: Run, config: DPOConfig, tokenizer: Any, device: torch.device, progress: AsyncQueue
) -> Callable[[Path], None]:
    """Train from the newest checkpoint. Returns a collective function that writes the model."""
    trainer = make_trainer(run, config, tokenizer, device, *read_all_rows(run))
    trainer.add_callback(_RunCallback(run, config, progress))
    trainer.train(resume_from_checkpoint=_newest_checkpoint(run))
    model: Any = trainer.model

    def export(directory: Path) -> None:
        if config.model.lora.rank:
            trainer.save_model(str(directory))
        else:
            export_weights(model, directory)  # TRL would write tied weights twice
        if dist.get_rank() == 0:
            if config.model.lora.rank:
                (directory / "training_args.bin").unlink()  # a pickle
                dtype = compute_dtype(config.engine.precision, device.type)
                AdapterBase.of(config.model, dtype).write(directory)
            else:
                set_stops(model, tokenizer)
                save_config(model, directory)
            generation_config(tokenizer).save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        dist.barrier()

    return export


def make_trainer(
    run: Run,
    config: DPOConfig,
    tokenizer: Any,
    device: torch.device,
    train_rows: list[PackedRow],
    held_out_rows: list[PackedRow],
) -> DPOTrainer | KTOTrainer:
    """Build TRL's trainer on these rows; it writes checkpoints to `run`."""
    load_weights_only()
    use_process_group(device)
    train, held_out = (_make_dataset(rows, config) for rows in (train_rows, held_out_rows))
    model = _build_model(config, tokenizer, device)
    freeze_weights(model, config.model.freeze)
    lora = peft_config(model, config.model.lora) if config.model.lora.rank else None
    kind = UnpairedTrainer if config.dpo.unpaired else PairedTrainer
    return kind(
        config.optimizer,
        model=model,
        ref_model=None if lora else _build_model(config, tokenizer, device),
        args=_arguments(config, _common_arguments(run, config, device, validate=len(held_out) > 0)),
        train_dataset=train,
        eval_dataset=held_out if len(held_out) else None,
        processing_class=tokenizer,
        peft_config=lora,
    )


def _make_dataset(rows: list[PackedRow], config: DPOConfig) -> Dataset:
    size = config.train.micro_batch_size
    examples = (
        unpaired_examples(rows, batch_size=size) if config.dpo.unpaired else paired_examples(rows)
    )
    return Dataset.from_list(list(examples))


def _build_model(config: DPOConfig, tokenizer: Any, device: torch.device) -> PreTrainedModel:
    return build_model(
        config.model,
        head_kind="clm",
        vocab_size=len(tokenizer),
        special_ids=SpecialTokenIds(eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id),
        seed=config.run.seed,
        dtype=compute_dtype(config.engine.precision, device.type),
        max_length=config.data.max_length,
        packing="off",  # TRL pads
    )


def _common_arguments(run: Run, config: DPOConfig, device: torch.device, *, validate: bool) -> dict:
    """Return the arguments of transformers' Trainer."""
    train = config.train
    samples_per_micro_step = train.micro_batch_size * dist.get_world_size()
    return {
        "output_dir": run.checkpoints.root,
        "deepspeed": trainer_config(config.engine, device),
        "accelerator_config": {"use_configured_state": True},
        "per_device_train_batch_size": train.micro_batch_size,
        "per_device_eval_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // samples_per_micro_step,
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps or -1,
        "max_grad_norm": config.optimizer.max_grad_norm,
        "bf16": compute_dtype(config.engine.precision, device.type) == torch.bfloat16,
        "gradient_checkpointing": config.engine.activation_checkpointing,
        "logging_steps": 1,
        "logging_first_step": True,
        "eval_strategy": "steps" if validate else "no",
        "eval_steps": train.eval_every,
        "save_steps": train.checkpoint_every,
        "seed": config.run.seed,
        "max_length": None,  # no truncation: long samples were rejected before
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": device.type == "cuda",
    }


def _arguments(config: DPOConfig, common: dict[str, Any]) -> DPOArguments | KTOArguments:
    dpo = config.dpo
    if dpo.unpaired:
        return KTOArguments(
            loss_type=dpo.loss[0],
            beta=dpo.beta,
            desirable_weight=dpo.desirable_weight,
            undesirable_weight=dpo.undesirable_weight,
            **common,
        )
    return DPOArguments(
        loss_type=list(dpo.loss),
        loss_weights=None if dpo.loss_weights is None else list(dpo.loss_weights),
        beta=dpo.beta,
        label_smoothing=dpo.label_smoothing,
        **common,
    )


class _RunCallback(TrainerCallback):
    """Writes metrics, progress and checkpoint manifests as in other stages."""

    def __init__(self, run: Run, config: DPOConfig, progress: AsyncQueue) -> None:
        self.run, self.config, self.progress = run, config, progress
        self.metrics: MetricsWriter | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        attempt, step = begin_attempt(self.run), state.global_step
        if not state.is_world_process_zero:
            return
        times_s = [line["time_s"] for line in self.run.metrics() if line["step"] <= step]
        self.metrics = MetricsWriter(self.run, attempt=attempt, time_s=max(times_s, default=0.0))
        self.progress.put(
            AttemptStarted(attempt=attempt, step=step, num_workers=dist.get_world_size())
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.metrics is None or not logs:
            return
        metrics = {
            METRIC_NAMES[name]: float(value)
            for name, value in logs.items()
            if name in METRIC_NAMES and math.isfinite(value)
        }
        if metrics:
            self.metrics.log(state.global_step, metrics)
            self.progress.put(
                StepReport(step=state.global_step, num_steps=state.max_steps, metrics=metrics)
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Commit the checkpoint when all ranks have written their files."""
        dist.barrier()
        if self.metrics is None:
            return
        self.metrics.sync()
        folder = self.run.checkpoints / f"{CHECKPOINT_PREFIX}{state.global_step}"
        commit(folder, file_entries(Path(folder.root)), step=state.global_step)
        steps = self.run.checkpoint_steps(CHECKPOINT_PREFIX)
        for step in steps[: -self.config.train.keep_checkpoints]:
            (self.run.checkpoints / f"{CHECKPOINT_PREFIX}{step}").remove()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.metrics is not None:
            self.metrics.close()


def _newest_checkpoint(run: Run) -> str | None:
    """Return the newest complete checkpoint folder on all ranks; remove newer ones."""
    newest = None
    if dist.get_rank() == 0:
        for step in reversed(run.checkpoint_steps(CHECKPOINT_PREFIX)):
            folder = run.checkpoints / f"{CHECKPOINT_PREFIX}{step}"
            if committed(folder, verify=True):
                newest = folder.root
                break
            folder.remove()
    return broadcast(newest)
