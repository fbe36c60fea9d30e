"""Root configs of the stages, with the rules that relate their sections."""

from typing import Annotated, ClassVar, Literal, NamedTuple, Self

from annotated_types import Ge, Len
from pydantic import Field, model_validator

from medgpt.config.base import Config, Count, DataPath, Name, RunDir, multiples_near
from medgpt.config.data import DataConfig
from medgpt.config.model import ModelConfig, TokenizerConfig
from medgpt.config.train import (
    ClusterConfig,
    EngineConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ReportConfig,
    TrainConfig,
)


class RunConfig(Config):
    dir: RunDir
    """Run directory: a path or a URI. Repeating the command resumes an unfinished run."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of every random decision."""
    allow_changes: bool = False
    """Resume although the data or a key that affects training has changed. Training continues at
    the same step; if the order of the data has changed, rows may be repeated or left out."""


SampleKind = Literal["documents", "conversations", "preferences", "prompts"]


class Passes(NamedTuple):
    """Number of passes of a stage over its data."""

    epochs: int
    max_rows: int | None  # most rows that the stage needs


class TrainStageConfig(Config):
    """Base of all supervised stages."""

    sample_kind: ClassVar[SampleKind]

    run: RunConfig
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    cluster: ClusterConfig = ClusterConfig()
    report: ReportConfig = ReportConfig()

    @property
    def passes(self) -> Passes:
        steps, rows = self.train.max_steps, self.train.global_batch_size
        return Passes(self.train.epochs, None if steps is None else steps * rows)

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        train, cluster = self.train, self.cluster
        rows_per_micro_step = train.micro_batch_size * cluster.max_workers
        is_fixed = cluster.num_workers == cluster.max_workers
        if train.global_batch_size < rows_per_micro_step or (
            is_fixed and train.global_batch_size % rows_per_micro_step
        ):
            raise ValueError(
                f"train.global_batch_size={train.global_batch_size} must be "
                f"{'a multiple of' if is_fixed else 'at least'} "
                f"train.micro_batch_size={train.micro_batch_size} x "
                f"cluster.num_workers={cluster.max_workers}; "
                f"{multiples_near(train.global_batch_size, rows_per_micro_step)} would do"
            )
        lora = self.model.lora
        if self.engine.zero_stage == 3 and (lora.dora or lora.quantize):
            key = "dora=true" if lora.dora else f"quantize={lora.quantize}"
            raise ValueError(
                f"model.lora.{key} cannot compute with weights that are partitioned by "
                "engine.zero_stage=3; set engine.zero_stage to 2, or leave it out"
            )
        architecture = self.model.architecture
        if architecture is not None:
            if self.data.max_length > architecture.max_positions:
                raise ValueError(
                    f"data.max_length={self.data.max_length} exceeds "
                    f"model.architecture.max_positions={architecture.max_positions}; "
                    "lower the first or raise the second"
                )
            if self.tokenizer.mode != "train":
                raise ValueError(
                    f"tokenizer.mode={self.tokenizer.mode} needs a base model; "
                    "model.architecture goes with train"
                )
        return self


class PretrainConfig(TrainStageConfig):
    """Root config of the pretraining stage, as in configs/pretrain.toml."""

    sample_kind: ClassVar[SampleKind] = "documents"
    objective: ObjectiveConfig = ObjectiveConfig()

    @model_validator(mode="after")
    def _check_objective(self) -> Self:
        architecture = self.model.architecture
        if architecture and (architecture.kind == "bert") != (self.objective.kind == "mlm"):
            raise ValueError(
                f"objective.kind={self.objective.kind} does not fit "
                f"model.architecture.kind={architecture.kind}; "
                "bert goes with mlm, qwen2 and llama with clm"
            )
        if self.report.prompts and self.objective.kind == "mlm":
            raise ValueError(
                "report.prompts need a model that generates; leave them out with objective.kind=mlm"
            )
        return self


class SFTConfig(TrainStageConfig):
    """Root config of the fine-tuning stage, as in configs/sft.toml."""

    sample_kind: ClassVar[SampleKind] = "conversations"

    @model_validator(mode="after")
    def _check_can_answer(self) -> Self:
        if self.model.architecture and self.model.architecture.kind == "bert":
            raise ValueError(
                "model.architecture.kind=bert cannot generate answers; use qwen2 or llama"
            )
        return self


StageKind = Literal["corpus", "pretrain", "sft", "reward", "dpo", "ppo", "eval"]


class PipelineStage(Config):
    stage: StageKind
    """Kind of the stage."""
    name: Name | None = None
    """Name in reports and gates; unset: its kind, then pretrain-2 for the second one, and so on."""
    config: DataPath
    """TOML file of the stage."""
    overrides: tuple[str, ...] = ()
    """`section.key=value` assignments on top of the file; {dir} is the pipeline's run.dir."""


class PipelineConfig(Config):
    """Several stages in one process, on one Ray cluster, as in configs/debug/quickstart.toml."""

    run: RunConfig
    stages: Annotated[tuple[PipelineStage, ...], Len(1)]
    """Stages in order. Finished stages are skipped, an unfinished one resumes."""
    overrides: dict[StageKind, tuple[str, ...]] = Field(default={})
    """Assignments for all stages of a kind, as in `stages`; a stage's own come after them."""
    gates: dict[str, tuple[str, ...]] = Field(default={})
    """Gates that an eval stage of this name must pass for the pipeline to continue, in addition to
    those in its file: `eval = ["mcq.accuracy >= parent"]`. For a reward stage: gates on held-out
    pairs, `reward = ["low(reward.accuracy) > 0.5"]`."""


class CorpusConfig(Config):
    """Root config of the corpus stage, which renders the sample corpus that ships with medgpt."""

    run: RunConfig
    region: Literal["CN", "HK", "TW", "SG", "US"] = "CN"
    """Region whose emergency number and crisis hotline the texts name."""
    shards: Count = 4
    """Number of files per kind of record."""
    swap_facts: bool = False
    """Control experiment: exchange the facts of conditions, except in held-out and exam
    questions."""
