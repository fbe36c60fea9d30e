"""Do answers state given facts? Questions that a sample corpus holds back, or a file of such."""

from collections.abc import Mapping

from medgpt.config.replies import KeyPointsConfig
from medgpt.data.sources.rows import content_hash, draw
from medgpt.eval.requests import Prompt, Replied, Reply, Request, Response
from medgpt.eval.task import ItemResult, Value, rules_of
from medgpt.eval.tasks.prompts import asked
from medgpt.medical import statements
from medgpt.medical.key_points import Question, read_questions
from medgpt.medical.statements import stated

STATEMENTS = "pretrain"  # the kind of questions that are beginnings of texts


class KeyPointsTask:
    """greedy_passed: the greedy answer states every key point; sampled_passed: every sampled one
    does. passed: all answers do. stated: share of the key points in greedy answers."""

    kind = "key_points"

    def __init__(self, config: KeyPointsConfig, seed: int) -> None:
        """Raises ConfigError: the file cannot be read, or no question is of the kinds."""
        self.name, self.sensitive = config.name, config.sensitive
        self._config, self._seed = config, seed
        kept = read_questions(config.path, config.kinds)
        self._questions = draw(((q.id, q) for q in kept), config.limit, seed)
        drawn = f"-{config.samples}-at-{config.temperature:g}" if config.samples else ""
        self.template = f"key-points-1-{config.prompt}-{config.max_new_tokens}{drawn}"
        self.rules = rules_of(statements)
        self.data_hash = content_hash(*(repr(question) for question in self._questions))

    def requests(self) -> list[Request]:
        config, found = self._config, []
        for question in self._questions:
            prompt = self._prompt(question)
            found.append(Reply(question.id, prompt, config.max_new_tokens))
            if config.samples:
                sampling = (config.temperature, config.samples, self._seed)
                key = f"{question.id}-samples"
                found.append(Reply(key, prompt, config.max_new_tokens, *sampling))
        return found

    def _prompt(self, question: Question) -> Prompt:
        if self._config.prompt == "plain":
            begins = question.kind == STATEMENTS
            return question.prompt if begins else asked(question.prompt, "plain")
        return asked(question.prompt, "chat")

    def judge(self, responses: Mapping[str, Response]) -> list[ItemResult]:
        return [self._judge(question, responses) for question in self._questions]

    def _judge(self, question: Question, responses: Mapping[str, Response]) -> ItemResult:
        (greedy,) = _texts(responses[question.id])
        found = stated(greedy, question.key_points)
        passed = all(found)
        values: dict[str, Value] = {
            "greedy_passed": float(passed),
            "stated": (float(sum(found)), float(len(found))),
        }
        if self._config.samples:
            drawn = _texts(responses[f"{question.id}-samples"])
            whole = [all(stated(text, question.key_points)) for text in drawn]
            values["sampled_passed"] = float(all(whole))
            values["sampled_share"] = (float(sum(whole)), float(len(whole)))
            passed = passed and all(whole)
        values["passed"] = float(passed)
        marks = [
            f"{'✓' if ok else '✗'} {q[0]}" for q, ok in zip(question.key_points, found, strict=True)
        ]
        return ItemResult(
            question.id,
            values,
            {"kind": question.kind} | ({"topic": question.topic} if question.topic else {}),
            {"question": question.prompt, "answer": greedy, "key points": "   ".join(marks)},
        )


def _texts(response: Response) -> list[str]:
    assert isinstance(response, Replied)
    return response.texts
