from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from medgpt.config.base import ConfigError
from medgpt.config.model import TokenizerConfig
from medgpt.data.sources.records import Conversation, Document, Message, Reject
from medgpt.data.tokenized import chat_template
from medgpt.data.tokenized.conversation import conversation_error, drop_exchanges
from medgpt.data.tokenized.encode import (
    ConversationEncoder,
    DocumentEncoder,
    EncodedSample,
)
from medgpt.models.tokenizer import train_tokenizer

TEMPLATES = Path(find_spec("trl").origin).parent / "chat_templates"
TEXTS = [
    "患者患有2型糖尿病，血糖控制不佳。",
    "Patients with hypertension, see a doctor! system user",
] * 5
ORIGIN = {"source": "clinic", "file": "a.jsonl", "row": 7}
ROLES = {"s": "system", "u": "user", "a": "assistant"}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(TEXTS), TokenizerConfig(vocab_size=500), "bpe")


@pytest.fixture(scope="module")
def wordpiece():
    return train_tokenizer(iter(TEXTS), TokenizerConfig(vocab_size=500), "wordpiece")


def with_template(tokenizer, name):
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>"
    )
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text("utf-8")
    return tokenizer


def document(text):
    return Document(text=text, **ORIGIN)


def conversation(*turns):
    """conversation("u hello", "a good day")"""
    return Conversation(messages=tuple(Message(ROLES[t[0]], t[2:]) for t in turns), **ORIGIN)


CASES = [
    conversation("u 我头痛", "a 请测量体温。"),
    conversation("s 你是医生", "u 12.5 mmol/L?", "a 血糖高。", "u thanks\n", "a \n\n(不客气) "),
    conversation("u \n a", "a 1. x\n2. y", "u ☺", "a é", "u ...", "a 好"),
]


def dicts(messages):
    return [{"role": m.role, "content": m.content.strip()} for m in messages]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("template", [None, "qwen2_5", "qwen2_5_training"])
def test_every_prompt_for_generation_begins_the_training_ids(tokenizer, case, template):
    if template is not None:
        tokenizer = with_template(tokenizer, template)
    ids = ConversationEncoder(tokenizer, 512)(case).input_ids.tolist()
    for k, message in enumerate(case.messages):
        if message.role == "assistant":
            prompt = tokenizer.apply_chat_template(
                dicts(case.messages[:k]), add_generation_prompt=True, return_dict=False
            )
            assert chat_template.generation_prompt_ids(tokenizer, case.messages[:k]) == prompt
            assert ids[: len(prompt)] == prompt
    assert ids == tokenizer.apply_chat_template(dicts(case.messages), return_dict=False)


@pytest.mark.parametrize("case", CASES)
def test_targets_are_the_templates_own_assistant_mask(tokenizer, case):
    own = tokenizer.apply_chat_template(dicts(case.messages), return_assistant_tokens_mask=True)
    assert ConversationEncoder(tokenizer, 512)(case).targets.tolist() == [
        bool(x) for x in own["assistant_masks"]
    ]


@pytest.mark.parametrize("case", CASES)
def test_tags_that_mark_a_part_of_the_prompt_do_not_make_it_a_target(tokenizer, case):
    plain, tagged = (with_template(tokenizer, name) for name in ("qwen2_5", "qwen2_5_training"))
    first, second = (ConversationEncoder(t, 512)(case) for t in (plain, tagged))
    assert first.input_ids.tolist() == second.input_ids.tolist()
    assert first.targets.tolist() == second.targets.tolist()


@pytest.mark.parametrize("template", [None, "qwen2_5"])
def test_targets_are_the_answers_and_their_end_tokens(tokenizer, template):
    if template is not None:
        tokenizer = with_template(tokenizer, template)
    encoded = ConversationEncoder(tokenizer, 512)(CASES[1])
    answers = tokenizer.decode(encoded.input_ids[encoded.targets])
    assert answers == "血糖高。<|im_end|>(不客气)<|im_end|>"


def test_an_end_token_outside_the_templates_mask_is_a_target_too(tokenizer):
    tokenizer = with_template(tokenizer, "qwen2_5")
    tokenizer.chat_template = chat_template.CHATML.replace(
        "{{- message.content | trim + '<|im_end|>' -}}\n        {%- endgeneration -%}",
        "{{- message.content | trim -}}{%- endgeneration -%}{{- '<|im_end|>' -}}",
    )
    assert tokenizer.chat_template != chat_template.CHATML
    encoded = ConversationEncoder(tokenizer, 512)(CASES[1])
    answers = tokenizer.decode(encoded.input_ids[encoded.targets])
    assert answers == "血糖高。<|im_end|>(不客气)<|im_end|>"


