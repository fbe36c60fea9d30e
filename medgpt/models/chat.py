"""`medgpt chat`: a conversation with a trained model in the terminal."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event
from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.utils.logging import disable_progress_bar

from medgpt.data.chat import generation_ids
from medgpt.data.records import Message
from medgpt.models.fetch import model_folder
from medgpt.models.generate import answer, load_for_generation

with suppress(ImportError):  # not everywhere; without it a terminal cuts lines at 4096 bytes
    import readline  # noqa: F401


def run_chat(run: str, max_new_tokens: int, temperature: float) -> None:
    """Read questions until an empty line or Ctrl-D; answers appear as they are generated."""
    disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_for_generation(str(model_folder(run)), device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    positions = model.config.get_text_config().to_dict().get("max_position_embeddings", 2**31)
    room = min(max_new_tokens, positions // 2)
    print(f"{run}. An empty line ends, Ctrl-C stops an answer.")
    print("Not a doctor: do not rely on its answers.")
    messages: list[Message] = []
    while question := _ask():
        asked = fitting([*messages, Message("user", question)], tokenizer, positions - room)
        if not asked:
            print("(too long for this model; ask with fewer words)")
            continue
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        with ctrl_c() as pressed:
            ends = StoppingCriteriaList([Pressed(pressed)])
            options = {"streamer": streamer, "stopping_criteria": ends, **sampling}
            reply = answer(model, tokenizer, asked, max_new_tokens=room, **options)
        if pressed.is_set():
            print("\n(stopped and forgotten)")
            continue
        messages = [*asked, Message("assistant", reply)]


class Pressed(StoppingCriteria):
    """Ends the generation after the token in which `event` was set."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """(B,) bool"""
        done = self.event.is_set()
        return torch.full((len(input_ids),), done, dtype=torch.bool, device=input_ids.device)


@contextmanager
def ctrl_c() -> Iterator[Event]:
    """Ctrl-C sets the event. An exception could come while a library ignores it, and be lost."""
    pressed = Event()
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def fitting(
    messages: list[Message], tokenizer: PreTrainedTokenizerFast, max_tokens: int
) -> list[Message]:
    """The newest exchanges that fit into a prompt of `max_tokens`; empty if not even the last."""
    while messages and len(generation_ids(tokenizer, messages)) > max_tokens:
        messages = messages[2:]
    return messages


def _ask() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""
