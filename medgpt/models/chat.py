"""`medgpt chat`: a conversation with a trained model in the terminal."""

import torch
from rich.console import Console
from transformers import TextStreamer

from medgpt.data.records import Message
from medgpt.models.fetch import model_folder
from medgpt.models.generate import answer, load_for_generation


def run_chat(run: str, max_new_tokens: int, temperature: float) -> None:
    """Read questions until an empty line or Ctrl-D; answers appear as they are generated."""
    folder = model_folder(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_for_generation(str(folder), device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    console = Console()
    console.print(f"{run}. An empty line ends. Not a doctor: do not rely on its answers.")
    messages: list[Message] = []
    while question := _ask(console):
        messages.append(Message("user", question))
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        reply = answer(
            model, tokenizer, messages, max_new_tokens=max_new_tokens, streamer=streamer, **sampling
        )
        messages.append(Message("assistant", reply))


def _ask(console: Console) -> str:
    try:
        return console.input("[bold]> ").strip()
    except EOFError:
        return ""
