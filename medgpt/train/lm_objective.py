"""Language modeling objective of pretraining and fine-tuning: model, batches and loss."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from medgpt.config.stages import PretrainConfig, TrainStageConfig
from medgpt.data.loader.batch import PackedBatch
from medgpt.data.loader.collate import (
    MaskingSettings,
    causal_batch,
    empty_batch,
    masked_batch,
    sequence_seeds,
)
from medgpt.data.loader.packed_row import PackedRow
from medgpt.engine import Engine
from medgpt.engine.loading import build_partitioned
from medgpt.models.freeze import freeze_weights
from medgpt.models.language_model import LanguageModel
from medgpt.models.load import SpecialTokenIds, build_model, compute_dtype
from medgpt.models.lora import apply_lora
from medgpt.models.model_files import AdapterBase, HeadKind
from medgpt.models.tokenizer import load_tokenizer
from medgpt.models.vocabulary_change import VocabularyChange, change_vocabulary
from medgpt.train.export import export_model
from medgpt.train.loop import Trainer


class LanguageModelObjective:
    """Causal or masked language modeling with the model of the config.

    `vocabulary_change` is set if the base model has another vocabulary than `tokenizer`. The loss
    of a causal model is then measured on `probe_texts`, before and after the change.
    """

    num_metric_sums = 0

    def __init__(
        self,
        config: TrainStageConfig,
        tokenizer: Any,
        device: torch.device,
        *,
        probe_texts: Iterable[str] = (),
    ) -> None:
        self.vocabulary_change: VocabularyChange | None = None
        self.config, self.tokenizer = config, tokenizer
        self.seed = config.run.seed
        self.kind: HeadKind = config.objective.kind if isinstance(config, PretrainConfig) else "clm"
        self.dtype = compute_dtype(config.engine.precision, device.type)
        self.masking = self._make_masking() if self.kind == "mlm" else None
        self.module = LanguageModel(
            self._build_model(device, probe_texts),
            loss_chunk_tokens=config.engine.loss_chunk_tokens,
            max_batch_tokens=config.train.micro_batch_size * config.data.max_length,
            activation_checkpointing=config.engine.activation_checkpointing,
            neftune_alpha=config.train.neftune_alpha,
        ).to(device)

    def collate(self, rows: Sequence[PackedRow], *, epoch: int) -> PackedBatch:
        if not rows:
            return empty_batch(0)
        if self.masking is None:
            return causal_batch(rows)
        return masked_batch(rows, self.masking, sequence_seeds(rows, seed=self.seed, epoch=epoch))

    def loss_kwargs(self, rows: Sequence[PackedRow], *, epoch: int) -> dict[str, Any]:
        if not (self.config.train.neftune_alpha or self.config.model.lora.dropout):
            return {}
        seeds = sequence_seeds(rows, seed=self.seed, epoch=epoch)
        return {"noise_seeds": seeds or [0]}  # the empty batch has one sequence

    def loss(
        self, engine: Engine, batch: PackedBatch, *, num_targets: float, **options: Any
    ) -> tuple[Tensor, Tensor]:
        loss = engine(batch, num_tokens=num_targets, **options)
        return loss, loss.new_zeros(0)

    def metrics(self, metric_sums: Sequence[float], *, held_out: bool) -> dict[str, float]:
        return {}

    def on_train_end(self, trainer: Trainer) -> None:
        """Do nothing."""

    def export(self, engine: Engine, directory: Path) -> None:
        """Write a Hugging Face folder (LoRA: an adapter). Collective."""
        export_model(self.module.model, self.tokenizer, directory)
        if self.config.model.lora.rank and dist.get_rank() == 0:
            AdapterBase.of(self.config.model, self.dtype).write(directory)

    def _build_model(self, device: torch.device, probe_texts: Iterable[str]) -> Any:
        config, tokenizer = self.config, self.tokenizer
        name, lora = config.model.name, config.model.lora
        base = None if name is None else load_tokenizer(name, config.model.trust_remote_code)
        base_tokens = tokenizer.get_vocab() if base is None else base.get_vocab()
        resize = base_tokens != tokenizer.get_vocab()
        if name is not None and config.engine.zero_stage == 3 and not resize:
            model: Any = build_partitioned(
                config.model,
                config.engine,
                device,
                head_kind=self.kind,
                max_length=config.data.max_length,
                packing=config.data.packing,
            )
        else:
            model = build_model(
                config.model,
                head_kind=self.kind,
                vocab_size=len(tokenizer),
                special_ids=SpecialTokenIds(eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id),
                seed=self.seed,
                dtype=self.dtype,
                max_length=config.data.max_length,
                packing=config.data.packing,
            )
        new_ids = []
        if base is not None and resize:
            texts = probe_texts if self.kind == "clm" else ()
            model.to(device)  # type: ignore[arg-type]
            self.vocabulary_change = change_vocabulary(model, base, tokenizer, texts)
            new_ids = [i for token, i in tokenizer.get_vocab().items() if token not in base_tokens]
        freeze_weights(model, config.model.freeze)
        if not lora.rank:
            return model
        # LoRA draws its weights from torch's global generator
        torch.manual_seed(self.seed)
        return apply_lora(model, lora, new_token_ids=sorted(new_ids))

    def _make_masking(self) -> MaskingSettings:
        assert isinstance(self.config, PretrainConfig)
        return MaskingSettings(
            mask_id=self.tokenizer.mask_token_id,
            vocab_size=len(self.tokenizer),
            probability=self.config.objective.mlm_probability,
            special_ids=tuple(self.tokenizer.all_special_ids),
        )
