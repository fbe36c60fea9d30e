"""Prepare a stage before its workers start: tokenizer, tokenized data, plan of the rows."""

from collections.abc import Callable
from functools import cache, partial
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import ray
from ray.exceptions import RayTaskError

from medgpt.artifacts import Folder, commit, committed, file_entries
from medgpt.config.base import ConfigError, ModelError
from medgpt.config.data import DataConfig
from medgpt.config.dpo import DPOConfig
from medgpt.config.model import THINKING, ModelConfig, Thinking, TokenizerConfig
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.reward_model import RewardModelConfig
from medgpt.config.stages import Passes, PretrainConfig, RunConfig, SampleKind
from medgpt.config.train import ClusterConfig
from medgpt.data.loader.plan import PlanSettings, find_plan, make_plan
from medgpt.data.sources.file_slices import list_slices
from medgpt.data.sources.inputs import check_sources
from medgpt.data.sources.readers import read_slice
from medgpt.data.sources.records import Document, Reject
from medgpt.data.tokenized.shards import data_version
from medgpt.data.tokenized.tokenize import EncodeBatch, TokenizeJob, tokenize_sources
from medgpt.runs import Run
from medgpt.train.corpus_texts import corpus_texts

if TYPE_CHECKING:
    from medgpt.models.model_files import HeadKind

TOKENIZER = "tokenizer"
SYSTEM_PROBE_RECORDS = 100  # of each source, read before anything is prepared


class DataStageConfig(Protocol):
    """A stage config with the sections that data preparation needs."""

    sample_kind: ClassVar[SampleKind]

    @property
    def run(self) -> RunConfig: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def tokenizer(self) -> TokenizerConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def cluster(self) -> ClusterConfig: ...
    @property
    def passes(self) -> Passes: ...
    def model_dump_json(self) -> str: ...


class PreparedData(NamedTuple):
    """Manifests of the tokenized data and of the plan."""

    data: dict[str, Any]
    plan: dict[str, Any]


def prepare(
    run: Run, config: DataStageConfig, on_progress: Callable[[str, int, int], None]
) -> PreparedData:
    """Make the tokenizer, data and plan of the run, unless they exist, and return the manifests."""
    cpus = config.cluster.data_cpus
    check_sources(config.data)  # before any task starts
    folder = run.folder / TOKENIZER
    tokenizer = committed(folder)
    if tokenizer is None or tokenizer["made_from"] != _tokenizer_settings(config):
        folder.remove()
        on_progress("tokenizer", 0, 1)
        run_task(make_tokenizer, folder.url, config, cpus=cpus)
        tokenizer = committed(folder)
        assert tokenizer is not None
        on_progress("tokenizer", 1, 1)
    index_job = TokenizeJob(
        data_url=run.data.url,
        rejected_url=(run.folder / "rejected").url,
        config=config.data,
        encoding=_encoding_settings(folder, config),
        make_encode=partial(load_encoder, folder.url, config.model_dump_json(), type(config)),
        packing=_is_packed(config),
        allow_changes=config.run.allow_changes,
    )
    data = tokenize_sources(index_job, data_cpus=cpus, on_progress=partial(on_progress, "reading"))
    order = _row_order(run, config, packed=tokenizer.get("packed", True))
    plan = find_plan(run.plan.url, order)
    if plan is None:
        on_progress("planning", 0, 1)
        run_task(make_plan, run.plan.url, run.data.url, order, cpus=cpus)
        on_progress("planning", 1, 1)
        plan = find_plan(run.plan.url, order)
        assert plan is not None
    return PreparedData(data, plan)


def run_task(function: Callable[..., None], *args: Any, cpus: float) -> None:
    """Run `function` as a Ray task; re-raise its ConfigError unwrapped."""
    try:
        ray.get(ray.remote(num_cpus=cpus, max_retries=3)(function).remote(*args))
    except RayTaskError as error:
        if isinstance(error.cause, ConfigError):
            raise error.cause from None
        raise


def _row_order(run: Run, config: DataStageConfig, *, packed: bool) -> PlanSettings:
    """Return the settings that decide which rows are trained, and when."""
    weights = [source.weight for source in config.data.sources]
    return PlanSettings(
        data_version=data_version(run.data.url),
        max_length=config.data.max_length if _is_packed(config) else None,
        seed=config.run.seed,
        epochs=config.passes.epochs,
        weights=None if weights[0] is None else tuple(w for w in weights if w is not None),
        max_rows=config.passes.max_rows,
        packed=packed,
    )


