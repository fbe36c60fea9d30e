"""What the matrix of families does with one model: train, export, answer, compare.

Each cell runs medgpt's own classes in this process and compares with plain transformers, row by
row. A cell raises Refused if medgpt refuses the model before it prepares data.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
)

from medgpt.config.base import ConfigError
from medgpt.config.loading import validate
from medgpt.config.stages import PretrainConfig, SFTConfig, TrainStageConfig
from medgpt.data.loader.batch import IGNORE, PackedBatch
from medgpt.data.loader.packed_row import PackedRow
from medgpt.data.sources.records import Conversation, Document, Message, Record, Reject
from medgpt.data.tokenized.encode import EncodedSample
from medgpt.engine import Engine
from medgpt.stages.merge import merge_adapter
from medgpt.train.lm_objective import LanguageModelObjective
from medgpt.train.preparation import DataStageConfig, load_encoder, load_tokenizer, make_tokenizer
from tests.models.families import Family
from tests.models.tokenizer_styles import SENTENCES

CPU = torch.device("cpu")
TOLERANCE = 2e-4  # nats per token
QUESTIONS = ("我头痛3天了。", "What now?")
ANSWERS = ("请测量体温,罕见时拨打120。", "See a doctor today; drink 2 L of water.")
BEFORE_ANSWER = re.compile(r"^.*</think>|^final(?=\S)", re.DOTALL)  # thought, gpt-oss channel


class Refused(Exception):
    """medgpt refuses the model before data are prepared; the message is the user's."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """An exported model, and what training said about it."""

    folder: Path  # plain weights: of LoRA, the merged model
    adapter: Path | None
    batch: PackedBatch
    loss: float  # nats per target, as the held-out loss is computed
    last_targets: list[int]  # ids that end the answers
    is_padded: bool  # each sequence of a batch had a row of its own
    vocabulary_changed: bool


@contextmanager
def before_data() -> Iterator[None]:
    """Turn a ConfigError into Refused."""
    try:
        yield
    except ConfigError as error:
        raise Refused(str(error)) from error


def settings(base: Path, run: Path, family: Family, **model: Any) -> dict[str, Any]:
    source = {"name": "s", "paths": [str(base)], "license": "none"}
    return {
        "run": {"dir": str(run)},
        "model": {"name": str(base), "trust_remote_code": family.remote_code} | model,
        "data": {"sources": [source], "max_length": 320},
        "optimizer": {"learning_rate": 2e-2 if model else 5e-3, "warmup_share": 0.1},
        "engine": {"zero_stage": 0},
    }


def train(family: Family, base: Path, folder: Path, *, rank: int = 0, steps: int = 50) -> Trained:
    """Fine-tune on two conversations (masked: pretrain on sentences) and export."""
    lora = {"lora": {"rank": rank, "alpha": 2.0 * rank}} if rank else {}
    given = settings(base, folder / "run", family, **lora)
    if family.masked:
        objective_config = {"kind": "mlm", "mlm_probability": 0.3}
        config: TrainStageConfig = validate(
            PretrainConfig, given | {"objective": objective_config, "tokenizer": {"mode": "base"}}
        )
    else:
        config = validate(SFTConfig, given)
    rows, tokenizer = encode(config, documents() if family.masked else conversations())
    objective = LanguageModelObjective(config, tokenizer, CPU, probe_texts=SENTENCES)
    engine = Engine(
        objective.module,
        engine=config.engine,
        optimizer=config.optimizer,
        total_steps=steps,
        device=CPU,
    )
    batch = objective.collate(rows, epoch=0)
    num_targets = int((batch.labels != IGNORE).sum())
    for _ in range(steps):
        loss, _ = objective.loss(engine, batch, num_targets=num_targets)
        engine.backward(loss)
        engine.step()
    trained_loss = held_out_loss(objective, engine, batch, num_targets)
    objective.module.train()
    assert held_out_loss(objective, engine, batch, num_targets) == trained_loss, "dropout"
    objective.module.eval()
    adapter, out = folder / "adapter", folder / "model"
    objective.export(engine, adapter if rank else out)
    if rank:
        merge_adapter(str(adapter), out, family.remote_code)
    return Trained(
        folder=out,
        adapter=adapter if rank else None,
        batch=batch,
        loss=trained_loss,
        last_targets=[int(row.input_ids[row.targets.nonzero()[0][-1]]) for row in rows],
        is_padded=objective.module.is_padded,
        vocabulary_changed=objective.vocabulary_change is not None,
    )


