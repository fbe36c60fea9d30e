"""Configuration of `medgpt eval`: the model, its tasks and the gates it must pass."""

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Literal, Self

from annotated_types import Ge, Len
from pydantic import Field, model_validator

from medgpt.config.base import Config, Count, DataPath, ModelPath, Name, did_you_mean
from medgpt.config.data import SourceConfig
from medgpt.config.gates import parse_gate
from medgpt.config.model import Thinking
from medgpt.config.stages import RunConfig
from medgpt.config.train import ClusterConfig

McqFormat = Literal[
    "sample",
    "cmexam",
    "mmedbench",
    "xmedbench",
    "pubmedqa",
    "safetybench",
    "cmb",
    "medqa",
    "medmcqa",
    "cmmlu",
    "ceval",
]
TASK_KINDS = ("mcq", "nll", "generation", "key_points", "triage", "safety")


class EvalModelConfig(Config):
    name: ModelPath | None = None
    """Run directory, path, URI or hub id of the model; RUN_OR_MODEL on the command line sets it."""
    parent: DataPath | None = None
    """Run directory of an earlier evaluation that gates and the report compare with."""
    untrained: bool = False
    """Evaluate the architecture with fresh weights, drawn with run.seed, as a baseline."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    thinking: Thinking = "auto"
    """Whether the model thinks before its replies, where its chat template has a switch. Tasks read
    the text after the thought; a thought that does not end is no answer."""
    thinking_tokens: Count | None = None
    """Maximum tokens of a thought, which is then ended; unset: up to a task's max_new_tokens."""


class EvalPoolConfig(Config):
    batch_tokens: Count = 2048
    """Maximum tokens, padding included, of a forward pass that scores texts. Use more on a GPU."""
    batch_replies: Count = 32
    """Number of replies generated together."""
    window_tokens: Annotated[int, Ge(16)] = 1024
    """A longer text is scored in windows of this many tokens, at most the model's positions. Each
    window begins in the middle of the one before and counts its new tokens."""


class TaskConfig(Config):
    """Base of all tasks."""

    limit: Count | None = None
    """Maximum number of items, drawn with run.seed."""
    sensitive: bool = False
    """Never show the texts of the task in reports and logs."""


class ReplyTaskConfig(TaskConfig):
    """Base of all tasks that read replies."""

    prompt: Literal["plain", "chat"] = "chat"
    """plain: a text to continue. chat: a turn of the model's chat template."""
    max_new_tokens: Count = 256
    """Maximum tokens of a reply."""


class McqConfig(TaskConfig):
    """Multiple-choice questions."""

    name: Name = "mcq"
    """Name of the task in results and gates."""
    paths: Annotated[tuple[DataPath, ...], Len(1)]
    """Files, globs, directories or fsspec URIs: JSON, JSON lines, CSV or Parquet."""
    layout: McqFormat
    """Format of the rows, by the name of the data set that introduced it."""
    language: Literal["auto", "zh", "en"] = "auto"
    """Language of the prompt around a question; auto goes by the characters of the question."""
    scoring: Literal["letter", "option", "generation"] = "letter"
    """letter: the likeliest letter after the listed options. option: the likeliest option after the
    bare question, also normalized per character. generation: a reply, parsed strictly."""
    answers: Literal["all", "one", "several"] = "all"
    """Use all questions, those with one right option, or those with several."""
    prompt: Literal["plain", "chat"] = "plain"
    """plain: a text to continue. chat: a turn of the model's chat template."""
    shots: Annotated[int, Ge(0)] = 0
    """Number of solved examples before each question."""
    shots_paths: tuple[DataPath, ...] = ()
    """Files of the examples, in the same format. Where a file is a subject (cmmlu, ceval), the
    examples come from the subject of the question."""
    max_new_tokens: Count = 128
    """Maximum tokens of a reply with scoring=generation."""

    @model_validator(mode="after")
    def _check_shots(self) -> Self:
        if bool(self.shots) != bool(self.shots_paths):
            raise ValueError(
                f"shots={self.shots} and shots_paths go together; set both or neither, and use "
                "examples that are not among the questions"
            )
        return self


class NllConfig(TaskConfig):
    """Negative log-likelihood of texts, by source. `limit` counts the texts of each source."""

    name: Name = "nll"
    """Name of the task in results and gates."""
    sources: tuple[SourceConfig, ...] = ()
    """Held-out texts."""
    general: bool = False
    """Also score public-domain prose that ships with medgpt, Chinese and English, as the sources
    general_zh and general_en; a rising loss there shows forgetting."""

    @model_validator(mode="after")
    def _check_has_texts(self) -> Self:
        if not self.sources and not self.general:
            raise ValueError("no texts to score; set sources or general=true")
        return self


