"""`medgpt chat`: chat with a trained model in the terminal."""

import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event

import torch
from transformers import PreTrainedTokenizerFast, TextStreamer
from transformers.utils.logging import disable_progress_bar

from medgpt.data.sources.records import Message
from medgpt.data.tokenized.chat_template import generation_prompt_ids
from medgpt.models.answers import message_content
from medgpt.models.fetch import existing_model_folder
from medgpt.models.generate import load_for_generation, stream_answer

with suppress(ImportError):  # without readline, a terminal cuts lines at 4096 bytes
    import readline  # noqa: F401


def run_chat(
    run: str,
    max_new_tokens: int,
    temperature: float,
    thinking: bool | None = None,
    thinking_tokens: int | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Answer questions until an empty line or Ctrl-D; print tokens as they are generated."""
    disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_for_generation(
        str(existing_model_folder(run)), device, trust_remote_code=trust_remote_code
    )
    max_positions = model.config.get_text_config().to_dict().get("max_position_embeddings", 2**31)
    max_answer_tokens = min(max_new_tokens, max_positions // 2)
    print(f"{run}. Enter an empty line to quit; press Ctrl-C to stop an answer.")
    print("This model is not a doctor: do not rely on its answers.")
    messages: list[Message] = []
    while question := _read_question():
        prompt_messages = truncate_history(
            [*messages, Message("user", question)], tokenizer, max_positions - max_answer_tokens
        )
        if not prompt_messages:
            print("(the question is too long for this model; shorten it)")
            continue
        prompt = generation_prompt_ids(tokenizer, prompt_messages, thinking=thinking)
        tokens = stream_answer(
            model,
            tokenizer,
            prompt,
            thinking_tokens=thinking_tokens,
            max_new_tokens=max_answer_tokens,
            temperature=temperature,
            seed=secrets.randbits(64),
        )
        with catch_ctrl_c() as pressed:
            ids = _print_answer(tokens, tokenizer, pressed)
        if pressed.is_set():
            print("\n(stopped; this exchange is dropped)")
            continue
        if not (answer := message_content(tokenizer, prompt, ids)):
            print("(no answer: the thought did not end; this exchange is dropped)")
            continue
        messages = [*prompt_messages, Message("assistant", answer)]


def _print_answer(
    tokens: Iterator[int], tokenizer: PreTrainedTokenizerFast, pressed: Event
) -> list[int]:
    """Print tokens as they arrive until `pressed` is set; return their ids."""
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)  # type: ignore[arg-type]
    ids: list[int] = []
    for token in tokens:
        ids.append(token)
        streamer.put(torch.tensor([token]))
        if pressed.is_set():
            break
    streamer.end()
    return ids


@contextmanager
def catch_ctrl_c() -> Iterator[Event]:
    """Set the event on Ctrl-C. A KeyboardInterrupt could be swallowed inside a library."""
    pressed = Event()
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def truncate_history(
    messages: list[Message], tokenizer: PreTrainedTokenizerFast, max_tokens: int
) -> list[Message]:
    """Return the newest exchanges that fit into `max_tokens`; empty if the last one does not."""
    while messages and len(generation_prompt_ids(tokenizer, messages)) > max_tokens:
        messages = messages[2:]
    return messages


def _read_question() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""