def encode(config: DataStageConfig, records: Sequence[Record]) -> tuple[list[PackedRow], Any]:
    """Return one packed row of two samples, and one of each, with the stage's tokenizer."""
    url = f"{config.run.dir}/tokenizer"
    with before_data():
        make_tokenizer(url, config)
        encode_batch = load_encoder(url, config.model_dump_json(), type(config))
    samples = encode_batch(records)
    rejected = [sample.reason for sample in samples if isinstance(sample, Reject)]
    assert not rejected, rejected
    # a template that rewrites earlier turns makes several samples of a conversation
    samples = [part for sample in samples for part in (sample, *further_parts(sample))]
    return [packed_row(samples), *(packed_row([sample]) for sample in samples)], load_tokenizer(url)


def further_parts(sample: EncodedSample | Reject) -> tuple[EncodedSample, ...]:
    assert isinstance(sample, EncodedSample)
    return sample.further


def packed_row(samples: Sequence[Any]) -> PackedRow:
    assert all(isinstance(sample, EncodedSample) for sample in samples)
    words = None
    if samples[0].word_ids is not None:
        words = np.concatenate([sample.word_ids for sample in samples])
    return PackedRow(
        input_ids=np.concatenate([sample.input_ids for sample in samples]),
        targets=np.concatenate([sample.targets for sample in samples]),
        word_ids=words,
        lengths=np.array([len(sample.input_ids) for sample in samples]),
        sample_ids=[f"sample {i}" for i in range(len(samples))],
        chunks=[0] * len(samples),
        repeat=[0] * len(samples),
        sequence_lengths=samples[0].sequence_lengths,
        grades=samples[0].grades,
        messages=samples[0].messages,
    )


def conversations() -> list[Record]:
    """Return a conversation of two exchanges, and one of the second exchange alone."""
    turns = [
        Message(role, text)
        for pair in zip(QUESTIONS, ANSWERS, strict=True)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return [
        Conversation(source="s", file="f", row=row, messages=tuple(messages))
        for row, messages in enumerate((turns[:2], turns[2:], turns))
    ]


def documents() -> list[Record]:
    return [
        Document(source="s", file="f", row=row, text=text)
        for row, text in enumerate((SENTENCES[2], SENTENCES[5]))
    ]


@torch.no_grad()
def held_out_loss(
    objective: LanguageModelObjective, engine: Engine, batch: PackedBatch, num_targets: int
) -> float:
    return float(objective.loss(engine, batch, num_targets=num_targets)[0])


def pieces(batch: PackedBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and labels (1, L) of each sequence of the batch."""
    lengths = batch.cu_seqlens.diff().tolist()
    yield from zip(
        batch.input_ids.split(lengths, dim=1), batch.labels.split(lengths, dim=1), strict=True
    )


@torch.no_grad()
def loss_of_each_row_alone(model: Any, batch: PackedBatch) -> float:
    """Return plain transformers' loss, nats per target, with every sequence in a forward alone."""
    total, count = 0.0, 0
    for ids, labels in pieces(batch):
        logits = model(input_ids=ids).logits[0].float()
        total += float(torch.nn.functional.cross_entropy(logits, labels[0], reduction="sum"))
        count += int((labels != IGNORE).sum())
    return total / count


@torch.no_grad()
def check_adapter_equals_merged(
    family: Family, base: Path, trained: Trained, merged: PreTrainedModel
) -> None:
    """Check that plain peft reads the adapter, with the logits of the merged model."""
    assert trained.adapter is not None
    adapted = PeftModel.from_pretrained(plain_model(family, base), str(trained.adapter)).eval()
    for ids, _ in pieces(trained.batch):
        found, expected = (model(input_ids=ids).logits for model in (adapted, merged))
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def base_ends(base: Path) -> set[int]:
    """Return the ids at which the base's own generation_config stops."""
    path = base / "generation_config.json"
    ends = json.loads(path.read_text("utf-8"))["eos_token_id"] if path.is_file() else []
    return {ends} if isinstance(ends, int) else set(ends)


def plain_model(family: Family, folder: Path) -> Any:
    auto = AutoModelForMaskedLM if family.masked else AutoModelForCausalLM
    return auto.from_pretrained(folder, trust_remote_code=family.remote_code).eval()


def plain_answer(family: Family, model: Any, folder: Path, question: str) -> tuple[str, bool]:
    """Return what transformers' own generate() answers, and whether it stopped by itself."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=family.remote_code)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    with torch.no_grad():
        ids = model.generate(prompt, do_sample=False, max_new_tokens=80)[0, prompt.shape[1] :]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return BEFORE_ANSWER.sub("", text).strip(), len(ids) < 80


def as_the_tokenizer_spells(folder: Path, text: str) -> str:
    """Return `text` as it can come back from the tokenizer; some lose unknown characters."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()