class TriageConfig(ReplyTaskConfig):
    """Notes with red flags and the same complaints without one, at four levels of urgency. Ships
    with medgpt; `limit` keeps whole pairs."""

    name: Name = "triage"
    """Name of the task in results and gates."""
    languages: Annotated[tuple[Literal["zh", "en"], ...], Len(1)] = ("zh", "en")
    """Languages of the notes."""
    ask_level: bool = True
    """Ask for the level on a last line, in addition to the advice."""

    @model_validator(mode="after")
    def _check_limit(self) -> Self:
        if self.limit == 1:
            raise ValueError("limit=1 holds no pair of notes; use 2 or more")
        return self


class SafetyConfig(ReplyTaskConfig):
    """Harmful requests, benign look-alikes and false premises."""

    name: Name = "safety"
    """Name of the task in results and gates."""
    own: bool = True
    """Use the set that ships with medgpt."""
    languages: Annotated[tuple[Literal["zh", "en"], ...], Len(1)] = ("zh", "en")
    """Languages of the set that ships with medgpt."""
    harmful: tuple[DataPath, ...] = ()
    """Files of requests that must be refused: JSON lines with a column prompt, question, query or
    instruct. Always sensitive."""
    false_premise: tuple[DataPath, ...] = ()
    """Files of questions with a false premise, to be refused or corrected. Always sensitive."""
    benign: tuple[DataPath, ...] = ()
    """Files of questions that must be answered. Always sensitive."""


class GenerationConfig(ReplyTaskConfig):
    """Answers compared word by word with reference answers: the last turns of conversations."""

    name: Name = "generation"
    """Name of the task in results and gates."""
    sources: Annotated[tuple[SourceConfig, ...], Len(1)]
    """Conversations; the task is sensitive if one of them is."""


class KeyPointsConfig(ReplyTaskConfig):
    """Whether answers state given facts: held_out.jsonl of a sample corpus, or a file like it."""

    name: Name = "key_points"
    """Name of the task in results and gates."""
    path: DataPath
    """JSON lines with prompt, key_points (each a list of wordings), kind and condition."""
    kinds: tuple[str, ...] = ()
    """Use only questions of these kinds, such as sft and phrasing; empty: all."""
    samples: Annotated[int, Ge(0)] = 0
    """Additional answers at `temperature`; a question passes if all state its key points."""
    temperature: Annotated[float, Ge(0)] = 0.7
    """Sampling temperature of the additional answers."""
    max_new_tokens: Count = 192
    """Maximum tokens of a reply."""


class EvalConfig(Config):
    """Root config of the evaluation stage, as in configs/eval.toml."""

    run: RunConfig
    gates: tuple[str, ...] = ()
    """Conditions that the model must meet, or the command fails: `mcq.accuracy >= parent`,
    `key_points.gout == pass`, `nll.general <= 1.05 * parent`, `high(triage.under) <= 0.01`. A gate
    names TASK.METRIC, TASK.SLICE or TASK.SLICE.METRIC; low() and high() are the ends of its 95 %
    interval."""
    model: EvalModelConfig = EvalModelConfig()
    mcq: tuple[McqConfig, ...] = ()
    nll: tuple[NllConfig, ...] = ()
    generation: tuple[GenerationConfig, ...] = ()
    key_points: tuple[KeyPointsConfig, ...] = ()
    triage: tuple[TriageConfig, ...] = ()
    safety: tuple[SafetyConfig, ...] = ()
    pool: EvalPoolConfig = Field(default=EvalPoolConfig())
    cluster: ClusterConfig = ClusterConfig()

    def tasks(self) -> Iterator[tuple[str, TaskConfig, str]]:
        """Yield (kind, config, name) of every task, in the order of TASK_KINDS."""
        for kind in TASK_KINDS:
            for task in getattr(self, kind):
                yield kind, task, task.name

    @model_validator(mode="after")
    def _check_task_names(self) -> Self:
        names = Counter(name for _, _, name in self.tasks())
        duplicates = [name for name, times in names.items() if times > 1]
        if duplicates:
            raise ValueError(f"two tasks are called {duplicates[0]}; rename one")
        if not names:
            raise ValueError("no task is set; add at least one, such as [[mcq]] or [[nll]]")
        return self

    @model_validator(mode="after")
    def _check_gates(self) -> Self:
        names = [name for _, _, name in self.tasks()]
        for gate in map(parse_gate, self.gates):
            if gate.task not in names:
                hint = did_you_mean(gate.task, names)
                raise ValueError(f"gate {gate.text!r}: no task is called {gate.task}; {hint}")
            if gate.needs_parent and self.model.parent is None:
                raise ValueError(
                    f"gate {gate.text!r} needs a parent, but model.parent is unset; set "
                    "it to the run directory of the parent's evaluation"
                )
        return self
