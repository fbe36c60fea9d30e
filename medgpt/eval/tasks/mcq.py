"""Multiple choice: by how likely letters or options are, or by what the model replies."""

import re
from collections.abc import Mapping, Sequence
from itertools import combinations

import xxhash

from medgpt.config.base import ConfigError
from medgpt.config.evaluation import McqConfig
from medgpt.data.sources.records import Message
from medgpt.data.sources.rows import draw, numbered_rows
from medgpt.data.tokenized.words import HAN
from medgpt.eval.requests import Choose, Chosen, Prompt, Replied, Reply, Request, Response
from medgpt.eval.task import LIKELIHOOD, ItemResult, Value, rules_of
from medgpt.eval.tasks import parse as parsing
from medgpt.eval.tasks.mcq_formats import SUBJECT_FILES, Question, read_questions
from medgpt.eval.tasks.parse import parse

WORDS = {
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
HAN_CHARACTER = re.compile(f"[{HAN}]")
Candidates = dict[str, str]
"""Letters of an answer to what the model is scored on."""


class McqTask:
    """Accuracy with invalid and refused replies apart; several right options count as a set."""

    kind = "mcq"

    def __init__(self, config: McqConfig, seed: int) -> None:
        """Raises ConfigError: the questions or the examples cannot be read."""
        self.config, self.name, self.sensitive = config, config.name, config.sensitive
        found = self._read(config.paths)
        self.questions = draw(((q.id, q) for q in found), config.limit, seed)
        self.examples = self._examples(seed)
        examples = [example for drawn in self.examples.values() for example in drawn]
        style = [config.scoring, config.prompt, str(config.max_new_tokens), repr(examples)]
        self.template = f"mcq-{config.scoring}-{_hash(repr(WORDS), *style)}"
        self.rules = rules_of(parsing) if config.scoring == "generation" else LIKELIHOOD
        self.data_hash = _hash(*(repr(question) for question in self.questions))
        if config.scoring == "option" and any(q.multiple for q in self.questions):
            raise ConfigError(
                "scoring=option takes the likeliest option, and some questions have several right "
                "ones; use letter or generation, or set answers=one"
            )

    def requests(self) -> Sequence[Request]:
        return [self._request(question) for question in self.questions]

    def judge(self, responses: Mapping[str, Response]) -> list[ItemResult]:
        return [self._judge(question, responses[question.id]) for question in self.questions]

    def _read(self, paths: Sequence[str]) -> list[Question]:
        questions = read_questions(self.config.layout, numbered_rows(paths))
        wanted = {"all": (False, True), "one": (False,), "several": (True,)}[self.config.answers]
        if kept := [question for question in questions if question.multiple in wanted]:
            return kept
        raise ConfigError(f"no question in paths fits answers={self.config.answers}; use all")

    def _examples(self, seed: int) -> dict[str, list[Question]]:
        """By subject: those of a question are of its own, where a file is a subject."""
        if not self.config.shots:
            return {}
        asked = {question.id for question in self.questions}
        found = [q for q in self._read(self.config.shots_paths) if q.id not in asked]
        drawn = {}
        for subject in dict.fromkeys(map(self._subject, self.questions)):
            free = [(q.id, q) for q in found if self._subject(q) == subject]
            if len(free) < self.config.shots:
                about = f" on {subject}" if subject else ""
                raise ConfigError(
                    f"shots={self.config.shots}, and shots_paths have {len(free)} questions{about} "
                    "that are not asked; name more, or lower shots"
                )
            drawn[subject] = draw(free, self.config.shots, seed)
        return drawn

    def _subject(self, question: Question) -> str:
        return question.slices["subject"] if self.config.layout in SUBJECT_FILES else ""

    # ---- asking ----

    def _request(self, question: Question) -> Request:
        prompt = self._prompt(question)
        if self.config.scoring == "generation":
            return Reply(question.id, prompt, self.config.max_new_tokens)
        return Choose(question.id, prompt, tuple(self._candidates(question).values()))

    def _candidates(self, question: Question) -> Candidates:
        """What the model is scored on, by the letters that it stands for."""
        space = self._words(question)["space"] if self.config.prompt == "plain" else ""
        if self.config.scoring == "option":
            return {letter: space + text for letter, text in question.options.items()}
        if not question.multiple:
            return {letter: space + letter for letter in question.options}
        # a set ends with its line, or the likeliest would be the shortest
        counts = range(2, len(question.options) + 1)
        sets = ("".join(some) for count in counts for some in combinations(question.options, count))
        return {some: f"{space}{some}\n" for some in sets}

    def _prompt(self, question: Question) -> Prompt:
        words, plain = self._words(question), self.config.prompt == "plain"
        turns = [*self.examples.get(self._subject(question), ()), question]
        asked = [self._asked(each, words) for each in turns]
        if plain:
            solved = zip(asked, (self._solution(each, words) for each in turns), strict=True)
            *before, last = [(text + words["answer"], answer) for text, answer in solved]
            return "".join(text + answer + "\n\n" for text, answer in before) + last[0]
        ask = words["ask"] if self.config.scoring == "generation" else ""
        messages = [Message("user", text + ask) for text in asked]
        answers = [Message("assistant", self._solution(each, words).strip()) for each in turns]
        pairs = zip(messages, answers, strict=True)
        return tuple(message for pair in pairs for message in pair)[:-1]

    def _asked(self, question: Question, words: Mapping[str, str]) -> str:
        context = f"{words['context']}{question.context}\n" if question.context else ""
        text = f"{context}{words['question']}{question.text}\n"
        if self.config.scoring == "option":
            return text
        listed = "".join(f"{letter}. {option}\n" for letter, option in question.options.items())
        return words["some" if question.multiple else "one"] + text + listed

    def _solution(self, question: Question, words: Mapping[str, str]) -> str:
        if self.config.scoring == "option":
            return words["space"] + question.options[question.answer]
        told = words["answer"] if self.config.scoring == "generation" else ""
        return (told if self.config.prompt == "chat" else "") + words["space"] + question.answer

    def _words(self, question: Question) -> Mapping[str, str]:
        if self.config.language != "auto":
            return WORDS[self.config.language]
        return WORDS["zh" if HAN_CHARACTER.search(question.text) else "en"]

    # ---- judging ----

    def _judge(self, question: Question, response: Response) -> ItemResult:
        candidates = self._candidates(question) if self.config.scoring != "generation" else {}
        match response:
            case Chosen():
                letters, values = _likeliest(list(candidates), response, question.answer)
                if self.config.scoring == "letter":
                    del values["accuracy_normalised"]
                said = {}
            case Replied():
                letters, values = _read(question, response.texts[0])
                said = {"reply": response.texts[0]}
            case _:
                raise AssertionError(type(response))
        values["chance"] = 1 / (len(candidates) or _num_answers(question))
        values["cut_rate"] = float(response.cut)
        shown = {
            "question": self._asked(question, self._words(question)),
            "right": question.answer,
            "chosen": letters,
            **said,
        }
        kind = "several right" if question.multiple else "one right"
        return ItemResult(question.id, values, {"type": kind, **question.slices}, shown)


def _num_answers(question: Question) -> int:
    """Answers that a guesser who knows the rules chooses from."""
    count = len(question.options)
    return 2**count - 1 - count if question.multiple else count


def _likeliest(
    candidates: Sequence[str], response: Chosen, answer: str
) -> tuple[str, dict[str, Value]]:
    """Letters of the likeliest candidate; the first of equals."""
    indices = range(len(candidates))
    best = max(indices, key=lambda i: response.logprobs[i])
    by_character = max(indices, key=lambda i: response.logprobs[i] / response.characters[i])
    return candidates[best], {
        "accuracy": float(candidates[best] == answer),
        "accuracy_normalised": float(candidates[by_character] == answer),
    }


def _read(question: Question, reply: str) -> tuple[str, dict[str, Value]]:
    parsed = parse(reply, question.options, multiple=question.multiple)
    return parsed.letters or parsed.kind, {
        "accuracy": float(parsed.kind == "answer" and parsed.letters == question.answer),
        "invalid_rate": float(parsed.kind == "invalid"),
        "refused_rate": float(parsed.kind == "refused"),
    }


def _hash(*parts: str) -> str:
    return xxhash.xxh3_64_hexdigest("\x1e".join(parts).encode())
