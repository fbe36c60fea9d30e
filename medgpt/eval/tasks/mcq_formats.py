"""Reads multiple-choice questions from rows in the layouts of public data sets."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from medgpt.config.base import ConfigError
from medgpt.data.sources.sampling import hash_texts

LETTERS = "ABCDEFGHIJ"
RawRow = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class McqQuestion:
    id: str
    text: str
    options: dict[str, str]  # letter -> text, in order
    answer: str  # right letters, sorted
    multiple: bool  # whether several letters can be right
    context: str = ""
    slices: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """The fields of a question as a layout reads them from a row."""

    text: str
    options: dict[str, str]
    answer: str
    multiple: bool | None = None  # None: true if the answer has several letters
    id: str | None = None
    context: str = ""
    slices: dict[str, str] = field(default_factory=dict)


def read_mcq_questions(layout: str, rows: Iterable[tuple[str, RawRow]]) -> list[McqQuestion]:
    """Return the questions of rows, given with their places; repeated ones without id count once.

    Raises:
        ConfigError: there is no question, an id or a question has two answers, a row does not fit
            the layout, or a right answer is not an option. Messages name places, never texts.
    """
    questions: dict[str, McqQuestion] = {}
    places: dict[str, str] = {}
    rows = list(rows)
    parse_row = LAYOUTS[layout]
    if layout == "medmcqa":
        parse_row = medmcqa([row for _, row in rows]).parse
    for place, row in rows:
        try:
            parsed_row = parse_row(row, place)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ConfigError(
                f"{place} does not fit layout={layout} ({type(error).__name__}: {error}); its "
                f"columns are {', '.join(map(str, row))}"
            ) from None
        question = _check_question(parsed_row, place)
        if question.id in questions and parsed_row.id is not None:
            raise ConfigError(
                f"{place} has the id {parsed_row.id}, as has {places[question.id]}; "
                "an id must stand for one question"
            )
        first = questions.setdefault(question.id, question)
        places.setdefault(question.id, place)
        if first.answer != question.answer:
            raise ConfigError(
                f"{place} is the same question as {places[question.id]}, but their right answers "
                f"are {question.answer} and {first.answer}; correct or remove one of them"
            )
    if not questions:
        raise ConfigError("no question in paths; give files with at least one")
    return list(questions.values())


def _check_question(parsed_row: ParsedRow, place: str) -> McqQuestion:
    options = {k: v.strip() for k, v in parsed_row.options.items() if v and v.strip()}
    answer = "".join(sorted(set(parsed_row.answer)))
    if len(options) < 2:
        raise ConfigError(f"{place} has {len(options)} options; a question needs two or more")
    if not answer or not set(answer) <= set(options):
        raise ConfigError(
            f"{place}: its right answer {answer or '(none)'} is not among the options "
            f"{', '.join(options)}; correct or remove it"
        )
    if not parsed_row.text.strip():
        raise ConfigError(f"{place} has an empty question; correct or remove it")
    multiple = len(answer) > 1 if parsed_row.multiple is None else parsed_row.multiple
    if len(answer) > 1 and not multiple:
        raise ConfigError(
            f"{place} has {len(answer)} right answers, but its type has one; correct or remove it"
        )
    return McqQuestion(
        id=parsed_row.id or hash_texts(parsed_row.text, parsed_row.context, *options.values()),
        text=parsed_row.text.strip(),
        options=options,
        answer=answer,
        multiple=multiple,
        context=parsed_row.context.strip(),
        slices={k: v.strip() for k, v in parsed_row.slices.items() if v and v.strip()},
    )


# ---- helpers of the layouts ----

RowParser = Callable[[RawRow, str], ParsedRow]
"""(row, place) -> the fields of its question."""
OPTION_LINE = re.compile(r"^\s*[(（]?([A-J])\s*(?:[)）.．、:：]|\s)\s*", re.MULTILINE)


def split_option_lines(text: str) -> dict[str, str]:
    """Split options that stand on lines of their own: `A text`, `A. text` or `(A) text`.

    A line that does not start with the next letter continues the option before it.
    """
    first_lines: list[re.Match[str]] = []
    for match in OPTION_LINE.finditer(text):
        if match[1] == LETTERS[len(first_lines) : len(first_lines) + 1]:
            first_lines.append(match)
    ends = [*(match.start() for match in first_lines[1:]), len(text)]
    return {m[1]: text[m.end() : end] for m, end in zip(first_lines, ends, strict=False)}


def options_by_letter(options: str | Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Return {letter: text} of options given as lines, as a list or by letter."""
    if isinstance(options, str):
        return split_option_lines(options)
    return dict(options if isinstance(options, Mapping) else zip(LETTERS, options, strict=False))


def answer_letters(text: str) -> str:
    """Return `ACD` for `(A)(C)(D)`, `A,C,D` or `ACD`."""
    if re.sub(r"[A-J\s,、()（）]", "", text):
        raise ValueError("the answer does not consist of option letters")
    return re.sub(r"[^A-J]", "", text)


def _slices(row: RawRow, columns: Mapping[str, str]) -> dict[str, str]:
    """Return {slice: value} for the columns that the row has."""
    return {name: str(row[column]) for name, column in columns.items() if row.get(column)}


