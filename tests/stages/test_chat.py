"""`medgpt chat` in a terminal."""

import os
import pty
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from medgpt.config.base import ConfigError
from medgpt.data.sources.records import Message
from medgpt.data.tokenized.chat_template import generation_prompt_ids
from medgpt.models.tokenizer import load_tokenizer
from medgpt.stages.chat import run_chat, truncate_history
from tests.models.tiny_models import model_with_tokenizer, tiny_model

TEXTS = ["高血压是常见的慢性病。", "什么是高血压?血压持续升高。"] * 50
CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """A command that runs in a pseudo-terminal."""

    def __init__(self, *command: str) -> None:
        self.pid, self.end = pty.fork()
        if self.pid == 0:
            os.execve(command[0], command, {**os.environ, "TERM": "xterm", "LANG": "C.UTF-8"})
        self.shown = b""

    def type(self, keys: str) -> None:
        data = keys.encode()
        while data:
            self._read(0.0)  # or both sides would wait for the other
            data = data[os.write(self.end, data[:512]) :]

    def wait_for_text(self, text: str, timeout_s: float = 120) -> str:
        """Return the output up to `text`; the next call continues after it."""
        deadline = time.monotonic() + timeout_s
        while text.encode() not in self.shown:
            assert time.monotonic() < deadline, self.shown.decode(errors="replace")
            self._read(0.1)
        before, _, self.shown = self.shown.partition(text.encode())
        return before.decode(errors="replace")

    def exit_code(self) -> int:
        """Read all output, then return the exit code."""
        while self._read(60):
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        with suppress(ProcessLookupError):  # it has ended
            os.kill(self.pid, signal.SIGKILL)
        os.close(self.end)

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self.end], [], [], timeout_s)[0]:
            return False
        try:
            new = os.read(self.end, 65536)
        except OSError:  # how Linux says that the other side is closed
            return False
        self.shown += new
        return bool(new)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that generates 病 or 高 forever, at most 4000 tokens."""
    model, tokenizer = model_with_tokenizer(TEXTS, 800, max_positions=8000, tie_embeddings=False)
    weight = model.get_output_embeddings().weight.data.zero_()
    for character, sign in (("病", 1.0), ("高", -1.0)):
        (token,) = tokenizer(character)["input_ids"]
        weight[token] = sign
    folder = tmp_path_factory.mktemp("talker")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def terminal(talker: Path) -> Iterator[Terminal]:
    command = ("-m", "medgpt", "chat", str(talker), "--max-new-tokens", "100000")
    terminal = Terminal(sys.executable, *command)
    yield terminal
    terminal.close()


def test_chat_handles_ctrl_c_long_questions_and_the_end(terminal: Terminal, talker: Path) -> None:
    greeting = terminal.wait_for_text("> ")
    hint = "Enter an empty line to quit; press Ctrl-C to stop an answer."
    assert greeting.lstrip().startswith(f"{talker}. {hint}")
    assert "Loading" not in greeting

    terminal.type("什么是高血压?\n")
    terminal.wait_for_text("什么是高血压?\r\n")
    terminal.wait_for_text("高")  # as soon as it is said, thousands before the last
    terminal.type(CTRL_C)
    terminal.wait_for_text("(stopped; this exchange is dropped)\r\n> ")

    terminal.type("长" * 4000 + "\n")
    terminal.wait_for_text("(the question is too long for this model; shorten it)\r\n> ")

    terminal.type(CTRL_D)
    assert terminal.exit_code() == 0
    assert terminal.shown == b"\r\n"


def test_the_oldest_exchanges_are_dropped_when_the_history_is_too_long(talker: Path) -> None:
    tokenizer = load_tokenizer(str(talker))
    exchange = [Message("user", "高血压"), Message("assistant", "慢性病")]
    question = Message("user", "血压")
    length = len(generation_prompt_ids(tokenizer, [*exchange, question]))

    for max_tokens, kept in (
        (10_000, [*exchange * 3, question]),
        (length, [*exchange, question]),
        (length - 1, [question]),
        (3, []),
    ):
        assert truncate_history([*exchange * 3, question], tokenizer, max_tokens) == kept


def test_a_model_that_cannot_generate_is_refused(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"holds BertForMaskedLM, which cannot generate text"):
        run_chat(str(tmp_path), 8, 0.0)
