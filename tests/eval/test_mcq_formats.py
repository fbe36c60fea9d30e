"""Each layout, on a row as its data set publishes it and on real files."""

from pathlib import Path
from typing import Any

import pytest

from medgpt.config.base import ConfigError
from medgpt.data.sources.readers import read_located_rows
from medgpt.eval.tasks.mcq_formats import McqQuestion, read_mcq_questions
from medgpt.sample_corpus.exam_questions import exam_questions
from medgpt.sample_corpus.generator import CorpusGenerator

FOUR = {"A": "one", "B": "two", "C": "three", "D": "four"}
ROWS: dict[str, tuple[dict[str, Any], str]] = {  # a row, its right answer
    "sample": (
        {"id": "x", "question": "q", "options": FOUR, "answer": "B", "department": "内科"},
        "B",
    ),
    "cmexam": (
        {"Question": "q", "Options": "A one\nB two\nC three\nD four", "Answer": "ABD"}
        | {"Clinical Department": "内科"},
        "ABD",
    ),
    "xmedbench": (
        {"question": "q", "options": "(A) one.\n(B) two.\n(C) three.\n(D) four.", "answer": "(B)"}
        | {"source": "cmb-single"},
        "B",
    ),
    "mmedbench": (
        {"question": "q", "options": FOUR, "answer": "two", "answer_idx": "B", "meta_info": "x"},
        "B",
    ),
    "medqa": ({"question": "q", "options": FOUR, "answer": "two", "answer_idx": "B"}, "B"),
    "cmb": (
        {"question": "q", "option": FOUR | {"E": ""}, "answer": "AC", "question_type": "多项选择题"}
        | {"exam_type": "医师考试", "exam_class": "执业医师", "exam_subject": "临床执业医师"},
        "AC",
    ),
    "medmcqa": (
        {"id": "x", "question": "q", "opa": "one", "opb": "two", "opc": "three", "opd": "four"}
        | {"cop": 0, "choice_type": "single", "exp": "e", "subject_name": "Anatomy"},
        "A",
    ),
    "safetybench": (
        {"id": 1, "question": "q", "options": list(FOUR.values()), "answer": 3, "category": "c"},
        "D",
    ),
    "cmmlu": ({"": 0, "Question": "q", **FOUR, "Answer": "C"}, "C"),
    "ceval": ({"id": "0", "question": "q", **FOUR, "answer": "D", "explanation": ""}, "D"),
}


def read(layout: str, *rows: dict[str, Any]) -> list[McqQuestion]:
    return read_mcq_questions(layout, [(f"file row {i}", row) for i, row in enumerate(rows, 1)])


@pytest.mark.parametrize("layout", ROWS)
def test_a_published_row_is_read(layout: str):
    row, answer = ROWS[layout]
    (question,) = read(layout, row)
    assert question.text == "q"
    assert question.options == FOUR
    assert question.answer == answer
    assert question.multiple == (len(answer) > 1)


@pytest.mark.parametrize("hub", [False, True], ids=["authors", "hub"])
def test_pubmedqa_rows_are_read_from_the_authors_files_and_the_hub(hub: bool):
    row = {"pmid": "7", "QUESTION": "q", "CONTEXTS": ["a", "b"], "final_decision": "maybe"}
    if hub:
        row = {"pubid": 7, "question": "q", "context": {"contexts": ["a", "b"]}}
        row |= {"final_decision": "maybe"}
    (question,) = read("pubmedqa", row)
    assert (question.id, question.context, question.answer) == ("7", "a\nb", "C")
    assert question.options == {"A": "yes", "B": "no", "C": "maybe"}


