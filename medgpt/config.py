"""Every knob of medgpt: one frozen model per concern, one root per stage.

`load` reads a TOML file, applies `section.key=value` overrides and rejects what it does not
understand, so a mistyped key stops a job on the laptop instead of wasting a cluster. Neither torch
nor ray is imported here.
"""

import difflib
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    StringConstraints,
    ValidationError,
    model_validator,
)

StageConfig = TypeVar("StageConfig", bound=BaseModel)
Count = Annotated[int, Gt(0)]
Share = Annotated[float, Ge(0), Lt(1)]
Name = Annotated[str, StringConstraints(pattern=r"^[\w.-]+$")]
SHOWN_CHARS = 80  # of a wrong value in an error
RULES = {  # in TOML's words where pydantic's are Python's
    "tuple_type": 'must be a list, as ["..."]',
    "too_short": "must not be empty",
    "model_type": "must be a section of keys",
}


class ConfigError(ValueError):
    """The configuration or the data is wrong and the user can fix it."""


def absolute(path: str) -> str:
    """`path` as an absolute path; a URI stays as it is."""
    return path if "://" in path else str(Path(path).expanduser().absolute())


def absolute_model(name: str) -> str:
    """A model that is a path becomes absolute; `owner/name` without such a folder is a hub id."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()
    return absolute(name) if is_path else name


def stable_run_dir(path: str) -> str:
    """An absolute run directory; a submitted job would lose a relative one in its cached copy."""
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if submitted and "://" not in path and not Path(path).expanduser().is_absolute():
        raise ValueError(
            "a submitted job needs an absolute path or URI, its working directory is a cached copy"
        )
    return absolute(path)


DataPath = Annotated[str, AfterValidator(absolute)]
DenyPath = Annotated[
    str, AfterValidator(lambda name: name if name == "default" else absolute(name))
]
ModelPath = Annotated[str, AfterValidator(absolute_model)]
RunDir = Annotated[str, AfterValidator(stable_run_dir)]


class Config(BaseModel):
    """Base of every section: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunConfig(Config):
    dir: RunDir
    """Run directory: a path or a URI. Repeating the command resumes an unfinished run."""
    seed: Annotated[int, Ge(0)] = 0
    """Every random decision derives from it."""
    allow_changes: bool = False
    """Resume although the data or a training-relevant key changed since the run began."""


class ArchitectureConfig(Config):
    """A model with fresh weights, for when there is no base model."""

    kind: Literal["qwen2", "llama", "bert"] = "qwen2"
    """qwen2 and llama for causal, bert for masked pretraining."""
    hidden_size: Count = 256
    """Width of the residual stream."""
    num_layers: Count = 4
    """Transformer blocks."""
    num_heads: Count = 4
    """Attention heads; divides hidden_size."""
    num_kv_heads: Count | None = None
    """Key-value heads; none is num_heads. bert has no other choice."""
    intermediate_size: Count = 704
    """Width of the feed-forward layer."""
    max_positions: Count = 2048
    """Longest sequence the model accepts, in tokens."""
    tie_embeddings: bool = True
    """Input and output embedding share one matrix."""
    rope_theta: Annotated[float, Gt(0)] = 10000.0
    """Base of the rotary position encoding."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}; "
                "change one of them"
            )
        kv = self.num_kv_heads or self.num_heads
        if self.num_heads % kv or (self.kind == "bert" and kv != self.num_heads):
            raise ValueError(
                f"num_kv_heads={kv} does not fit num_heads={self.num_heads} of a {self.kind}"
            )
        return self


class LoraConfig(Config):
    rank: Annotated[int, Ge(0)] = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: Annotated[float, Gt(0)] = 32.0
    """Adapter output is scaled by alpha / rank."""
    dropout: Share = 0.0
    """Dropout in front of the adapters."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers to adapt; empty adapts all of them but the output layer."""


