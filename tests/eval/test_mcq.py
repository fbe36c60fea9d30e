"""Multiple choice: prompts, grading, and models that know nothing score at chance."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from scipy.stats import binom

from medgpt.config.base import ConfigError
from medgpt.config.evaluation import McqConfig
from medgpt.data.sources.records import Message
from medgpt.eval.requests import Generate, GenerateResponse, Loglikelihood, LoglikelihoodResponse
from medgpt.eval.task import ItemResult
from medgpt.eval.tasks.mcq import McqTask

ROWS = [
    {"question": f"问题{i}是什么?", "option": dict(zip("ABCDE", options, strict=False))}
    | {"answer": answer, "question_type": "多项选择题" if len(answer) > 1 else "单项选择题"}
    for i, (options, answer) in enumerate(
        [(["甲", "乙", "丙", "丁"], "ABCD"[i % 4]) for i in range(200)]
        + [(["甲", "乙", "丙", "丁", "戊"], "ACE") for _ in range(50)]
    )
]


def write(folder: Path, rows: list[dict]) -> tuple[str, ...]:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return (str(path),)


def make_task(folder: Path, rows: list[dict] | None = None, **keys) -> McqTask:
    paths = write(folder, ROWS if rows is None else rows)
    return McqTask(McqConfig.model_validate({"paths": paths, "layout": "cmb"} | keys), 0)


def mean(items: list[ItemResult], metric: str) -> float:
    values = [item.values[metric] for item in items if metric in item.values]
    assert values
    return sum(v for v in values if isinstance(v, float)) / len(values)


def grade_replies(mcq: McqTask, say: Callable[[Generate], str]) -> list[ItemResult]:
    asked = [request for request in mcq.requests() if isinstance(request, Generate)]
    return mcq.grade({r.id: GenerateResponse(r.id, [say(r)], [True]) for r in asked})


def grade_choices(mcq: McqTask, score: Callable[[Loglikelihood, int], float]) -> list[ItemResult]:
    asked = [request for request in mcq.requests() if isinstance(request, Loglikelihood)]
    return mcq.grade(
        {
            r.id: LoglikelihoodResponse(
                r.id,
                [score(r, i) for i in range(len(r.options))],
                [1] * len(r.options),
                [len(option) for option in r.options],
            )
            for r in asked
        }
    )


# ---- controls ----


def test_a_model_that_always_refuses_scores_nothing(tmp_path: Path):
    items = grade_replies(make_task(tmp_path, scoring="generation"), lambda _: "抱歉，我无法回答。")
    assert mean(items, "accuracy") == 0
    assert mean(items, "refused_rate") == 1
    assert mean(items, "invalid_rate") == 0


def test_a_model_that_always_answers_b_scores_the_share_of_b(tmp_path: Path):
    items = grade_replies(make_task(tmp_path, scoring="generation"), lambda _: "答案：B")
    assert mean(items, "accuracy") == 50 / 250  # and never where several are right
    assert mean(items, "accuracy") <= mean(items, "chance")


def test_a_model_that_lists_all_options_scores_nothing(tmp_path: Path):
    items = grade_replies(make_task(tmp_path, scoring="generation"), lambda _: "A\nB\nC\nD")
    assert mean(items, "accuracy") == 0
    assert mean(items, "invalid_rate") >= 200 / 250


def test_a_model_that_answers_at_random_scores_at_most_chance(tmp_path: Path):
    """At most what guessing reaches in 999 of 1000 runs."""
    rng = random.Random(0)
    items = grade_replies(make_task(tmp_path, scoring="generation"), lambda _: rng.choice("ABCD"))
    right = round(mean(items, "accuracy") * len(items))
    assert right <= binom.ppf(0.999, 200, 1 / 4)  # of the others, where sets are right, none
    assert mean(items[200:], "accuracy") == 0


def test_random_likelihoods_score_at_chance(tmp_path: Path):
    """Within the range of 999 of 1000 guessers, for single options and for sets."""
    rng = random.Random(0)
    items = grade_choices(make_task(tmp_path), lambda *_: rng.random())
    for part, chance in ((items[:200], 1 / 4), (items[200:], 1 / 26)):
        assert mean(part, "chance") == pytest.approx(chance)
        low, high = binom.ppf([0.0005, 0.9995], len(part), chance)
        assert low <= round(mean(part, "accuracy") * len(part)) <= high


def test_a_model_with_equal_likelihoods_always_chooses_the_first(tmp_path: Path):
    items = grade_choices(make_task(tmp_path), lambda *_: -1.0)
    assert {item.shown["chosen"] for item in items} == {"A", "AB"}


# ---- grading ----


def test_the_likeliest_letter_or_set_is_the_answer(tmp_path: Path):
    mcq = make_task(tmp_path)
    right = {q.id: q.answer for q in mcq.questions}
    items = grade_choices(mcq, lambda r, i: float(r.options[i].strip() == right[r.id]))
    assert mean(items, "accuracy") == 1
    assert {item.slices["type"] for item in items} == {"one right", "several right"}


def test_a_subset_of_the_right_letters_is_wrong(tmp_path: Path):
    said = {"A": "AC", "ACE": "ACE", "ACDE": "ACDE"}
    for letters, accuracy in (("AC", 0), ("ACDE", 0), ("ACE", 1)):
        items = grade_replies(
            make_task(tmp_path, ROWS[200:], scoring="generation"), lambda _, x=letters: f"答案：{x}"
        )
        assert mean(items, "accuracy") == accuracy, said


def test_option_texts_are_also_compared_per_character(tmp_path: Path):
    row = ROWS[0] | {"option": {"A": "短", "B": "一个很长的选项"}, "answer": "B"}
    items = grade_choices(
        make_task(tmp_path, [row], scoring="option"), lambda _, i: (-3.0, -7.0)[i]
    )
    assert mean(items, "accuracy") == 0
    assert mean(items, "accuracy_normalised") == 1


# ---- requests ----


def test_letters_are_scored_after_the_listed_options(tmp_path: Path):
    (request,) = make_task(tmp_path, ROWS[:1]).requests()
    assert isinstance(request, Loglikelihood)
    assert request.options == ("A", "B", "C", "D")
    assert isinstance(request.prompt, str)
    assert request.prompt.endswith("题目：问题0是什么?\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：")


def test_a_set_of_letters_ends_with_a_newline(tmp_path: Path):
    (request,) = make_task(tmp_path, ROWS[200:201]).requests()
    assert isinstance(request, Loglikelihood)
    assert len(request.options) == 26  # of five, without none and single ones
    assert {"AB\n", "ABCDE\n"} <= set(request.options)


def test_options_are_scored_after_the_bare_question(tmp_path: Path):
    row = ROWS[0] | {"question": "Which?", "option": {"A": "Yes", "B": "No"}, "answer": "A"}
    (request,) = make_task(tmp_path, [row], scoring="option").requests()
    assert isinstance(request, Loglikelihood)
    assert (request.prompt, request.options) == ("Question: Which?\nAnswer:", (" Yes", " No"))


def test_examples_precede_each_question_and_are_not_asked(tmp_path: Path):
    (tmp_path / "other").mkdir()
    paths = write(tmp_path / "other", ROWS[:20])
    mcq = make_task(tmp_path, ROWS[10:40], shots=3, shots_paths=list(paths))
    (examples,) = mcq.examples.values()
    first = [q.text for q in examples]
    assert len(first) == 3
    assert not {q.id for q in examples} & {q.id for q in mcq.questions}
    for request in mcq.requests():
        assert isinstance(request, Loglikelihood)
        assert isinstance(request.prompt, str)
        assert [text in request.prompt for text in first] == [True] * 3
        assert request.prompt.count("答案：") == 4
    with pytest.raises(ConfigError, match="have 10 questions that are not asked"):
        make_task(tmp_path, ROWS[10:40], shots=11, shots_paths=list(paths))


@pytest.mark.parametrize("layout", ["cmmlu", "ceval"])
def test_examples_come_from_the_subject_of_the_question(tmp_path: Path, layout: str):
    """As in CMMLU and C-Eval: the five examples of the subject's dev file, in order."""
    split = {"cmmlu": "{split}/{subject}.csv", "ceval": "{split}/{subject}_{split}.csv"}[layout]
    for subject in ("anatomy", "virology"):
        for name, count in (("dev", 5), ("val", 7)):
            path = tmp_path / split.format(split=name, subject=subject)
            path.parent.mkdir(exist_ok=True)
            lines = [f"{i},{subject} {name} {i}?,one,two,three,four,B\n" for i in range(count)]
            path.write_text("id,question,A,B,C,D,answer\n" + "".join(lines), "utf-8")
    keys = {"layout": layout, "shots": 5, "shots_paths": [f"{tmp_path}/dev/*.csv"]}
    paths = [f"{tmp_path}/val/*.csv"]
    mcq = McqTask(McqConfig.model_validate({"paths": paths} | keys), 0)
    for question, request in zip(mcq.questions, mcq.requests(), strict=True):
        assert isinstance(request, Loglikelihood)
        asked = re.findall(r"Question: (.*)\?", str(request.prompt))
        subject = question.slices["subject"]
        assert asked == [*(f"{subject} dev {i}" for i in range(5)), question.text.rstrip("?")]
    (tmp_path / split.format(split="dev", subject="virology")).unlink()
    with pytest.raises(ConfigError, match="shots_paths have 0 questions on virology"):
        McqTask(McqConfig.model_validate({"paths": paths} | keys), 0)