@pytest.mark.parametrize("system", [(), ("s 你是医生",)])
def test_a_long_conversation_loses_its_oldest_pairs_only(tokenizer, system):
    turns = [f"{role} turn {i} {'血糖 ' * (i % 3 * 4)}" for i in range(6) for role in "ua"]
    full = conversation(*system, *turns)
    length = len(ConversationEncoder(tokenizer, 10_000)(full).input_ids)
    for max_length in range(30, length + 2, 3):
        encoded = ConversationEncoder(tokenizer, max_length)(full)
        if isinstance(encoded, Reject):
            continue
        num_truncated = encoded.num_truncated_turns
        remaining = ConversationEncoder(tokenizer, 10_000)(
            conversation(*system, *turns[num_truncated:])
        )
        assert num_truncated % 2 == 0
        assert encoded.input_ids.tolist() == remaining.input_ids.tolist()
        assert encoded.targets.tolist() == remaining.targets.tolist()
        assert len(encoded.input_ids) <= max_length
        if num_truncated:  # it does not fit with one more pair
            more = ConversationEncoder(tokenizer, 10_000)(
                conversation(*system, *turns[num_truncated - 2 :])
            )
            assert len(more.input_ids) > max_length


def test_an_exchange_that_does_not_fit_is_set_aside(tokenizer):
    record = conversation("u 我头痛", "a 请测量体温。")
    length = len(ConversationEncoder(tokenizer, 512)(record).input_ids)
    assert isinstance(ConversationEncoder(tokenizer, length)(record), EncodedSample)
    reject = ConversationEncoder(tokenizer, length - 1)(record)
    assert isinstance(reject, Reject)
    assert not reject.malformed
    assert f"{length} tokens > max_length {length - 1}" in reject.reason
    assert (reject.source, reject.file, reject.row) == ("clinic", "a.jsonl", 7)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (["u a", "a  \n"], "empty turn"),
        (["a b", "u a"], "begins with the assistant"),
        (["s x", "a b"], "begins with the assistant"),
        (["u a", "u b", "a c"], "do not alternate"),
        (["u a", "a b", "s c", "u d", "a e"], "do not alternate"),
        (["u a", "a b", "u c"], "does not end with the assistant"),
        (["s a"], "does not end with the assistant"),
        ([], "does not end with the assistant"),
    ],
)
def test_conversations_out_of_order_are_malformed(tokenizer, turns, reason):
    record = conversation(*turns)
    assert reason in conversation_error(record.messages)
    reject = ConversationEncoder(tokenizer, 512)(record)
    assert isinstance(reject, Reject)
    assert reject.malformed
    assert reason in reject.reason


def test_an_answer_that_is_not_to_be_learned_is_no_target(tokenizer):
    encoder = ConversationEncoder(tokenizer, 512)
    wrong, right = Message("assistant", "wrong", learn=False), Message("assistant", "right")
    messages = (Message("user", "a"), wrong, Message("user", "b"), right)

    encoded = encoder(Conversation(messages=messages, **ORIGIN))
    assert tokenizer.decode(encoded.input_ids[encoded.targets]) == "right<|im_end|>"

    nothing = encoder(Conversation(messages=messages[:2], **ORIGIN))
    assert isinstance(nothing, Reject)
    assert (nothing.malformed, nothing.reason) == (
        False,
        "no turn of the assistant is to be learned",
    )
    pretraining = DocumentEncoder(tokenizer, "clm")(Conversation(messages=messages, **ORIGIN))
    assert isinstance(pretraining, Reject)
    assert "a turn is not to be learned" in pretraining.reason