def _is_packed(config: DataStageConfig) -> bool:
    """Return whether rows hold several samples; preferences and prompts have their own rows."""
    return config.sample_kind in ("documents", "conversations")


def _encoding_settings(folder: Folder, config: DataStageConfig) -> dict[str, Any]:
    """Return what decides how records become tokens: tokenizer files and objective."""
    tokenizer = committed(folder)
    assert tokenizer is not None
    encoding: dict[str, Any] = {f["name"]: f["xxh128"] for f in tokenizer["files"]}
    if isinstance(config, PretrainConfig):
        encoding |= config.objective.model_dump(include={"kind", "whole_word"})
    if not _is_packed(config):
        encoding["samples"] = config.sample_kind
    if _prompt_thinking(config) != "auto":
        encoding["thinking"] = _prompt_thinking(config)
    return encoding


def _prompt_thinking(config: DataStageConfig) -> Thinking:
    """Return the mode in which prompts are answered; it is in the tokenizer of other samples."""
    return config.rollout.thinking if isinstance(config, PPOStageConfig) else "auto"


def _tokenizer_settings(config: DataStageConfig) -> dict[str, Any]:
    """Return the settings that the tokenizer depends on, besides the data."""
    model = config.model.model_dump(mode="json", include={"name", "architecture"})
    tokenizer = config.tokenizer.model_dump(mode="json")
    defaults = TokenizerConfig().model_dump(mode="json")
    for key in ("chat_template", "date", "thinking"):  # tokenizers of earlier versions lack them
        if tokenizer[key] == defaults[key]:
            del tokenizer[key]
    settings: dict[str, Any] = {"tokenizer": tokenizer, "model": model}
    if config.data.packing != "auto":  # as above
        settings["packing"] = config.data.packing
    return settings


@cache
def load_encoder(tokenizer_url: str, config_json: str, cls: Any) -> EncodeBatch:
    """Return the function that turns records into tokens, cached per process."""
    from medgpt.data.tokenized.conversation import ChatOptions
    from medgpt.data.tokenized.encode import ConversationEncoder, DocumentEncoder
    from medgpt.data.tokenized.encode_rlhf import (
        LabeledAnswerEncoder,
        PreferenceEncoder,
        PromptEncoder,
    )

    config: DataStageConfig = cls.model_validate_json(config_json)
    tokenizer = load_tokenizer(tokenizer_url, config.model.trust_remote_code)
    max_length = config.data.max_length
    if isinstance(config, PretrainConfig):
        objective = config.objective
        return DocumentEncoder(tokenizer, objective.kind, objective.whole_word).encode_batch
    data = config.data
    unpaired = isinstance(config, DPOConfig) and config.dpo.unpaired
    options = ChatOptions(
        system=data.system,
        thinking=data.thinking,
        turns=data.turns,
        prompt_thinking=THINKING[_prompt_thinking(config)],
    )
    encoder = {
        "conversations": ConversationEncoder,
        "preferences": LabeledAnswerEncoder if unpaired else PreferenceEncoder,
        "prompts": PromptEncoder,
    }[config.sample_kind]
    return encoder(tokenizer, max_length, options).encode_batch


