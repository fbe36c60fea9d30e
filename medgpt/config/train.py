"""Sections of the training stages: objective, optimizer, engine, loop, cluster and report."""

from typing import Annotated, Literal, Self

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field, model_validator

from medgpt.config.base import Config, Count, DataPath, Fraction, Workers

Schedule = Literal["cosine", "linear", "wsd", "constant"]


class ObjectiveConfig(Config):
    kind: Literal["clm", "mlm"] = "clm"
    """clm: predict the next token. mlm: predict masked tokens."""
    mlm_probability: Annotated[float, Gt(0), Lt(1)] = 0.15
    """mlm: share of tokens to predict; 80 % become the mask token, 10 % a random one, 10 % stay."""
    whole_word: bool = True
    """mlm: mask all tokens of a word together; Chinese words by segmentation."""


class OptimizerConfig(Config):
    learning_rate: Annotated[float, Gt(0)] = 3e-4
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """After warm-up: cosine or linear decay to min_lr_ratio; wsd is constant until its final
    decay."""
    warmup_share: Fraction = 0.03
    """Share of all steps in which the learning rate rises linearly."""
    decay_share: Annotated[float, Ge(0), Le(1)] = 0.2
    """wsd: share of all steps in the final decay."""
    min_lr_ratio: Annotated[float, Ge(0), Le(1)] = 0.1
    """Final learning rate, as a share of learning_rate."""
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """AdamW weight decay of matrices; vectors and embeddings are not decayed."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Adam betas."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Adam epsilon."""
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    """Maximum gradient norm; 0 disables clipping."""


BUCKET_ELEMENTS = 50_000_000
"""Gradients reduced in one call: 200 MB in fp32, allocated in every backward pass."""


class EngineConfig(Config):
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: 0 partitions nothing, 1 the optimizer, 2 also gradients, 3 also
    weights. In bf16, 0 runs as 1, because only then gradients are accumulated in fp32."""
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory (ZeRO 1-3)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 with fp32 master weights on a GPU, fp32 on a CPU."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    loss_chunk_tokens: Count = 8192
    """Number of tokens at a time for which the output layer and the loss are computed."""

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer=true needs zero_stage 1, 2 or 3, not 0")
        return self


class TrainConfig(Config):
    epochs: Count = 1
    """Passes over the data."""
    max_steps: Count | None = None
    """Stop after this many optimizer steps; the learning rate schedule is fitted to it."""
    global_batch_size: Count = 64
    """Packed rows per optimizer step over all workers."""
    micro_batch_size: Count = 4
    """Packed rows per worker and forward pass."""
    neftune_alpha: Annotated[float, Ge(0)] = 0.0
    """Scale of the noise on embeddings (NEFTune, arXiv 2310.05914); 0 disables it."""
    eval_every: Count = 100
    """Steps between validations; the last step is always validated."""
    checkpoint_every: Count = 100
    """Steps between checkpoints; the last step always writes one."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep, in addition to the best."""
    log_every: Count = 10
    """Steps between lines on the console."""
    audit: bool = False
    """Write to audit/ when and where each sample was trained on."""


class ClusterConfig(Config):
    num_workers: Workers = 1
    """Number of training processes; `[fewest, most]` uses as many as the cluster has room for."""
    cpus_per_worker: Annotated[float, Gt(0)] = 1
    """CPUs reserved for each worker, which also set its number of threads."""
    gpus_per_worker: Annotated[float, Ge(0)] = 0
    """GPUs reserved for each worker; 0 trains on the CPU."""
    labels: dict[str, str] = Field(default={})
    """Ray node labels that each worker requires: `{ role = "train" }`."""
    data_cpus: Annotated[float, Gt(0)] = 1
    """CPUs of one data task."""
    max_failures: Annotated[int, Ge(-1)] = 3
    """Maximum number of restarts after a lost worker; -1: no limit."""
    max_preemptions: Annotated[int, Ge(-1)] = -1
    """Maximum number of restarts after preemptions that Ray has announced; -1: no limit."""
    resize_check_s: Annotated[float, Gt(0)] = 60
    """Seconds between checks for room to add workers, if num_workers is a range."""
    wait_s: Annotated[float, Gt(0)] = 600
    """Maximum seconds to wait for the resources of the cluster."""
    spill_dir: DataPath | None = None
    """Directory for objects that do not fit into the memory of a Ray that the command starts
    itself, in a folder that only the user can enter. Unset: beside Ray's logs, in RAY_TMPDIR or
    /tmp."""

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if self.labels and not isinstance(self.num_workers, int):
            raise ValueError(
                f"labels: for a range of workers, Ray counts room on nodes without them, too; "
                f"set num_workers to one number instead of {self.workers_text}, or leave labels out"
            )
        return self

    @property
    def min_workers(self) -> int:
        """Fewest workers to train with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Most workers to train with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def workers_text(self) -> str:
        """`num_workers` as TOML."""
        return str(self.num_workers).replace("(", "[").replace(")", "]")


class ReportConfig(Config):
    prompts: tuple[str, ...] = ()
    """Prompts whose continuations (answers, after SFT) the report shows."""
    max_new_tokens: Count = 96
    """Maximum tokens of a continuation."""
