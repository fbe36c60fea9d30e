"""What to ask a model, and how it is scored."""

import difflib
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Literal, Self

from annotated_types import Ge, Len
from pydantic import Field, model_validator

from medgpt.config.base import Config, Count, DataPath, ModelPath, Name
from medgpt.config.data import SourceConfig
from medgpt.config.gates import parse_gate
from medgpt.config.reply_tasks import (
    GenerationConfig,
    KeyPointsConfig,
    SafetyConfig,
    TaskConfig,
    TriageConfig,
)
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
    """Run, path, URI or hub id of the model; RUN_OR_MODEL on the command line sets it."""
    parent: DataPath | None = None
    """Run directory of an earlier evaluation that gates and the report compare with."""
    untrained: bool = False
    """Score the same architecture with fresh weights instead, drawn with run.seed: what a model
    that learnt nothing reaches."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""


class EvalPoolConfig(Config):
    batch_tokens: Count = 2048
    """Most tokens, padding included, that one forward pass scores. A GPU wants more."""
    batch_replies: Count = 32
    """Replies that are generated together."""
    window_tokens: Annotated[int, Ge(16)] = 1024
    """A longer text is weighed in windows of so many tokens (or of the model's positions, if they
    are fewer); each begins in the middle of the one before and counts what is new."""


class McqConfig(TaskConfig):
    """Multiple choice."""

    name: Name = "mcq"
    """How results and gates call it."""
    paths: Annotated[tuple[DataPath, ...], Len(1)]
    """Files, globs, directories or fsspec URIs: JSON, JSON lines, CSV or Parquet."""
    layout: McqFormat
    """The columns that the rows have, by the data set that brought them; see the README."""
    language: Literal["auto", "zh", "en"] = "auto"
    """Of the prompt around a question; auto goes by its characters."""
    scoring: Literal["letter", "option", "generation"] = "letter"
    """letter: the likeliest letter after the listed options. option: the likeliest text of an
    option after the bare question, also per character. generation: a reply, read strictly."""
    answers: Literal["all", "one", "several"] = "all"
    """Take all questions, those with one right option, or those with several."""
    prompt: Literal["plain", "chat"] = "plain"
    """plain: a text to continue. chat: a turn of the model's chat template."""
    shots: Annotated[int, Ge(0)] = 0
    """Solved examples in front of each question."""
    shots_paths: tuple[DataPath, ...] = ()
    """Where the examples are, in the same layout. Where a file is a subject (cmmlu, ceval), a
    question's examples are of its own."""
    max_new_tokens: Count = 128
    """Longest reply with scoring=generation."""

    @model_validator(mode="after")
    def _check_shots(self) -> Self:
        if bool(self.shots) != bool(self.shots_paths):
            raise ValueError(
                f"shots={self.shots} and shots_paths go together; set both or neither, and take "
                "examples that are not among the questions"
            )
        return self


class NllConfig(TaskConfig):
    """Negative log-likelihood of texts, by source. `limit` counts texts of each source."""

    name: Name = "nll"
    """How results and gates call it."""
    sources: tuple[SourceConfig, ...] = ()
    """Held-out texts."""
    general: bool = False
    """Also weigh public-domain prose that ships with medgpt, Chinese and English, as the sources
    general_zh and general_en: what a model loses there it has forgotten."""

    @model_validator(mode="after")
    def _check_has_texts(self) -> Self:
        if not self.sources and not self.general:
            raise ValueError("has nothing to weigh; name sources or set general=true")
        return self


class EvalConfig(Config):
    """configs/eval.toml"""

    run: RunConfig
    gates: tuple[str, ...] = ()
    """What the model must reach, else the command fails: `mcq.accuracy >= parent`, `key_points.gout
    == pass`, `nll.general <= 1.05 * parent`, `high(triage.under) <= 0.01`. A gate names TASK.METRIC
    or TASK.SLICE, or TASK.SLICE.METRIC; low() and high() are the ends of its 95 % interval."""
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
        """(kind, config, name) of every task, in the order of the reference."""
        for kind in TASK_KINDS:
            for task in getattr(self, kind):
                yield kind, task, task.name

    @model_validator(mode="after")
    def _check_task_names(self) -> Self:
        names = Counter(name for _, _, name in self.tasks())
        duplicates = [name for name, times in names.items() if times > 1]
        if duplicates:
            raise ValueError(f"two tasks are called {duplicates[0]}; give each a name of its own")
        if not names:
            raise ValueError("there is no task; add at least one, as [[mcq]] or [[nll]]")
        return self

    @model_validator(mode="after")
    def _check_gates(self) -> Self:
        names = [name for _, _, name in self.tasks()]
        for gate in map(parse_gate, self.gates):
            if gate.task not in names:
                close = difflib.get_close_matches(gate.task, names, n=1)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
                raise ValueError(f"gate {gate.text!r}: no task is called {gate.task}; {hint}")
            if gate.needs_parent and self.model.parent is None:
                raise ValueError(
                    f"gate {gate.text!r} compares with the parent and model.parent is unset; give "
                    "the run directory of the parent's evaluation"
                )
        return self
