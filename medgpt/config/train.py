"""How training goes: objective, optimizer, engine, loop, cluster and report."""

from typing import Annotated, Literal, Self

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field, model_validator

from medgpt.config.base import Config, Count, DataPath, Fraction, Workers

Schedule = Literal["cosine", "linear", "wsd", "constant"]


class ObjectiveConfig(Config):
    kind: Literal["clm", "mlm"] = "clm"
    """clm: predict the next token. mlm: predict masked tokens."""
    mlm_probability: Annotated[float, Gt(0), Lt(1)] = 0.15
    """Share of tokens to predict under mlm; 80 % become the mask token, 10 % random, 10 % stay."""
    whole_word: bool = True
    """mlm: mask all tokens of a word together; Chinese words by segmentation."""


class OptimizerConfig(Config):
    learning_rate: Annotated[float, Gt(0)] = 3e-4
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """After warm-up: cosine or linear to min_lr_ratio; wsd stays and decays linearly at the end."""
    warmup_share: Fraction = 0.03
    """Share of all steps with linearly rising learning rate."""
    decay_share: Annotated[float, Ge(0), Le(1)] = 0.2
    """wsd: share of all steps in the final decay."""
    min_lr_ratio: Annotated[float, Ge(0), Le(1)] = 0.1
    """The schedule ends at this share of learning_rate."""
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """AdamW decay of matrices; vectors and embeddings are not decayed."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Adam's decay rates."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Adam's denominator offset."""
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    """Gradient norm is clipped to this; 0 does not clip."""


BUCKET_ELEMENTS = 50_000_000
"""Gradients reduced in one call: 200 MB in fp32, allocated in every backward pass."""


class EngineConfig(Config):
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: 0 nothing, 1 optimizer, 2 and gradients, 3 and weights are partitioned. In
    bf16, 0 runs as 1: only then are gradients accumulated in fp32."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory (ZeRO 1-3)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 with fp32 master weights on a GPU, fp32 on a CPU."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    loss_chunk_tokens: Count = 8192
    """Output layer and loss run on this many tokens at a time."""


class TrainConfig(Config):
    epochs: Count = 1
    """Passes over the data."""
    max_steps: Count | None = None
    """Stop earlier, after this many optimizer steps; the schedule is fitted to it."""
    global_batch_size: Count = 64
    """Packed rows per optimizer step over all workers."""
    micro_batch_size: Count = 4
    """Packed rows per worker and forward pass."""
    neftune_alpha: Annotated[float, Ge(0)] = 0.0
    """Noise on embeddings (NEFTune, arXiv 2310.05914); 0 is off."""
    eval_every: Count = 100
    """Steps between validation losses; the last step is always validated."""
    checkpoint_every: Count = 100
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept, beside the best."""
    log_every: Count = 10
    """Steps between lines on the console."""
    audit: bool = False
    """Write which sample was trained when and where to audit/."""


class ClusterConfig(Config):
    num_workers: Workers = 1
    """Training processes; `[fewest, most]` trains with as many as the cluster has room for."""
    cpus_per_worker: Annotated[float, Gt(0)] = 1
    """CPUs each reserves; its number of threads follows."""
    gpus_per_worker: Annotated[float, Ge(0)] = 0
    """GPUs each reserves; 0 trains on the CPU."""
    labels: dict[str, str] = Field(default={})
    """Node labels that each worker needs, in Ray's words: `{ role = "train" }`."""
    data_cpus: Annotated[float, Gt(0)] = 1
    """CPUs of one data task."""
    max_failures: Annotated[int, Ge(-1)] = 3
    """Restarts after a lost worker before the run stops; -1 never stops."""
    max_preemptions: Annotated[int, Ge(-1)] = -1
    """Restarts because Ray announced the end of a node before the run stops; -1 never stops."""
    resize_check_s: Annotated[float, Gt(0)] = 60
    """Time between looks whether a run with a range of workers can have more."""
    wait_s: Annotated[float, Gt(0)] = 600
    """Longest wait for the cluster's resources."""
    spill_dir: DataPath | None = None
    """Where a Ray that the command itself starts puts what its memory has no room for, in a folder
    that only the user can enter. Unset: beside Ray's logs, in such a folder of RAY_TMPDIR or
    /tmp."""

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if self.labels and not isinstance(self.num_workers, int):
            raise ValueError(
                f"labels: Ray counts the room for a range of workers on nodes without them, too; "
                f"set num_workers to one number instead of {self.workers_text}, or leave labels out"
            )
        return self

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def workers_text(self) -> str:
        """`num_workers` as TOML."""
        return str(self.num_workers).replace("(", "[").replace(")", "]")


class ReportConfig(Config):
    prompts: tuple[str, ...] = ()
    """Prompts whose continuations (answers, after SFT) the report shows."""
    max_new_tokens: Count = 96
    """Longest continuation."""
