"""What a stage does once, before any worker starts: tokenizer, tokenised data, plan of its rows."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import islice
from typing import Any, ClassVar, NamedTuple, Protocol

import ray
from ray.exceptions import RayTaskError

from medgpt.artifacts import Folder, commit, committed, entries
from medgpt.config.base import ConfigError
from medgpt.config.data import DataConfig, SourceConfig
from medgpt.config.model import ModelConfig, TokenizerConfig
from medgpt.config.reward_model import RewardConfig
from medgpt.config.stages import Passes, PretrainConfig, RunConfig, Samples
from medgpt.config.train import ClusterConfig
from medgpt.data.loader.plan import Order, existing_plan, make_plan
from medgpt.data.sources.deny import DenyList
from medgpt.data.sources.inputs import check_sources
from medgpt.data.sources.readers import read_unit
from medgpt.data.sources.records import Document, Reject
from medgpt.data.sources.units import Unit, list_units
from medgpt.data.tokenized.shards import data_version
from medgpt.data.tokenized.tokenize import Encode, IndexJob, build_index
from medgpt.runs import Run

TOKENIZER = "tokenizer"
PROBE_TEXTS, PROBE_CHARACTERS = 4, 200  # of every source, to measure a changed vocabulary on


class DataStage(Protocol):
    """What a stage says of its data: a config with these sections."""

    samples: ClassVar[Samples]

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


class Prepared(NamedTuple):
    """Manifests of what a stage trains on."""

    data: dict[str, Any]
    plan: dict[str, Any]


def prepare(run: Run, config: DataStage, on_progress: Callable[[str, int, int], None]) -> Prepared:
    """Tokenizer, data and plan of the run, made unless they are there."""
    cpus = config.cluster.data_cpus
    check_sources(config.data)  # before anything is started
    folder = run.folder / TOKENIZER
    tokenizer = committed(folder)
    if tokenizer is None or tokenizer["made_from"] != _made_from(config):
        folder.remove()
        on_progress("tokenizer", 0, 1)
        run_task(make_tokenizer, folder.url, config, cpus=cpus)
        on_progress("tokenizer", 1, 1)
    job = IndexJob(
        data_url=run.data.url,
        rejected_url=(run.folder / "rejected").url,
        config=config.data,
        encoding=_encoding(folder, config),
        make_encode=partial(load_encoder, folder.url, config.model_dump_json(), type(config)),
        packed=_packed(config),
        allow_changes=config.run.allow_changes,
    )
    data = build_index(job, data_cpus=cpus, on_progress=partial(on_progress, "reading"))
    order = _order(run, config)
    plan = existing_plan(run.plan.url, order)
    if plan is None:
        on_progress("planning", 0, 1)
        run_task(make_plan, run.plan.url, run.data.url, order, cpus=cpus)
        on_progress("planning", 1, 1)
        plan = existing_plan(run.plan.url, order)
        assert plan is not None
    return Prepared(data, plan)


def run_task(function: Callable[..., None], *args: Any, cpus: float) -> None:
    """Run `function` somewhere in the cluster; its ConfigError is raised as it is."""
    try:
        ray.get(ray.remote(num_cpus=cpus, max_retries=3)(function).remote(*args))
    except RayTaskError as error:
        if isinstance(error.cause, ConfigError):
            raise error.cause from None
        raise


def _order(run: Run, config: DataStage) -> Order:
    """What decides which rows the run trains, and when."""
    weights = [source.weight for source in config.data.sources]
    return Order(
        data_version=data_version(run.data.url),
        max_length=config.data.max_length if _packed(config) else None,
        seed=config.run.seed,
        epochs=config.passes.epochs,
        weights=None if weights[0] is None else tuple(w for w in weights if w is not None),
        max_rows=config.passes.max_rows,
    )


def _packed(config: DataStage) -> bool:
    """Whether samples share rows; preferences and prompts are taken one by one."""
    return config.samples in ("documents", "conversations")


def _encoding(folder: Folder, config: DataStage) -> dict[str, Any]:
    """What decides how a record becomes tokens: the tokenizer's files and the objective."""
    tokenizer = committed(folder)
    assert tokenizer is not None
    encoding: dict[str, Any] = {f["name"]: f["xxh128"] for f in tokenizer["files"]}
    if isinstance(config, PretrainConfig):
        encoding |= config.objective.model_dump(include={"kind", "whole_word"})
    if not _packed(config):
        encoding["samples"] = config.samples
    return encoding


def _made_from(config: DataStage) -> dict[str, Any]:
    """What the tokenizer follows from, besides the data."""
    model = config.model.model_dump(mode="json", include={"name", "architecture"})
    return {"tokenizer": config.tokenizer.model_dump(mode="json"), "model": model}


