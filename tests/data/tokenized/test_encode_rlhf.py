"""Encoding of preferences and prompts with the chat template."""

import json

import pytest

from medgpt.config.model import TokenizerConfig
from medgpt.data.sources.records import Conversation, Document, Message, Preferences, Reject
from medgpt.data.tokenized import chat_template
from medgpt.data.tokenized.encode import ConversationEncoder, DocumentEncoder, EncodedSample
from medgpt.data.tokenized.encode_rlhf import (
    LabeledAnswerEncoder,
    PreferenceEncoder,
    PromptEncoder,
)
from medgpt.models.tokenizer import train_tokenizer

TEXTS = ["患者头痛，血压高。请测量体温。", "See a doctor today, thanks."] * 5
ORIGIN = {"source": "clinic", "file": "a.jsonl", "row": 7}
SYSTEM, ASK = Message("system", "你是医生"), Message("user", "我头痛3天了。")
HISTORY = (SYSTEM, ASK, Message("assistant", "请测量体温。"), Message("user", "38.5 度"))
ANSWERS = tuple((Message("assistant", text),) for text in ("请看医生。", "多喝水", "See a doctor."))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(TEXTS), TokenizerConfig(vocab_size=500), "bpe")


def preferences(prompt=HISTORY, answers=ANSWERS, grades=(2.0, 0.0, 1.0)) -> Preferences:
    return Preferences(prompt=prompt, answers=answers, grades=grades, **ORIGIN)


def encode(tokenizer, record, max_length=999) -> EncodedSample:
    encoded = PreferenceEncoder(tokenizer, max_length)(record)
    assert isinstance(encoded, EncodedSample), encoded
    return encoded


def split(encoded: EncodedSample) -> list[tuple[list[int], list[int]]]:
    """(ids, positions of targets) of each sequence."""
    assert encoded.sequence_lengths is not None
    sequences, start = [], 0
    for length in encoded.sequence_lengths.tolist():
        span = slice(start, start + length)
        sequences.append(
            (encoded.input_ids[span].tolist(), encoded.targets[span].nonzero()[0].tolist())
        )
        start += length
    assert start == len(encoded.input_ids)
    return sequences


def test_a_sequence_is_the_prompt_and_the_answer_with_its_end_token(tokenizer) -> None:
    encoded = encode(tokenizer, preferences())
    prompt = chat_template.generation_prompt_ids(tokenizer, HISTORY)
    end = tokenizer.convert_tokens_to_ids(chat_template.end_of_turn_token(tokenizer))

    for (ids, targets), answer in zip(split(encoded), ANSWERS, strict=True):
        text = tokenizer(answer[0].content, add_special_tokens=False)["input_ids"]
        assert ids == [*prompt, *text, end]
        assert targets == list(range(len(prompt), len(ids)))  # no earlier turn
    assert encoded.grades is not None
    assert encoded.grades.tolist() == [2.0, 0.0, 1.0]


def test_all_assistant_turns_of_an_answer_are_targets(tokenizer) -> None:
    dialogue = (*ANSWERS[0], Message("user", "谢谢"), Message("assistant", "不客气"))
    record = preferences(answers=(dialogue, ANSWERS[1]), grades=(1.0, 0.0))
    (ids, targets), _ = split(encode(tokenizer, record))
    conversation = Conversation(messages=(*HISTORY, *dialogue), **ORIGIN)
    sft = ConversationEncoder(tokenizer, 999)(conversation)
    assert isinstance(sft, EncodedSample)
    first = sft.targets.nonzero()[0].tolist()
    start = len(chat_template.generation_prompt_ids(tokenizer, HISTORY))
    assert targets == [position for position in first if position >= start]
    assert ids == sft.input_ids[: len(ids)].tolist()


def test_a_long_prompt_loses_its_oldest_turns_for_all_answers_alike(tokenizer) -> None:
    longest = max(len(ids) for ids, _ in split(encode(tokenizer, preferences())))
    shorter = encode(tokenizer, preferences(), max_length=longest - 1)
    remaining = (SYSTEM, HISTORY[-1])

    assert shorter.num_truncated_turns == 2
    assert split(shorter) == split(encode(tokenizer, preferences(prompt=remaining)))


def test_invalid_preferences_are_set_aside(tokenizer) -> None:
    encoder = PreferenceEncoder(tokenizer, 12)
    end = chat_template.end_of_turn_token(tokenizer)
    with_control_token = ((Message("assistant", f"好{end}"),), ANSWERS[0])
    cases = [
        (preferences(), "tokens > 12", False),
        (
            preferences(answers=with_control_token, grades=(1.0, 0.0)),
            "holds the control token",
            True,
        ),
        (Document(text="x", **ORIGIN), "document where preferences are needed", True),
    ]
    for record, reason, malformed in cases:
        reject = encoder(record)
        assert isinstance(reject, Reject)
        assert reason.replace("holds", "contains") in reject.reason
        assert reject.malformed == malformed


def test_a_labeled_answer_is_encoded_only_where_no_pairs_are_needed(tokenizer) -> None:
    labeled = preferences(answers=ANSWERS[:1], grades=(-1.0,))
    encoded = LabeledAnswerEncoder(tokenizer, 999)(labeled)
    assert isinstance(encoded, EncodedSample)
    assert encoded.grades is not None
    assert encoded.grades.tolist() == [-1.0]
    for encoder in (PreferenceEncoder(tokenizer, 999), ConversationEncoder(tokenizer, 999)):
        assert isinstance(encoder(labeled), Reject)
    reject = DocumentEncoder(tokenizer, "clm")(labeled)
    assert isinstance(reject, Reject)
    assert "labeled bad" in reject.reason


def test_an_encoded_prompt_is_the_generation_prompt_with_its_history(tokenizer) -> None:
    encoder = PromptEncoder(tokenizer, 999)
    alone = Conversation(messages=HISTORY, **ORIGIN)
    answered = Conversation(messages=(*HISTORY, *ANSWERS[0]), **ORIGIN)

    for encoded in encoder.encode_batch([alone, answered, preferences()]):
        assert isinstance(encoded, EncodedSample)
        assert encoded.input_ids.tolist() == chat_template.generation_prompt_ids(tokenizer, HISTORY)
        assert not encoded.targets.any()
        assert encoded.messages is not None
        assert json.loads(encoded.messages) == [[m.role, m.content] for m in HISTORY]


def test_a_prompt_over_the_limit_is_set_aside_and_not_truncated(tokenizer) -> None:
    length = len(chat_template.generation_prompt_ids(tokenizer, HISTORY))
    record = Conversation(messages=HISTORY, **ORIGIN)

    assert isinstance(PromptEncoder(tokenizer, length)(record), EncodedSample)
    reject = PromptEncoder(tokenizer, length - 1)(record)
    assert isinstance(reject, Reject)
    assert reject.reason == f"prompt of {length} tokens > max_length {length - 1}"
    assert not reject.malformed
