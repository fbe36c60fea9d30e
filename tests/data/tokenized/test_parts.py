"""Every family's template: what training sees is what generation sees."""

import json

import numpy as np
import pytest

from medgpt.data.sources.records import Conversation, Message, Preferences, Reject
from medgpt.data.tokenized import chat_template
from medgpt.data.tokenized.answer_format import accepts_system_message, end_of_turn_token
from medgpt.data.tokenized.conversation import ChatOptions
from medgpt.data.tokenized.encode import ConversationEncoder, EncodedSample
from medgpt.data.tokenized.encode_rlhf import PreferenceEncoder, PromptEncoder
from medgpt.data.tokenized.template_choice import thinking_switch
from medgpt.data.tokenized.template_messages import as_dicts
from medgpt.data.tokenized.thoughts import opens_thought, text_after_thought
from tests.models.chat_templates import CHAT_TEMPLATES
from tests.models.chat_tokenizers import chat_tokenizer
from tests.models.families import CAUSAL as FAMILIES

ORIGIN = {"source": "clinic", "file": "a.jsonl", "row": 7}
ROLES = {"s": "system", "u": "user", "a": "assistant"}
SWITCHED = [family for family, text in CHAT_TEMPLATES.items() if thinking_switch(text)]
THOUGHT = "<think>\n先排除危险信号。\n</think>\n\n"
TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": "dose",
                "description": "Return a dose.",
                "parameters": {
                    "type": "object",
                    "properties": {"drug": {"type": "string", "description": "its name"}},
                    "required": ["drug"],
                },
            },
        }
    ]
)
CALL = Message("assistant", "", tool_calls='[{"name": "dose", "arguments": {"drug": "布洛芬"}}]')
WITH_TOOLS = {
    "qwen2.5",
    "qwen3",
    "qwen3-2507",
    "qwen3.5",
    "qwen3.5-nothink",
    "qwen3.6",
    "llama3.1",
    "llama3.2",
    "glm4moe",
    "gpt-oss",
    "nemotron3",
}
NO_SYSTEM = {"mistral-v0.1", "gemma"}
CLOSED = {"qwen3.5-nothink"}  # prompts end with an empty thought
REWRITES = {  # families whose last turn is rendered in another way than those before it
    "qwen3",
    "qwen3.5",
    "qwen3.5-nothink",
    "qwen3.6",
    "deepseek-v3",
    "deepseek-r1",
    "gpt-oss",
    "nemotron3",
}


def conversation(*turns):
    return Conversation(messages=tuple(Message(ROLES[t[0]], t[2:]) for t in turns), **ORIGIN)


CASES = {
    "one turn": conversation("u 我头痛", "a 请测量体温。"),
    "turns": conversation("u 我头痛", "a 1. 测体温\n2. 休息", "u 38.5 度?", "a 请就医。"),
    "system": conversation("s 你是医生", "u 我头痛", "a 请测量体温。", "u 谢谢", "a (不客气)"),
    "thought": conversation("u 我头痛", f"a {THOUGHT}请测量体温。"),
    "thoughts": conversation(
        "u 我头痛",
        f"a {THOUGHT}请测量体温。",
        "u 38.5",
        f"a {THOUGHT}请就医。",
        "u 谢谢",
        "a 不客气",
    ),
}


def samples(tokenizer, record, **options):
    encoded = ConversationEncoder(tokenizer, 2048, ChatOptions(**options))(record)
    assert isinstance(encoded, EncodedSample), encoded
    return [encoded, *encoded.further]