def test_a_chat_prompt_gives_examples_as_turns(tmp_path: Path):
    (tmp_path / "other").mkdir()
    keys = {"shots": 1, "shots_paths": list(write(tmp_path / "other", ROWS[:20]))}
    for request in make_task(
        tmp_path, ROWS[30:40], prompt="chat", scoring="generation", **keys
    ).requests():
        assert isinstance(request.prompt, tuple)
        assert [message.role for message in request.prompt] == ["user", "assistant", "user"]
        assert request.prompt[1].content.startswith("答案：")
    plain = make_task(tmp_path, ROWS[30:31], prompt="chat").requests()[0]
    assert isinstance(plain.prompt, tuple)
    assert plain.prompt[0] == Message("user", plain.prompt[0].content)


# ---- identity ----


def test_the_drawn_questions_depend_on_the_seed_and_the_hash_on_the_questions(tmp_path: Path):
    paths = write(tmp_path, ROWS)
    config = McqConfig(paths=paths, layout="cmb", limit=20)
    one, same, other = (McqTask(config, seed) for seed in (0, 0, 1))
    assert len(one.questions) == 20
    assert [q.id for q in one.questions] == [q.id for q in same.questions]
    assert (one.data_hash, one.template) == (same.data_hash, same.template)
    assert one.data_hash != other.data_hash
    fewer = McqTask(McqConfig(paths=paths, layout="cmb", limit=10), 0)
    assert {q.id for q in fewer.questions} < {q.id for q in one.questions}