@dataclass(frozen=True)
class Layout:
    """A layout that is described by the names of its columns."""

    question: str
    options: str | tuple[str, ...]  # one column, or one per option
    answer: str  # letters, or a number
    id: str | None = None
    first_number: int | None = None  # of the first option, if the answer is a number
    slices: Mapping[str, str] = field(default_factory=dict)  # slice -> column

    def parse(self, row: RawRow, place: str) -> ParsedRow:
        columns = self.options
        options = row[columns] if isinstance(columns, str) else [row[name] for name in columns]
        return ParsedRow(
            row[self.question],
            options_by_letter(options),
            self._answer(row[self.answer]),
            multiple=None if self.first_number is None else False,
            id=str(row[self.id]) if self.id else None,
            slices=_slices(row, self.slices),
        )

    def _answer(self, answer: Any) -> str:
        if self.first_number is None:
            return answer_letters(answer)
        number = int(answer) - self.first_number
        if number < 0:
            raise ValueError("the answer is below the first number; test sets have no answers")
        return LETTERS[number]


# ---- the layouts: medgpt/eval/README.md lists their columns ----
# On GitHub: williamliujl/CMExam, jind11/MedQA, medmcqa/medmcqa, FreedomIntelligence/CMB,
# pubmedqa/pubmedqa, thu-coai/SafetyBench, haonan-li/CMMLU, hkust-nlp/ceval.

CMEXAM_SLICES = {
    "department": "Clinical Department",
    "discipline": "Medical Discipline",
    "competency": "Area of Competency",
}
MEDQA = Layout("question", "options", "answer_idx", slices={"chapter": "meta_info"})
MEDMCQA = Layout(
    "question",
    ("opa", "opb", "opc", "opd"),
    "cop",
    id="id",
    first_number=0,
    slices={"subject": "subject_name"},
)
XMEDBENCH = Layout("question", "options", "answer", slices={"source": "source"})


def xmedbench(row: RawRow, place: str) -> ParsedRow:
    """Parse a row whose options end with a full stop: `(A) text.`"""
    question = XMEDBENCH.parse(row, place)
    options = {k: text.rstrip().removesuffix(".") for k, text in question.options.items()}
    return replace(question, options=options)


def medmcqa(rows: Sequence[RawRow]) -> Layout:
    """Return the layout of rows that count from 0 (on the hub) or from 1 (in the authors' files).

    A 0 among them means from 0, a 4 from 1.
    """
    numbers = {int(row["cop"]) for row in rows if "cop" in row}
    if rows and not numbers & {0, 4}:
        raise ConfigError("no cop is 0 or 4, so it may count from 0 or from 1; add more rows")
    return replace(MEDMCQA, first_number=0 if 0 in numbers else 1)


def cmb(row: RawRow, place: str) -> ParsedRow:
    """Parse a row whose question_type says whether several options can be right."""
    return ParsedRow(
        row["question"],
        dict(row["option"]),
        answer_letters(row["answer"]),
        multiple=row["question_type"].startswith("多") if row.get("question_type") else None,
        id=str(row["id"]) if row.get("id") is not None else None,
        slices=_slices(row, {"exam": "exam_type", "subject": "exam_subject"}),
    )


def pubmedqa(row: RawRow, place: str) -> ParsedRow:
    """Parse a row of the authors' files (one per abstract) or of the hub."""
    decisions = ["yes", "no", "maybe"]
    contexts = row["CONTEXTS"] if "CONTEXTS" in row else row["context"]["contexts"]
    number = row.get("pmid") or row.get("pubid")
    return ParsedRow(
        row["QUESTION"] if "QUESTION" in row else row["question"],
        options_by_letter(decisions),
        LETTERS[decisions.index(row["final_decision"])],
        multiple=False,
        id=str(number) if number is not None else None,
        context="\n".join(contexts),
    )


def exam_csv(row: RawRow, place: str) -> ParsedRow:
    """Parse a row of CMMLU or C-Eval; the name of the file is the subject."""
    return ParsedRow(
        row["Question"] if "Question" in row else row["question"],
        {letter: str(row[letter]) for letter in "ABCD"},
        answer_letters(row["Answer"] if "Answer" in row else row["answer"]),
        multiple=False,
        slices={"subject": _subject_of_file(place)},
    )


def _subject_of_file(place: str) -> str:
    """Return `anatomy` for `dev/anatomy.csv row 1` or `anatomy_dev.csv row 1`."""
    return re.sub("_(?:dev|val|test)$", "", PurePosixPath(place.rsplit(" row ")[0]).stem)


SUBJECT_FILES = ("cmmlu", "ceval")  # layouts in which each file is a subject
LAYOUTS: dict[str, RowParser] = {
    "sample": Layout(
        "question", "options", "answer", id="id", slices={"department": "department"}
    ).parse,
    "cmexam": Layout("Question", "Options", "Answer", slices=CMEXAM_SLICES).parse,
    "mmedbench": MEDQA.parse,
    "xmedbench": xmedbench,
    "pubmedqa": pubmedqa,
    "safetybench": Layout(
        "question", "options", "answer", id="id", first_number=0, slices={"category": "category"}
    ).parse,
    "cmb": cmb,
    "medqa": MEDQA.parse,
    "medmcqa": MEDMCQA.parse,
    "cmmlu": exam_csv,
    "ceval": exam_csv,
}