def test_the_first_number_of_medmcqa_is_inferred_from_the_data():
    row = ROWS["medmcqa"][0]
    from_one = read("medmcqa", row | {"cop": 4}, row | {"cop": 1, "id": "y"})
    assert [question.answer for question in from_one] == ["D", "A"]
    from_zero = read("medmcqa", row | {"cop": 0}, row | {"cop": 3, "id": "y"})
    assert [question.answer for question in from_zero] == ["A", "D"]
    with pytest.raises(ConfigError, match="may count from 0 or from 1"):
        read("medmcqa", row | {"cop": 2})
    with pytest.raises(ConfigError, match=r"row 2 does not fit .* test sets have no answers"):
        read("medmcqa", row, row | {"cop": -1, "id": "y"})


def test_the_file_name_is_the_subject_slice(tmp_path: Path):
    for name, answer in (("anatomy", "A"), ("virology", "B")):
        text = f",Question,A,B,C,D,Answer\n0,what is {name}?,one,two,three,four,{answer}\n"
        (tmp_path / f"{name}.csv").write_text(text, "utf-8")
    questions = read_mcq_questions("cmmlu", read_located_rows([str(tmp_path / "*.csv")]))
    assert [q.slices for q in questions] == [{"subject": "anatomy"}, {"subject": "virology"}]


def test_an_option_may_run_over_several_lines():
    row = {"Question": "q", "Options": "A one\nof two lines\nB Big\nC x", "Answer": "A"}
    assert read("cmexam", row)[0].options == {"A": "one\nof two lines", "B": "Big", "C": "x"}


def test_a_line_that_begins_with_another_letter_belongs_to_the_option_before_it():
    options = "A 维生素\nA 缺乏\nB 血型为\nB. 或 AB\nC 肝炎\nE 抗原\nD x"
    found = read("cmexam", {"Question": "q", "Options": options, "Answer": "B"})[0].options
    assert found == {
        "A": "维生素\nA 缺乏",
        "B": "血型为\nB. 或 AB",
        "C": "肝炎\nE 抗原",
        "D": "x",
    }


def test_equal_questions_count_once_and_contradicting_answers_are_an_error():
    row = ROWS["xmedbench"][0]
    assert len(read("xmedbench", row, row)) == 1
    with pytest.raises(
        ConfigError, match=r"row 3 is the same question as file row 1, .* answers are C and B"
    ):
        read("xmedbench", row, row, row | {"answer": "(C)"})


@pytest.mark.parametrize("answer", ["", "见解析", "F"])
def test_an_answer_without_an_option_is_an_error(answer: str):
    with pytest.raises(ConfigError, match="file row 1"):
        read("cmexam", ROWS["cmexam"][0] | {"Answer": answer})


def test_a_question_needs_two_options():
    with pytest.raises(ConfigError, match="has 1 options"):
        read("cmb", ROWS["cmb"][0] | {"option": {"A": "one", "B": " "}, "answer": "A"})


def test_a_single_choice_question_with_two_right_answers_is_an_error():
    with pytest.raises(ConfigError, match="2 right answers, but its type has one"):
        read("cmb", ROWS["cmb"][0] | {"question_type": "单项选择题"})


def test_the_sample_corpus_is_read():
    rows = [("corpus", row) for row in exam_questions(CorpusGenerator())]
    questions = read_mcq_questions("sample", rows)
    assert len(questions) == len(rows) > 100
    assert all(q.slices["department"] for q in questions)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("layout", "file", "count", "several"),
    [
        ("cmexam", "mcq/cmexam_explained.jsonl", 561, 11),
        ("mmedbench", "mcq/mmedbench_zh_rationale.jsonl", 523, 0),
        ("pubmedqa", "mcq/pubmedqa_l_en.jsonl", 500, 0),
        ("xmedbench", "mcq/xmedbench_zh.jsonl", 3029, 31),  # 151 rows are repeated
        ("safetybench", "safety/safetybench_health_zh.jsonl", 407, 0),
    ],
)
def test_the_real_files_are_read(
    shared_data: Path, layout: str, file: str, count: int, several: int
):
    questions = read_mcq_questions(layout, read_located_rows([str(shared_data / file)]))
    assert (len(questions), sum(q.multiple for q in questions)) == (count, several)