class ModelConfig(Config):
    name: ModelPath | None = None
    """Hugging Face id, or the path of a model written by an earlier stage."""
    architecture: ArchitectureConfig | None = None
    """Fresh weights instead of `name`."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters."""
    attention: Literal["auto", "varlen", "flash_attention_2"] = "auto"
    """How packed documents attend: auto is flash_attention_2 on a GPU that has it, else varlen."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.name is None) == (self.architecture is None):
            rule = "neither is set" if self.name is None else f"both are set, name={self.name}"
            raise ValueError(
                f"set exactly one of name (a base model) and architecture (fresh weights); {rule}"
            )
        return self


class TokenizerConfig(Config):
    mode: Literal["base", "train", "extend", "trim"] = "base"
    """base: the model's own. train: byte-level BPE (WordPiece for bert) on the data. extend: the
    base's plus tokens trained on the data. trim: the base's without those the data needs not."""
    vocab_size: Annotated[int, Ge(300)] = 8000
    """Size of a trained vocabulary."""
    new_tokens: Count = 2000
    """At most this many tokens are added by extend."""
    max_train_mb: Count = 200
    """Text the tokenizer is trained on, in MiB, an even sample of all sources."""
    max_chinese_run: Count = 4
    """Longest run of Chinese characters one token of a trained vocabulary may hold."""


class TurnsMapping(Config):
    """Where a row keeps its list of turns."""

    column: str
    """Column with the list."""
    role: str | int = "role"
    """Key (or index) of the speaker inside a turn."""
    content: str | int = "content"
    """Key (or index) of the text inside a turn."""
    user: tuple[str, ...] = ("user", "human", "patient", "client", "患者", "病人")
    """Speakers who are the user."""
    assistant: tuple[str, ...] = ("assistant", "gpt", "doctor", "counselor", "医生")
    """Speakers who are the assistant."""
    system: tuple[str, ...] = ("system",)
    """Speakers who are the system prompt."""
    pairs: tuple[str, str] | None = None
    """Each turn is a question and an answer under these keys, not one utterance with a role."""
    merge: bool = False
    """Join consecutive utterances of one speaker."""
    trim: bool = False
    """Drop the assistant's words before the first and the user's after the last exchange."""


class MappingConfig(Config):
    """How a row of any other shape becomes a record. Templates are Jinja over the row's columns."""

    text: str | None = None
    """Template of a document."""
    user: str | None = None
    """Template of the user's turn."""
    assistant: str | None = None
    """Template of the assistant's turn."""
    system: str | None = None
    """Template of the system prompt."""
    turns: TurnsMapping | None = None
    """A list of turns in a column."""

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        shapes = [self.text is not None, self.user is not None, self.turns is not None]
        if sum(shapes) != 1 or (self.user is None) != (self.assistant is None):
            raise ValueError("set text, or user and assistant, or turns")
        return self


class SourceConfig(Config):
    name: Name
    """How the source is called in reports."""
    paths: Annotated[tuple[DataPath, ...], Len(1)]
    """Files, globs, directories or fsspec URIs."""
    licence: Annotated[str, StringConstraints(min_length=1)]
    """Licence of the data, copied to the manifest and the model card."""
    sensitive: bool = False
    """Reports and logs never sample from it."""
    format: Literal["auto", "txt", "jsonl", "json", "csv", "tsv", "parquet"] = "auto"
    """auto goes by the file name."""
    encoding: str = "auto"
    """auto accepts UTF-8 and GB18030 (a superset of GBK)."""
    lines: bool = False
    """txt only: every line is a document, instead of every file."""
    kind: Literal["auto", "text", "instruction", "history", "sharegpt", "messages", "qa"] = "auto"
    """Shape of a row; auto recognises it from the columns."""
    question_column: str = "question"
    """kind qa: column of the question."""
    answer_column: str = "answer"
    """kind qa: column of the answer."""
    mapping: MappingConfig | None = None
    """For rows of any other shape."""
    weight: Annotated[float, Gt(0)] | None = None
    """Share of an epoch's tokens, relative to the other sources'; set it for all or for none."""
    deny: tuple[DenyPath, ...] = ("default",)
    """Deny-lists: `default` ships with medgpt, others are TOML files of the same form."""


