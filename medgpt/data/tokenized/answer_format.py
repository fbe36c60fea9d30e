"""Finds out with probes how a chat template writes answers, and what ends them."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from medgpt.config.base import ConfigError
from medgpt.data.sources.records import Message
from medgpt.data.tokenized.render_template import (
    call_style,
    control_tokens,
    render,
    special_tokens,
)
from medgpt.data.tokenized.template_messages import PROBE_CALL, PROBE_TOOLS
from medgpt.data.tokenized.thoughts import (
    THINK_END,
    THINK_START,
    closes_thought,
    opens_thought,
    split_thought,
)

_QUESTION = Message("user", "Is 37 degrees a fever?")
_NEXT_QUESTION = Message("user", "And 38.2?")
_ANSWER = "No, that is normal."
_THOUGHT = "Fever begins at 38."
_SYSTEM = "Doctors answer in riddles."
_DEFAULT_THOUGHT = (f"{THINK_START}\n", f"\n{THINK_END}\n\n")


class AnswerFormat(NamedTuple):
    """How an answer is written after its prompt."""

    before: str  # between the prompt and an answer without a thought: mostly nothing
    after: str  # from the answer to the end of its end token, such as " </s>"
    thought: tuple[str, str] | None = None  # before the thought, and between thought and answer
    takes_thoughts: bool = True  # False: the prompt ends with an empty thought
    """`thought` is None if the template writes a thought as it stands in the content."""

    def write(self, content: str) -> str:
        """Return what the model has to write after the prompt: content and end."""
        thought, answer = split_thought(content)
        if self.thought is None or not thought:
            answer = content.strip() if self.thought is None else answer
            return f"{self.before}{answer}{self.after}"
        return f"{self.thought[0]}{thought}{self.thought[1]}{answer}{self.after}"


def end_of_turn_token(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the token that ends an assistant turn.

    Raises ConfigError if the template does not continue its own prompt.
    """
    return _last_token(tokenizer, find_answer_format(tokenizer).after)


def _last_token(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    tokens = [*control_tokens(tokenizer), str(tokenizer.eos_token)]
    return max((token for token in tokens if text.endswith(token)), key=len)


def find_answer_format(
    tokenizer: PreTrainedTokenizerFast,
    history: Sequence[Message] = (_QUESTION,),
    tools: str | None = None,
) -> AnswerFormat:
    """Find out with a probe how the template writes an answer after `history`.

    The end is the first control token after the answer; where the template writes none there, the
    one with which the next question begins (GLM-4); else the tokenizer's end token. A thought that
    the template drops is written as DeepSeek-R1 writes it.

    Raises ConfigError if the template does not continue its own prompt.
    """
    prompt = render(tokenizer, history, tools, add_generation_prompt=True)
    plain = render(tokenizer, (*history, Message("assistant", _ANSWER)), tools)
    if _ANSWER not in plain or history[-1].content not in prompt:
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path} leaves out what user and assistant "
            "say; name another one in tokenizer.chat_template"
        )
    after = _find_end(tokenizer, (*history, Message("assistant", _ANSWER)), tools, plain)
    inside = opens_thought(prompt)
    if closes_thought(prompt):
        thought, takes_thoughts = _DEFAULT_THOUGHT, False
    else:
        thought, takes_thoughts = _find_thought(tokenizer, history, tools, prompt), True
    if plain.startswith(prompt) and _ANSWER in plain[len(prompt) :]:
        before = plain[len(prompt) : plain.rindex(_ANSWER)]
    elif inside:
        before = (thought or _DEFAULT_THOUGHT)[1]
    else:
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path} does not continue its own prompt, so "
            "training would not see the text of generation; name another one in "
            "tokenizer.chat_template"
        )
    return AnswerFormat(before, after, thought, takes_thoughts)


def _find_end(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    tools: str | None,
    text: str,
) -> str:
    """Return the text from the answer to the end of its end token."""
    tail = text[text.rindex(_ANSWER) + len(_ANSWER) :]
    if end := _first_token(control_tokens(tokenizer), tail):
        return end
    longer = render(tokenizer, (*messages, _NEXT_QUESTION), tools)
    tail = longer[longer.rindex(_ANSWER) + len(_ANSWER) : longer.rindex(_NEXT_QUESTION.content)]
    return _first_token(control_tokens(tokenizer), tail) or str(tokenizer.eos_token)


def _first_token(tokens: Iterable[str], text: str) -> str | None:
    """Return `text` up to the end of the first token in it, or None if it has none."""
    found = [(text.index(token), -len(token)) for token in tokens if token in text]
    return text[: min(found)[0] - min(found)[1]] if found else None


def _find_thought(
    tokenizer: PreTrainedTokenizerFast,
    history: Sequence[Message],
    tools: str | None,
    prompt: str,
) -> tuple[str, str] | None:
    """Return what stands before a thought, and between it and the answer.

    None if the template writes thoughts as they stand in the content.
    """
    content = f"{THINK_START}{_THOUGHT}{THINK_END}{_ANSWER}"  # without the usual line ends
    text = render(tokenizer, (*history, Message("assistant", content)), tools)
    written = text[len(prompt) :] if text.startswith(prompt) else ""
    if content in written:
        return None
    start, middle = written.find(_THOUGHT), written.rfind(_ANSWER)
    if 0 <= start < middle:
        return written[:start], written[start + len(_THOUGHT) : middle]
    return ("", _DEFAULT_THOUGHT[1]) if opens_thought(prompt) else _DEFAULT_THOUGHT


def call_after_prompt(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    tools: str | None,
    prompt: str,
    answer_format: AnswerFormat,
) -> str | None:
    """Return what the model has to write to call the tools of the last message, with its end.

    None if the template does not continue `prompt` with it.
    """
    text = render(tokenizer, messages, tools)
    before, begun = "", prompt
    if opens_thought(prompt) and not text.startswith(prompt):  # a call without a thought
        before, begun = answer_format.before, prompt[: prompt.rindex(THINK_START)]
    if not text.startswith(begun):
        return None
    written = (before + text[len(begun) :]).rstrip()
    if any(written.endswith(token) for token in special_tokens(tokenizer)):
        return written
    longer = render(tokenizer, (*messages, PROBE_CALL[-1]), tools)  # GLM-4: the result ends it
    tail = longer[len(text.rstrip()) :] if longer.startswith(text.rstrip()) else ""
    end = _first_token(control_tokens(tokenizer), tail)
    if end is None or end.strip() not in control_tokens(tokenizer):
        end = str(tokenizer.eos_token)
    return written + end


def end_of_call_token(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return the token that ends an answer which calls tools; None if the template has none."""
    if call_style(tokenizer) is None:
        return None
    question, call, _ = PROBE_CALL
    prompt = render(tokenizer, (question,), PROBE_TOOLS, add_generation_prompt=True)
    answer_format = find_answer_format(tokenizer, (question,), PROBE_TOOLS)
    written = call_after_prompt(tokenizer, (question, call), PROBE_TOOLS, prompt, answer_format)
    return None if written is None else _last_token(tokenizer, written)


def accepts_tools(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the template renders the list of tools that a model may call."""
    try:
        prompt = render(tokenizer, PROBE_CALL[:1], PROBE_TOOLS, add_generation_prompt=True)
    except (TemplateError, TypeError):
        return False
    return "find_dose" in prompt


def accepts_system_message(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the template renders a system message; some raise an error, some leave it out."""
    try:
        messages = (Message("system", _SYSTEM), _QUESTION)
        prompt = render(tokenizer, messages, add_generation_prompt=True)
    except TemplateError:
        return False
    return _SYSTEM in prompt