@cache
def load_encoder(tokenizer_url: str, config_json: str, cls: Any) -> Encode:
    """The function that turns records into tokens; once in each process."""
    from medgpt.data.tokenized.encode import ConversationEncoder, DocumentEncoder
    from medgpt.data.tokenized.encode_answers import PreferenceEncoder, PromptEncoder

    config: DataStage = cls.model_validate_json(config_json)
    tokenizer, max_length = load_tokenizer(tokenizer_url), config.data.max_length
    if isinstance(config, PretrainConfig):
        objective = config.objective
        return DocumentEncoder(tokenizer, objective.kind, objective.whole_word).encode_batch
    if config.samples == "conversations":
        return ConversationEncoder(tokenizer, max_length).encode_batch
    encoder = PreferenceEncoder if config.samples == "preferences" else PromptEncoder
    return encoder(tokenizer, max_length).encode_batch


def load_tokenizer(url: str) -> Any:
    folder = Folder(url)
    tokenizer = committed(folder)
    assert tokenizer is not None, f"{url} holds no tokenizer"
    with folder.local() as directory:
        if path := tokenizer.get("class_path"):
            from medgpt.models.saved_tokenizer import load_as

            return load_as(str(directory), path)
        from medgpt.models.tokenizer import load_base

        return load_base(str(directory))


def make_tokenizer(url: str, config: DataStage) -> None:
    """Write the stage's tokenizer: the base's, or trained, extended or trimmed on the data."""
    from medgpt.data.tokenized.chat import for_chat
    from medgpt.models.saved_tokenizer import class_path
    from medgpt.models.tokenizer import load_base, train_tokenizer

    mode, model = config.tokenizer.mode, config.model
    if model.name is not None:
        check_model(config)
    texts = corpus_texts(config)
    if mode == "train":
        assert model.architecture is not None
        kind = "wordpiece" if model.architecture.kind == "bert" else "bpe"
        tokenizer = train_tokenizer(texts, config.tokenizer, kind)
    else:
        assert model.name is not None
        tokenizer = load_base(model.name, model.trust_remote_code)
        if config.samples == "conversations":
            tokenizer = for_chat(tokenizer)
        if mode == "extend":
            from medgpt.models.vocabulary import extend_tokenizer

            tokenizer = extend_tokenizer(
                tokenizer, texts, config.tokenizer.new_tokens, config.tokenizer.max_chinese_run
            )
        elif mode == "trim":
            from medgpt.models.vocabulary import trim_tokenizer

            tokenizer, _ = trim_tokenizer(tokenizer, texts)
    if config.samples == "conversations":
        tokenizer = for_chat(tokenizer)
    if not _packed(config) and tokenizer.chat_template is None:
        raise ConfigError(
            f"model.name={model.name}: its tokenizer has no chat template, so it never learnt to "
            "answer; name a model that medgpt sft wrote, or another chat model"
        )
    folder = Folder(url)
    with folder.staging() as directory:
        tokenizer.save_pretrained(directory)
        files = entries(directory)
        path = class_path(str(directory), load_base(str(directory)))
    facts = {"mode": mode, "num_tokens": len(tokenizer), "made_from": _made_from(config)}
    commit(folder, files, class_path=path, **facts)


def check_model(config: DataStage) -> None:
    """Whether model.name is a model for this stage, before workers start. Raises ConfigError."""
    from medgpt.models.base import check_positions, named_config, weight_files

    objective = "value" if isinstance(config, RewardConfig) else "clm"
    if isinstance(config, PretrainConfig):
        objective = config.objective.kind
    hf_config = named_config(config.model, objective)
    check_positions(hf_config, config.data.max_length)
    assert config.model.name is not None
    weight_files(config.model.name)


def corpus_texts(config: DataStage) -> Iterator[str]:
    """Texts of all sources, at most `tokenizer.max_train_mb`, the same share of every unit."""
    sources = config.data.sources
    for source in sources:
        units = list_units(source, config.data.shard_mb)
        budget = config.tokenizer.max_train_mb * 2**20 / len(sources) / len(units)
        deny = DenyList.load(source.deny)
        for unit in units:
            left = budget
            for text in _unit_texts(unit, source, deny):
                yield text
                left -= len(text.encode())
                if left <= 0:
                    break


def first_texts(config: DataStage) -> Iterator[str]:
    """The beginnings of the first few texts of every source."""
    for source in config.data.sources:
        units, deny = list_units(source, config.data.shard_mb), DenyList.load(source.deny)
        texts = (text for unit in units for text in _unit_texts(unit, source, deny))
        yield from (text[:PROBE_CHARACTERS] for text in islice(texts, PROBE_TEXTS))


def _unit_texts(unit: Unit, source: SourceConfig, deny: DenyList) -> Iterator[str]:
    """Documents, and what is said in conversations."""
    for item in read_unit(unit, source):
        record = item if isinstance(item, Reject) else deny.check(item)
        if isinstance(record, Document):
            yield record.text
        elif not isinstance(record, Reject):
            yield from (message.content for message in record.messages)