def load_tokenizer(url: str, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer that `make_tokenizer` wrote to `url`."""
    folder = Folder(url)
    tokenizer = committed(folder)
    assert tokenizer is not None, f"{url} holds no tokenizer"
    with folder.local() as directory:
        if path := tokenizer.get("class_path"):
            from medgpt.models.saved_tokenizer import load_by_class_path

            return load_by_class_path(str(directory), path)
        from medgpt.models.tokenizer import load_tokenizer

        return load_tokenizer(str(directory), trust_remote_code)


def make_tokenizer(url: str, config: DataStageConfig) -> None:
    """Write the stage's tokenizer: the base model's, or one trained, extended or trimmed."""
    from medgpt.data.tokenized.chat_template import prepare_chat_tokenizer
    from medgpt.data.tokenized.template_choice import freeze_template
    from medgpt.models.model_files import load_hf_config
    from medgpt.models.saved_tokenizer import tokenizer_class_path
    from medgpt.models.tokenizer import check_embedding_rows, load_tokenizer, train_tokenizer

    mode, model = config.tokenizer.mode, config.model
    packed = config.data.packing != "off"
    if model.name is not None:
        packed = check_base_model(config)
    check_weights(config)
    texts = corpus_texts(config)
    if mode == "train":
        assert model.architecture is not None
        kind = "wordpiece" if model.architecture.kind == "bert" else "bpe"
        tokenizer = train_tokenizer(texts, config.tokenizer, kind)
    else:
        assert model.name is not None
        tokenizer = load_tokenizer(model.name, model.trust_remote_code, config.tokenizer.date)
        num_rows = load_hf_config(model, _head_kind(config)).get_text_config().vocab_size
        check_embedding_rows(model.name, tokenizer, num_rows)
        if config.sample_kind != "documents":
            tokenizer = freeze_template(tokenizer, config.tokenizer)
        if config.sample_kind == "conversations":
            tokenizer = prepare_chat_tokenizer(tokenizer)
        if mode == "extend":
            from medgpt.models.vocabulary import extend_tokenizer

            tokenizer = extend_tokenizer(
                tokenizer, texts, config.tokenizer.new_tokens, config.tokenizer.max_chinese_run
            )
        elif mode == "trim":
            from medgpt.models.vocabulary import trim_tokenizer

            tokenizer = trim_tokenizer(tokenizer, texts)
    if config.sample_kind == "conversations":
        tokenizer = prepare_chat_tokenizer(tokenizer)
    if not _is_packed(config) and tokenizer.chat_template is None:
        raise ModelError(
            model.name,
            "its tokenizer has no chat template, so it was not trained "
            "to answer; give a model that medgpt sft wrote, or another chat model",
        )
    if config.sample_kind != "documents":
        check_system_messages(config, tokenizer)
    folder = Folder(url)
    with folder.staging() as directory:
        tokenizer.save_pretrained(directory)
        files = file_entries(directory)
        path = tokenizer_class_path(
            str(directory), load_tokenizer(str(directory), model.trust_remote_code)
        )
    manifest = {
        "mode": mode,
        "num_tokens": len(tokenizer),
        "packed": packed,
        "made_from": _tokenizer_settings(config),
    }
    commit(folder, files, class_path=path, **manifest)


def check_system_messages(config: DataStageConfig, tokenizer: Any) -> None:
    """Raise ConfigError if the data begin with system messages that the template does not take."""
    from medgpt.data.tokenized.answer_format import accepts_system_message

    if config.data.system != "keep" or accepts_system_message(tokenizer):
        return
    for source in config.data.sources:
        for unit in list_slices(source, config.data.shard_mb)[:1]:
            for record in islice(read_slice(unit, source), SYSTEM_PROBE_RECORDS):
                if isinstance(record, Document | Reject) or not record.messages:
                    continue
                first = record.messages[0]
                if first.role == "system" and first.content.strip():
                    raise ConfigError(
                        f"data.system=keep: {record.file}, row {record.row} has a system message, "
                        "and the chat template of the model takes none; set data.system to fold "
                        "(into the first question) or drop"
                    )


def check_base_model(config: DataStageConfig) -> bool:
    """Raise ConfigError if model.name is not a model for this stage.

    Returns whether its training forward reads packed rows.
    """
    from medgpt.models.layout import is_packed
    from medgpt.models.model_files import check_max_length, load_hf_config, weight_files

    model, head_kind = config.model, _head_kind(config)
    assert model.name is not None
    hf_config = load_hf_config(model, head_kind)
    check_max_length(hf_config, config.data.max_length)
    weight_files(model.name)
    packing = "off" if isinstance(config, DPOConfig) else config.data.packing  # TRL pads
    remote = model.trust_remote_code
    return is_packed(hf_config, head_kind, packing, name=model.name, trust_remote_code=remote)


def check_weights(config: DataStageConfig) -> None:
    """Raise ConfigError if model.freeze or model.lora.quantize does not fit the model."""
    if config.model.freeze or config.model.lora.quantize:
        from medgpt.models.model_shapes import model_shape  # imports torch

        # of fresh weights, whose names do not depend on it
        vocab_size = config.tokenizer.vocab_size
        model_shape(config.model, _head_kind(config), vocab_size=vocab_size)


def _head_kind(config: DataStageConfig) -> "HeadKind":
    if isinstance(config, PretrainConfig):
        return config.objective.kind
    return "value" if isinstance(config, RewardModelConfig) else "clm"
