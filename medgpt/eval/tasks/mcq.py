"""Multiple choice, by the likelihood of letters or options or by generated replies."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import xxhash

from medgpt.config.base import ConfigError
from medgpt.config.evaluation import McqConfig
from medgpt.data.sources.readers import read_located_rows
from medgpt.data.sources.records import Message
from medgpt.data.sources.sampling import draw_subset
from medgpt.eval.requests import (
    Generate,
    GenerateResponse,
    Loglikelihood,
    LoglikelihoodResponse,
    Prompt,
    Request,
    Response,
    repr_as,
)
from medgpt.eval.task import NO_RULES, ItemResult, MetricValue, rules_digest
from medgpt.eval.tasks import mcq_parsing
from medgpt.eval.tasks.mcq_formats import SUBJECT_FILES, McqQuestion, read_mcq_questions
from medgpt.eval.tasks.mcq_parsing import parse_mcq_reply
from medgpt.medical.text import script_language

PROMPT_WORDS = {
    "zh": {
        "one": "以下是一道医学单项选择题，请选出唯一正确的选项。\n\n",
        "some": "以下是一道医学多项选择题，请选出所有正确的选项。\n\n",
        "context": "资料：",
        "question": "题目：",
        "answer": "答案：",
        "space": "",
        "ask": "请直接回答，格式为“答案：选项字母”。",
    },
    "en": {
        "one": "The following is a medical question with one correct option.\n\n",
        "some": "The following is a medical question with several correct options.\n\n",
        "context": "Abstract: ",
        "question": "Question: ",
        "answer": "Answer:",
        "space": " ",
        "ask": 'Reply with "Answer:" and the letter of your choice.',
    },
}
CandidatesByLetters = dict[str, str]
"""Letters of a possible answer -> text that the model is scored on."""


class McqTask:
    """Accuracy, with invalid and refused replies counted apart.

    If several options are right, the answer must name exactly those.
    """

    kind = "mcq"

    def __init__(self, config: McqConfig, seed: int) -> None:
        """Raises ConfigError if the questions or the examples cannot be read."""
        self.config, self.name, self.sensitive = config, config.name, config.sensitive
        questions = self._read_questions(config.paths)
        self.questions = draw_subset(((q.id, q) for q in questions), config.limit, seed)
        self.examples = self._draw_examples(seed)
        examples = [example for drawn in self.examples.values() for example in drawn]
        examples_repr = f"[{', '.join(repr_as('Question', example) for example in examples)}]"
        style_parts = [config.scoring, config.prompt, str(config.max_new_tokens), examples_repr]
        self.template = f"mcq-{config.scoring}-{_digest(repr(PROMPT_WORDS), *style_parts)}"
        self.rules = rules_digest(mcq_parsing) if config.scoring == "generation" else NO_RULES
        self.data_hash = _digest(*(repr_as("Question", question) for question in self.questions))
        if config.scoring == "option" and any(q.multiple for q in self.questions):
            raise ConfigError(
                "scoring=option takes the likeliest option, but some questions have several right "
                "ones; use letter or generation, or set answers=one"
            )

    def requests(self) -> Sequence[Request]:
        return [self._request(question) for question in self.questions]

    def grade(self, responses: Mapping[str, Response]) -> list[ItemResult]:
        return [
            self._grade_question(question, responses[question.id]) for question in self.questions
        ]

    def _read_questions(self, paths: Sequence[str]) -> list[McqQuestion]:
        questions = read_mcq_questions(self.config.layout, read_located_rows(paths))
        kinds = {"all": (False, True), "one": (False,), "several": (True,)}[self.config.answers]
        if questions := [question for question in questions if question.multiple in kinds]:
            return questions
        raise ConfigError(f"no question in paths fits answers={self.config.answers}; use all")

    def _draw_examples(self, seed: int) -> dict[str, list[McqQuestion]]:
        """Return solved examples by subject; the subject is "" if files are not subjects."""
        if not self.config.shots:
            return {}
        candidates = {q.id: q for q in self._read_questions(self.config.shots_paths)}
        for question in self.questions:
            candidates.pop(question.id, None)
        examples = {}
        for subject in dict.fromkeys(map(self._subject, self.questions)):
            pool = [(id, q) for id, q in candidates.items() if self._subject(q) == subject]
            if len(pool) < self.config.shots:
                about = f" on {subject}" if subject else ""
                raise ConfigError(
                    f"shots={self.config.shots}, but shots_paths have {len(pool)} questions{about} "
                    "that are not asked; give more files, or lower shots"
                )
            examples[subject] = draw_subset(pool, self.config.shots, seed)
        return examples

    def _subject(self, question: McqQuestion) -> str:
        return question.slices["subject"] if self.config.layout in SUBJECT_FILES else ""

    # ---- requests ----

    def _request(self, question: McqQuestion) -> Request:
        prompt = self._prompt(question)
        if self.config.scoring == "generation":
            return Generate(question.id, prompt, self.config.max_new_tokens)
        return Loglikelihood(question.id, prompt, tuple(self._candidates(question).values()))

    def _candidates(self, question: McqQuestion) -> CandidatesByLetters:
        """Return the texts to score, keyed by the letters they stand for."""
        space = self._prompt_words(question)["space"] if self.config.prompt == "plain" else ""
        if self.config.scoring == "option":
            return {letter: space + text for letter, text in question.options.items()}
        if not question.multiple:
            return {letter: space + letter for letter in question.options}
        # a set ends with a newline: without it, the shortest set would be the likeliest
        sizes = range(2, len(question.options) + 1)
        sets = ("".join(letters) for n in sizes for letters in combinations(question.options, n))
        return {letters: f"{space}{letters}\n" for letters in sets}

    def _prompt(self, question: McqQuestion) -> Prompt:
        words = self._prompt_words(question)
        examples = self.examples.get(self._subject(question), ())
        solved = [(self._question_text(q, words), self._answer_text(q, words)) for q in examples]
        text = self._question_text(question, words)
        if self.config.prompt == "plain":
            shots = "".join(f"{shot}{words['answer']}{answer}\n\n" for shot, answer in solved)
            return shots + text + words["answer"]
        instruction = words["ask"] if self.config.scoring == "generation" else ""
        messages: list[Message] = []
        for shot, answer in solved:
            messages.append(Message("user", shot + instruction))
            messages.append(Message("assistant", answer.strip()))
        return (*messages, Message("user", text + instruction))

    def _question_text(self, question: McqQuestion, words: Mapping[str, str]) -> str:
        context = f"{words['context']}{question.context}\n" if question.context else ""
        text = f"{context}{words['question']}{question.text}\n"
        if self.config.scoring == "option":
            return text
        options = "".join(f"{letter}. {text}\n" for letter, text in question.options.items())
        return words["some" if question.multiple else "one"] + text + options

    def _answer_text(self, question: McqQuestion, words: Mapping[str, str]) -> str:
        if self.config.scoring == "option":
            return words["space"] + question.options[question.answer]
        prefix = words["answer"] if self.config.scoring == "generation" else ""
        return (prefix if self.config.prompt == "chat" else "") + words["space"] + question.answer

    def _prompt_words(self, question: McqQuestion) -> Mapping[str, str]:
        language = self.config.language
        return PROMPT_WORDS[script_language(question.text) if language == "auto" else language]

    # ---- grading ----

    def _grade_question(self, question: McqQuestion, response: Response) -> ItemResult:
        candidates = self._candidates(question) if self.config.scoring != "generation" else {}
        match response:
            case LoglikelihoodResponse():
                chosen, values = _grade_logprobs(list(candidates), response, question.answer)
                if self.config.scoring == "letter":
                    del values["accuracy_normalised"]
                reply_shown = {}
            case GenerateResponse():
                chosen, values = _grade_reply(question, response.texts[0])
                reply_shown = {"reply": response.texts[0]}
            case _:
                raise AssertionError(type(response))
        values["chance"] = 1 / (len(candidates) or _num_possible_answers(question))
        values["cut_rate"] = float(response.cut)
        shown = {
            "question": self._question_text(question, self._prompt_words(question)),
            "right": question.answer,
            "chosen": chosen,
            **reply_shown,
        }
        question_type = "several right" if question.multiple else "one right"
        return ItemResult(question.id, values, {"type": question_type, **question.slices}, shown)


def _num_possible_answers(question: McqQuestion) -> int:
    """Return the number of answers to guess from, for chance accuracy."""
    count = len(question.options)
    return 2**count - 1 - count if question.multiple else count


def _grade_logprobs(
    candidates: Sequence[str], response: LoglikelihoodResponse, answer: str
) -> tuple[str, dict[str, MetricValue]]:
    """Return the letters of the likeliest candidate (the first of equals) and the metrics."""
    indices = range(len(candidates))
    best = max(indices, key=lambda i: response.logprobs[i])
    by_character = max(indices, key=lambda i: response.logprobs[i] / response.characters[i])
    return candidates[best], {
        "accuracy": float(candidates[best] == answer),
        "accuracy_normalised": float(candidates[by_character] == answer),
    }


def _grade_reply(question: McqQuestion, reply: str) -> tuple[str, dict[str, MetricValue]]:
    parsed = parse_mcq_reply(reply, question.options, multiple=question.multiple)
    return parsed.letters or parsed.kind, {
        "accuracy": float(parsed.kind == "answer" and parsed.letters == question.answer),
        "invalid_rate": float(parsed.kind == "invalid"),
        "refused_rate": float(parsed.kind == "refused"),
    }


def _digest(*parts: str) -> str:
    return xxhash.xxh3_64_hexdigest("\x1e".join(parts).encode())