def targets(sample):
    """The [start, stop) of every run of targets."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.targets, [0]])))
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", CHAT_TEMPLATES)
def test_what_is_learned_is_the_answer_after_the_ids_of_its_prompt_at_generation(family, case):
    tokenizer, record = chat_tokenizer(family), CASES[case]
    if (case == "system" and family in NO_SYSTEM) or ("thought" in case and family in CLOSED):
        assert isinstance(ConversationEncoder(tokenizer, 2048)(record), Reject)
        return
    answers = [i for i, message in enumerate(record.messages) if message.role == "assistant"]
    end = end_of_turn_token(tokenizer)
    for sample in samples(tokenizer, record):
        for start, stop in targets(sample):
            i, ids = answers.pop(0), sample.input_ids.tolist()
            prompt = chat_template.generation_prompt_ids(tokenizer, record.messages[:i])
            assert ids[:start] == prompt
            plain = tokenizer.apply_chat_template(
                as_dicts(record.messages[:i], tokenizer.chat_template),
                add_generation_prompt=True,
                return_dict=False,
            )
            assert prompt == plain
            text = tokenizer.decode(ids[start:stop])
            assert text.endswith(end)
            content = record.messages[i].content.strip()
            inside = opens_thought(tokenizer.decode(prompt))
            answer = text_after_thought(text.removesuffix(end), starts_inside=inside)
            assert answer.strip() == content.removeprefix(THOUGHT)
            assert ("先排除危险信号。" in text) == ("先排除危险信号。" in content)
            assert text.count(end) == 1
    assert not answers


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("family", SWITCHED)
def test_a_frozen_mode_of_thinking_is_that_of_training_and_generation(family, thinking):
    tokenizer = chat_tokenizer(family, thinking="on" if thinking else "off")
    record = CASES["thoughts" if thinking else "turns"]
    for sample in samples(tokenizer, record):
        start, _ = targets(sample)[-1]
        prompt = chat_template.generation_prompt_ids(
            chat_tokenizer(family), record.messages[: sample.turn], thinking=thinking
        )
        assert sample.input_ids[:start].tolist() == prompt


@pytest.mark.parametrize("family", CHAT_TEMPLATES)
def test_a_conversation_is_one_sample_unless_the_template_rewrites_turns(family):
    parts = samples(chat_tokenizer(family), CASES["turns"])
    assert len(parts) == (2 if family in REWRITES else 1)
    assert [sample.turn for sample in parts] == ([1, 3] if family in REWRITES else [3])


def test_only_the_last_turn_counts_if_told_so():
    for family in ("qwen3", "qwen2.5"):
        (sample,) = samples(chat_tokenizer(family), CASES["turns"], turns="last")
        assert len(targets(sample)) == 1
        assert sample.turn == 3


def test_a_part_that_is_too_long_loses_its_history_and_keeps_its_answer():
    tokenizer = chat_tokenizer("qwen3")
    record = conversation("u " + "我头痛" * 20, "a 请测量体温。", "u 38.5", "a 请就医。")
    full = samples(tokenizer, record)
    encoder = ConversationEncoder(tokenizer, len(full[1].input_ids) - 1)
    first = encoder(record)
    (second,) = first.further
    alone = samples(tokenizer, conversation("u 38.5", "a 请就医。"))[0]
    assert first.input_ids.tolist() == full[0].input_ids.tolist()
    assert second.input_ids.tolist() == alone.input_ids.tolist()
    assert (first.num_truncated_turns, second.num_truncated_turns) == (0, 2)


@pytest.mark.parametrize("family", ["qwen3", "qwen2.5", "deepseek-r1"])
def test_thoughts_can_be_removed(family):
    tokenizer = chat_tokenizer(family)
    stripped = samples(tokenizer, CASES["thought"], thinking="strip")
    plain = samples(tokenizer, CASES["one turn"])
    assert [s.input_ids.tolist() for s in stripped] == [s.input_ids.tolist() for s in plain]
    assert stripped[0].changes == {"thoughts removed from answers": 1}


@pytest.mark.parametrize(
    "answer",
    [
        "<think>先排除",
        "<think>a</think>",
        "<think>a</think>b<think>c</think>d",
        "好的。<think>a</think>b",
    ],
)
def test_an_unfinished_or_odd_thought_is_malformed(answer):
    for family in ("qwen3", "qwen2.5"):
        reject = ConversationEncoder(chat_tokenizer(family), 512)(
            conversation("u x", f"a {answer}")
        )
        assert isinstance(reject, Reject)
        assert reject.malformed
        assert "thought" in reject.reason


def test_a_thought_typed_by_the_user_is_still_a_forged_token():
    reject = ConversationEncoder(chat_tokenizer("qwen3"), 512)(conversation("u <think>", "a b"))
    assert reject.reason == "a message contains the control token <think>"


@pytest.mark.parametrize("family", ["gemma", "mistral-v0.1", "qwen3"])
def test_a_system_message_is_folded_or_dropped_and_counted(family):
    tokenizer = chat_tokenizer(family)
    record = conversation("s 你是医生", "u 我头痛", "a 请测量体温。")
    folded = samples(tokenizer, record, system="fold")
    same = samples(tokenizer, conversation("u 你是医生\n\n我头痛", "a 请测量体温。"))
    assert folded[0].input_ids.tolist() == same[0].input_ids.tolist()
    assert folded[0].changes == {"system messages folded into the first question": 1}
    dropped = samples(tokenizer, record, system="drop")
    assert (
        dropped[0].input_ids.tolist() == samples(tokenizer, CASES["one turn"])[0].input_ids.tolist()
    )
    assert dropped[0].changes == {"system messages dropped": 1}


def test_a_template_that_leaves_out_the_system_message_does_not_accept_it():
    tokenizer = chat_tokenizer("qwen2.5")
    tokenizer.chat_template = (
        "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}"
        + (tokenizer.chat_template)
    )
    assert not accepts_system_message(tokenizer)
    reject = ConversationEncoder(tokenizer, 512)(CASES["system"])
    assert "data.system" in reject.reason


def test_an_empty_system_turn_is_no_system_turn():
    for family in ("gemma", "qwen2.5"):
        tokenizer = chat_tokenizer(family)
        empty = samples(tokenizer, conversation("s  ", "u 我头痛", "a 请测量体温。"))
        assert (
            empty[0].input_ids.tolist()
            == samples(tokenizer, CASES["one turn"])[0].input_ids.tolist()
        )


@pytest.mark.parametrize("family", ["qwen3", "gpt-oss", "deepseek-r1", "llama2", "glm4"])
def test_preferences_and_prompts_see_the_same_prompt(family):
    tokenizer = chat_tokenizer(family)
    prompt, better = CASES["turns"].messages[:3], CASES["turns"].messages[3:]
    worse = (Message("assistant", "没事。"),)
    record = Preferences(prompt=prompt, answers=(better, worse), grades=(1.0, 0.0), **ORIGIN)
    pair = PreferenceEncoder(tokenizer, 2048)(record)
    ids = PromptEncoder(tokenizer, 2048)(record).input_ids.tolist()
    assert ids == chat_template.generation_prompt_ids(tokenizer, prompt)
    first, second = np.split(pair.input_ids, [pair.sequence_lengths[0]])
    assert first[: len(ids)].tolist() == second[: len(ids)].tolist() == ids
    assert not pair.targets[: len(ids)].any()
    assert pair.targets[len(ids) : len(first)].all()


@pytest.mark.parametrize("family", CHAT_TEMPLATES)
def test_calls_of_tools_are_learned_and_their_results_are_not(family):
    tokenizer = chat_tokenizer(family)
    messages = (
        Message("user", "多少?"),
        CALL,
        Message("tool", "400 mg"),
        Message("assistant", "400 毫克。"),
        Message("user", "谢谢"),
        Message("assistant", "不客气", learn=False),
        Message("user", "再见"),
        Message("assistant", "保重"),
    )
    record = Conversation(messages=messages, tools=TOOLS, **ORIGIN)
    if family not in WITH_TOOLS:
        reject = ConversationEncoder(tokenizer, 4096)(record)
        assert reject.reason == "the chat template renders no tools"
        return
    learned, ends = [1, 3, 7], chat_template.stop_token_ids(tokenizer)
    for sample in samples(tokenizer, record):
        for start, stop in targets(sample):
            i, ids = learned.pop(0), sample.input_ids.tolist()
            assert ids[:start] == chat_template.generation_prompt_ids(
                tokenizer, messages[:i], TOOLS
            )
            assert [id_ in ends for id_ in ids[start:stop]].index(True) == stop - start - 1
            text = tokenizer.decode(ids[start:stop])
            assert ("布洛芬" if i == 1 else messages[i].content) in text
            assert "400 mg" not in text
    assert not learned


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.template], ids=lambda f: f.name)
def test_the_same_holds_for_tokenizers_of_every_kind(family):
    tokenizer = family.tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATES[family.template]
    tokenizer = chat_template.prepare_chat_tokenizer(tokenizer)
    assert tokenizer.eos_token == family.turn_end
    messages = CASES["turns"].messages
    answers = [1, 3]
    for sample in samples(tokenizer, CASES["turns"]):
        for start, stop in targets(sample):
            i, ids = answers.pop(0), sample.input_ids.tolist()
            assert ids[:start] == chat_template.generation_prompt_ids(tokenizer, messages[:i])
            assert messages[i].content in tokenizer.decode(ids[start:stop])
            assert ids[stop - 1] == tokenizer.eos_token_id
    assert not answers