def test_the_template_changes_with_the_way_of_asking(tmp_path: Path):
    templates = {
        make_task(tmp_path, ROWS[:1], **keys).template
        for keys in ({}, {"scoring": "option"}, {"scoring": "generation"}, {"prompt": "chat"})
    }
    assert len(templates) == 4


# ---- bad input ----


def test_an_empty_set_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no question in paths"):
        make_task(tmp_path, [])


def test_a_right_answer_that_is_no_option_is_an_error_without_its_text(tmp_path: Path):
    rows = [ROWS[0], ROWS[1] | {"answer": "E"}]
    with pytest.raises(ConfigError, match=r"row 2: its right answer E is not among the"):
        make_task(tmp_path, rows)


def test_an_id_used_twice_is_an_error(tmp_path: Path):
    rows = [ROWS[0] | {"id": 7}, ROWS[1] | {"id": 8}, ROWS[2] | {"id": 7}]
    with pytest.raises(ConfigError, match=r"row 3 has the id 7, as has .*row 1;"):
        make_task(tmp_path, rows)


def test_a_question_that_is_repeated_without_id_counts_once(tmp_path: Path):
    assert len(make_task(tmp_path, [ROWS[0], ROWS[1], ROWS[0]]).questions) == 2


def test_rows_of_another_layout_are_an_error_that_names_their_columns(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"row 1 does not fit layout=ceval .*question, opt"):
        make_task(tmp_path, layout="ceval")


def test_an_unknown_layout_is_an_error_that_lists_the_known_ones():
    from medgpt.config.loading import validate

    with pytest.raises(ConfigError, match=r"layout='cmbb': .*'cmexam'.*'ceval'"):
        validate(McqConfig, {"paths": ["x"], "layout": "cmbb"})


def test_option_scoring_needs_a_single_right_answer(tmp_path: Path):
    with pytest.raises(ConfigError, match="scoring=option takes the likeliest option"):
        make_task(tmp_path, scoring="option")
    assert len(make_task(tmp_path, scoring="option", answers="one").questions) == 200
    assert len(make_task(tmp_path, answers="several").questions) == 50
    with pytest.raises(ConfigError, match="no question in paths fits answers=several"):
        make_task(tmp_path, ROWS[:5], answers="several")


def test_a_row_that_is_not_json_is_named(tmp_path: Path):
    (path,) = write(tmp_path, ROWS[:2])
    Path(path).write_text(Path(path).read_text("utf-8") + "{broken\n", "utf-8")
    with pytest.raises(ConfigError, match=r"questions.jsonl row 3: is not JSON"):
        McqTask(McqConfig(paths=(path,), layout="cmb"), 0)