def test_an_exchange_is_dropped_with_its_tool_calls():
    call = Message("assistant", "", tool_calls='[{"name":"dose","arguments":{}}]')
    first = (Message("user", "a"), call, Message("tool", "5"), Message("assistant", "b"))
    last = (Message("user", "c"), Message("assistant", "d"))
    system = Message("system", "s")
    assert conversation_error((system, *first, *last)) is None
    assert drop_exchanges((system, *first, *last), 1) == (system, *last)


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (["user", "tool", "assistant"], "do not alternate"),
        (["user", "call", "assistant"], "do not alternate"),
        (["user", "call", "tool", "user", "assistant"], "do not alternate"),
        (["user", "assistant", "tool", "assistant"], "do not alternate"),
        (["user", "call", "tool"], "does not end with the assistant"),
        (["user", "call", "tool", "tool", "call", "tool", "assistant"], None),
        (["user", "call"], None),
    ],
)
def test_tool_results_follow_calls_and_precede_the_assistant(roles, reason):
    calls = {"call": Message("assistant", "", tool_calls="[]")}
    messages = [calls.get(role, Message(role, "x")) for role in roles]
    error = conversation_error(messages)
    assert error is None if reason is None else reason in error


def test_a_document_is_no_conversation(tokenizer):
    reject = ConversationEncoder(tokenizer, 512)(document("text"))
    assert isinstance(reject, Reject)
    assert (reject.malformed, reject.reason) == (True, "document where a conversation is needed")


def test_a_control_token_in_a_message_is_malformed(tokenizer):
    reject = ConversationEncoder(tokenizer, 512)(conversation("u hi<|im_end|>", "a b"))
    assert isinstance(reject, Reject)
    assert reject.reason == "a message contains the control token <|im_end|>"


def test_a_template_that_breaks_prompts_is_refused(tokenizer):
    tokenizer = with_template(tokenizer, "qwen2_5")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message.content +", "messages|length|string +"
    )
    with pytest.raises(ConfigError):
        ConversationEncoder(tokenizer, 512)


def test_a_batch_is_its_records_one_by_one(tokenizer, wordpiece):
    records = [*CASES, conversation("a x"), document("血糖")]
    for encoder in (
        ConversationEncoder(tokenizer, 60),
        DocumentEncoder(tokenizer, "clm"),
        DocumentEncoder(wordpiece, "mlm"),
    ):
        for together, alone in zip(
            encoder.encode_batch(records), map(encoder, records), strict=True
        ):
            if isinstance(together, Reject):
                assert together == alone
            else:
                assert together.input_ids.dtype == np.int32
                assert together.targets.dtype == np.bool_
                assert together.input_ids.tolist() == alone.input_ids.tolist()
                assert together.targets.tolist() == alone.targets.tolist()
        assert encoder.encode_batch([]) == []


def test_a_document_is_its_text_and_one_end_token(tokenizer):
    encoded = DocumentEncoder(tokenizer, "clm")(document("血糖<|endoftext|>高"))
    assert tokenizer.decode(encoded.input_ids) == "血糖<|endoftext|>高<|endoftext|>"
    assert encoded.input_ids.tolist().count(tokenizer.eos_token_id) == 1  # plain text in the text
    assert encoded.targets.all()
    assert encoded.word_ids is None


def test_an_empty_document_is_malformed(tokenizer):
    reject = DocumentEncoder(tokenizer, "clm")(document(" \n"))
    assert isinstance(reject, Reject)
    assert (reject.malformed, reject.reason) == (True, "empty text")


def test_a_conversation_in_pretraining_is_its_messages_line_by_line(tokenizer):
    encoded = DocumentEncoder(tokenizer, "clm")(CASES[0])
    assert tokenizer.decode(encoded.input_ids) == "我头痛\n请测量体温。<|endoftext|>"


def test_words_are_masked_whole(wordpiece):
    encoded = DocumentEncoder(wordpiece, "mlm")(document("糖尿病 hypertensionx，血糖"))
    tokens = wordpiece.convert_ids_to_tokens(encoded.input_ids)
    words = {}
    for token, word in zip(tokens, encoded.word_ids.tolist(), strict=True):
        words.setdefault(word, []).append(token)
    assert words.pop(-1)[0] == "[CLS]"
    grouped = list(words.values())
    assert grouped[0] == ["糖", "尿", "病"]
    assert grouped[-1] == ["血", "糖"]
    assert encoded.targets.tolist() == [word >= 0 for word in encoded.word_ids]


def test_without_whole_words_there_are_no_word_ids(wordpiece):
    assert DocumentEncoder(wordpiece, "mlm", whole_word=False)(document("血糖")).word_ids is None


def test_an_objective_needs_its_special_token(tokenizer, wordpiece):
    with pytest.raises(ConfigError, match="no mask token"):
        DocumentEncoder(tokenizer, "mlm")
    with pytest.raises(ConfigError, match="no end token"):
        DocumentEncoder(wordpiece, "clm")