class DataConfig(Config):
    sources: Annotated[tuple[SourceConfig, ...], Len(1)]
    """What to train on."""
    max_length: Annotated[int, Ge(16)] = 1024
    """Tokens in a packed row. Longer documents span rows, conversations lose their oldest turns."""
    validation_share: Share = 0.02
    """Share of the samples held out, chosen by the hash of their content."""
    max_malformed_share: Annotated[float, Ge(0), Le(1)] = 0.01
    """The run stops when more than this share of a source's rows is malformed."""
    shard_mb: Count = 32
    """Files that can be split are read in pieces of about this many MiB."""

    @model_validator(mode="after")
    def _names_and_weights(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"source names must differ, got {', '.join(names)}")
        if len({source.weight is None for source in self.sources}) > 1:
            raise ValueError("set weight for all sources or for none")
        return self


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
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After warm-up: cosine or linear to min_lr_ratio; wsd stays and decays linearly at the end."""
    warmup_share: Share = 0.03
    """Share of all steps with linearly rising learning rate."""
    decay_share: Annotated[float, Ge(0), Le(1)] = 0.2
    """wsd: share of all steps in the final decay."""
    min_lr_ratio: Annotated[float, Ge(0), Le(1)] = 0.1
    """The schedule ends at this share of learning_rate."""
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """AdamW decay of matrices; vectors and embeddings are not decayed."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Adam's decay rates."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Adam's denominator offset."""
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    """Gradient norm is clipped to this; 0 does not clip."""


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
    num_workers: Count = 1
    """Training processes."""
    cpus_per_worker: Annotated[float, Gt(0)] = 1
    """CPUs each reserves; its number of threads follows."""
    gpus_per_worker: Annotated[float, Ge(0)] = 0
    """GPUs each reserves; 0 trains on the CPU."""
    data_cpus: Annotated[float, Gt(0)] = 1
    """CPUs of one data task."""
    max_failures: Annotated[int, Ge(-1)] = 3
    """Restarts after a lost worker before the run stops; -1 never stops."""
    wait_s: Annotated[float, Gt(0)] = 600
    """Longest wait for the cluster's resources."""


class ReportConfig(Config):
    prompts: tuple[str, ...] = ()
    """Prompts whose continuations (answers, after SFT) the report shows."""
    max_new_tokens: Count = 96
    """Longest continuation."""


class TrainStageConfig(Config):
    """What every supervised stage has."""

    run: RunConfig
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    cluster: ClusterConfig = ClusterConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _relations(self) -> Self:
        train, cluster = self.train, self.cluster
        share = train.micro_batch_size * cluster.num_workers
        if train.global_batch_size % share:
            below = train.global_batch_size // share * share
            fitting = [str(size) for size in (below, below + share) if size]
            raise ValueError(
                f"train.global_batch_size={train.global_batch_size} must be a multiple of "
                f"train.micro_batch_size={train.micro_batch_size} x "
                f"cluster.num_workers={cluster.num_workers}; "
                f"{' or '.join(fitting)} would do"
            )
        if self.engine.offload_optimizer and self.engine.zero_stage == 0:
            raise ValueError(
                "engine.offload_optimizer=true needs engine.zero_stage 1, 2 or 3, not 0"
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
    """configs/pretrain.toml"""

    objective: ObjectiveConfig = ObjectiveConfig()

    @model_validator(mode="after")
    def _objective_fits(self) -> Self:
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
    """configs/sft.toml"""

    @model_validator(mode="after")
    def _can_answer(self) -> Self:
        if self.model.architecture and self.model.architecture.kind == "bert":
            raise ValueError(
                "model.architecture.kind=bert cannot generate answers; take qwen2 or llama"
            )
        return self


class PipelineStage(Config):
    stage: Literal["corpus", "pretrain", "sft"]
    """Which stage to run."""
    config: DataPath
    """Its TOML file."""
    overrides: tuple[str, ...] = ()
    """`section.key=value` assignments on top of the file; {dir} is the pipeline's run.dir."""


class PipelineConfig(Config):
    """configs/debug/quickstart.toml: several stages in one process, on one Ray."""

    run: RunConfig
    stages: Annotated[tuple[PipelineStage, ...], Len(1)]
    """In order. Finished stages are skipped, an unfinished one resumes."""


class CorpusConfig(Config):
    """Renders the sample corpus that ships with medgpt."""

    run: RunConfig
    region: Literal["CN", "HK", "TW", "SG", "US"] = "CN"
    """Whose emergency number and crisis hotline the texts name."""
    shards: Count = 4
    """Files per kind of record."""
    swap_facts: bool = False
    """Control: every condition gets another condition's facts."""


def load(cls: type[StageConfig], path: Path, overrides: Sequence[str] = ()) -> StageConfig:
    """Read `path` into `cls`. Overrides are TOML assignments: `train.epochs=2`.

    Raises:
        ConfigError: names every wrong key with its value, the rule and what would be right.
    """
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError("no such file; configs/ holds one per stage") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"is not a TOML file: {error}") from None
    for text in overrides:
        _merge(tree, _parse_override(text))
    return validate(cls, tree)


