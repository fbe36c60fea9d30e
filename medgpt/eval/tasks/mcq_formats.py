"""Reads multiple-choice questions from rows in the layouts of public data sets."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
    parse_row = LAYOUTS[layout](rows)
    for place, row in rows:
        try:
            parsed_row = parse_row(row)
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

RowParser = Callable[[RawRow], ParsedRow]
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


def answer_letters(text: str) -> str:
    """Return `ACD` for `(A)(C)(D)`, `A,C,D` or `ACD`."""
    if re.sub(r"[A-J\s,、()（）]", "", text):
        raise ValueError("the answer does not consist of option letters")
    return re.sub(r"[^A-J]", "", text)


def letter_options(options: Sequence[str]) -> dict[str, str]:
    return dict(zip(LETTERS, options, strict=False))


def _slices(row: RawRow, **columns: str) -> dict[str, str]:
    """Return {slice: value} for the columns that the row has."""
    return {name: str(row[column]) for name, column in columns.items() if row.get(column)}


# ---- the layouts ----


def sample(rows: Sequence[tuple[str, RawRow]]) -> RowParser:
    """id, question, options {letter: text}, answer (letters), department: medgpt's sample corpus"""
    return lambda row: ParsedRow(
        row["question"],
        dict(row["options"]),
        answer_letters(row["answer"]),
        id=str(row["id"]),
        slices=_slices(row, department="department"),
    )


def cmexam(rows: Sequence[tuple[str, RawRow]]) -> RowParser:
    """Question, Options (a line each), Answer (letters); https://github.com/williamliujl/CMExam"""
    return lambda row: ParsedRow(
        row["Question"],
        split_option_lines(row["Options"]),
        answer_letters(row["Answer"]),
        slices=_slices(
            row,
            department="Clinical Department",
            discipline="Medical Discipline",
            competency="Area of Competency",
        ),
    )


def xmedbench(rows: Sequence[tuple[str, RawRow]]) -> RowParser:
    """question, options (`(A) text.` a line each), answer `(A)`, source"""
    return lambda row: ParsedRow(
        row["question"],
        {
            letter: text.rstrip().removesuffix(".")
            for letter, text in split_option_lines(row["options"]).items()
        },
        answer_letters(row["answer"]),
        slices=_slices(row, source="source"),
    )


def medqa(rows: Sequence[tuple[str, RawRow]]) -> RowParser:
    """question, options {letter: text}, answer_idx; https://github.com/jind11/MedQA, MMedBench"""
    return lambda row: ParsedRow(
        row["question"],
        dict(row["options"]),
        answer_letters(row["answer_idx"]),
        slices=_slices(row, chapter="meta_info"),
    )


def cmb(rows: Sequence[tuple[str, RawRow]]) -> RowParser:
    """question, option {letter: text}, answer, question_type, exam_type, exam_class, exam_subject;
    https://github.com/FreedomIntelligence/CMB"""
    return lambda row: ParsedRow(
        row["question"],
        dict(row["option"]),
        answer_letters(row["answer"]),
        multiple=row["question_type"].startswith("多") if row.get("question_type") else None,
        id=str(row["id"]) if row.get("id") is not None else None,
        slices=_slices(row, exam="exam_type", subject="exam_subject"),
    )


def medmcqa(rows: Sequence[tuple[str, RawRow]]) -> RowParser:
    """id, question, opa to opd, cop, subject_name; https://github.com/medmcqa/medmcqa

    `cop` counts from 0 on the Hugging Face hub and from 1 in the authors' files: rows with a 0
    count from 0, rows with a 4 count from 1.
    """
    numbers = {int(row["cop"]) for _, row in rows if "cop" in row}
    if len(rows) > 0 and not numbers & {0, 4}:
        raise ConfigError("no cop is 0 or 4, so it may count from 0 or from 1; add more rows")
    first_number = 0 if 0 in numbers else 1
    return lambda row: ParsedRow(
        row["question"],
        letter_options([row["opa"], row["opb"], row["opc"], row["opd"]]),
        LETTERS[_nonnegative(int(row["cop"]) - first_number)],
        multiple=False,
        id=str(row["id"]),
        slices=_slices(row, subject="subject_name"),
    )


def _nonnegative(number: int) -> int:
    if number < 0:
        raise ValueError("the number of the answer is below the first; test sets have no answers")
    return number


def pubmedqa(rows: Sequence[tuple[str, RawRow]]) -> RowParser:
    """QUESTION, CONTEXTS, final_decision (authors' files, one row per abstract) or question,
    context.contexts, final_decision (hub); https://github.com/pubmedqa/pubmedqa"""
    decisions = ["yes", "no", "maybe"]

    def parse_row(row: RawRow) -> ParsedRow:
        contexts = row["CONTEXTS"] if "CONTEXTS" in row else row["context"]["contexts"]
        number = row.get("pmid") or row.get("pubid")
        return ParsedRow(
            row["QUESTION"] if "QUESTION" in row else row["question"],
            letter_options(decisions),
            LETTERS[decisions.index(row["final_decision"])],
            multiple=False,
            id=str(number) if number is not None else None,
            context="\n".join(contexts),
        )

    return parse_row


def safetybench(rows: Sequence[tuple[str, RawRow]]) -> RowParser:
    """id, question, options [texts], answer (number from 0), category;
    https://github.com/thu-coai/SafetyBench"""
    return lambda row: ParsedRow(
        row["question"],
        letter_options(row["options"]),
        LETTERS[_nonnegative(int(row["answer"]))],
        multiple=False,
        id=str(row["id"]),
        slices=_slices(row, category="category"),
    )


def exam_csv(rows: Sequence[tuple[str, RawRow]]) -> RowParser:
    """Question or question, A to D, Answer or answer: the CSV files of CMMLU
    (https://github.com/haonan-li/CMMLU) and C-Eval (https://github.com/hkust-nlp/ceval)"""
    subjects = {id(row): _subject_of_file(place) for place, row in rows}

    def parse_row(row: RawRow) -> ParsedRow:
        return ParsedRow(
            row["Question"] if "Question" in row else row["question"],
            {letter: str(row[letter]) for letter in "ABCD"},
            answer_letters(row["Answer"] if "Answer" in row else row["answer"]),
            multiple=False,
            slices={"subject": subjects[id(row)]},
        )

    return parse_row


def _subject_of_file(place: str) -> str:
    """Return `anatomy` for `dev/anatomy.csv row 1` or `anatomy_dev.csv row 1`."""
    return re.sub("_(?:dev|val|test)$", "", PurePosixPath(place.rsplit(" row ")[0]).stem)


SUBJECT_FILES = ("cmmlu", "ceval")  # layouts in which each file is a subject


LAYOUTS: dict[str, Callable[[Sequence[tuple[str, RawRow]]], RowParser]] = {
    "sample": sample,
    "cmexam": cmexam,
    "mmedbench": medqa,
    "xmedbench": xmedbench,
    "pubmedqa": pubmedqa,
    "safetybench": safetybench,
    "cmb": cmb,
    "medqa": medqa,
    "medmcqa": medmcqa,
    "cmmlu": exam_csv,
    "ceval": exam_csv,
}