def validate(cls: type[StageConfig], tree: dict[str, Any]) -> StageConfig:
    """`tree` as a `cls`. Raises ConfigError like `load`."""
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        problems = error.errors()
        inner = [p for p in problems if not any(_inside(q["loc"], p["loc"]) for q in problems)]
        raise ConfigError("; ".join(_explain(cls, problem) for problem in inner)) from None


def _parse_override(text: str) -> dict[str, Any]:
    for candidate in (text, text.replace("=", '="', 1) + '"'):  # bare words are strings
        try:
            return tomllib.loads(candidate)
        except tomllib.TOMLDecodeError:
            continue
    raise ConfigError(f"cannot parse override {text!r}; write it as section.key=value")


def _merge(tree: dict[str, Any], update: dict[str, Any]) -> None:
    """Update `tree` in place; `sources.0.name=x` changes an item of a list."""
    for name, value in update.items():
        known = tree.get(name)
        if isinstance(known, list) and isinstance(value, dict) and all(map(str.isdigit, value)):
            items = {str(i): item for i, item in enumerate(known)}
            _merge(items, value)
            tree[name] = list(items.values())
        elif isinstance(known, dict) and isinstance(value, dict):
            _merge(known, value)
        else:
            tree[name] = value


def _inside(key: tuple[int | str, ...], other: tuple[int | str, ...]) -> bool:
    """Whether `other` is a section around `key`: what is wrong with it then follows."""
    return len(key) > len(other) and key[: len(other)] == other


def _explain(cls: type[BaseModel], problem: Any) -> str:
    """One problem of pydantic's, as `key=value: rule` or `unknown key; did you mean ...?`"""
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    if problem["type"] == "missing":
        return f"missing key {key}"
    if problem["type"] != "extra_forbidden":
        value: object = problem["input"]
        shown = "" if isinstance(value, (dict, BaseModel)) else f"={_short(value)}"
        rule: str = RULES.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
        return f"{key}{shown}: {rule}" if key or shown else rule
    known = _section(cls, path[:-1]).model_fields
    close = difflib.get_close_matches(path[-1], known, n=1)
    hint = (
        f"did you mean {'.'.join([*path[:-1], *close])}?" if close else f"known: {', '.join(known)}"
    )
    return f"unknown key {key}; {hint}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


def _section(cls: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    for name in path:
        if not name.isdigit():  # an index into a list of sections
            cls = _model_in(cls.model_fields[name].annotation)
    return cls


def _model_in(annotation: Any) -> type[BaseModel]:
    """The pydantic model inside `X | None`, `tuple[X, ...]` or `Annotated[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(_model_in(t) for t in get_args(annotation) if t not in (type(None), ...))
