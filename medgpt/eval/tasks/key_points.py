"""Whether answers state given facts: held-out questions of a sample corpus, or those of a file."""

from collections.abc import Mapping

from medgpt.config.evaluation import KeyPointsConfig
from medgpt.data.sources.sampling import draw_subset
from medgpt.eval.requests import (
    Generate,
    Prompt,
    Request,
    Response,
    as_prompt,
    reply_texts,
)
from medgpt.eval.task import ItemResult, MetricValue, questions_hash, rules_digest
from medgpt.medical import statements
from medgpt.medical.key_points import KeyPointQuestion, read_key_point_questions
from medgpt.medical.statements import states_key_points

TEXT_BEGINNINGS = "pretrain"  # questions of this kind are beginnings of texts to continue


class KeyPointsTask:
    """Metrics:

    greedy_passed: the greedy answer states every key point. sampled_passed: every sampled answer
    does. sampled_share: the share of sampled answers that do. passed: greedy and sampled answers
    all do. stated: the share of key points that greedy answers state.
    """

    kind = "key_points"

    def __init__(self, config: KeyPointsConfig, seed: int) -> None:
        """Raises ConfigError if the file cannot be read or has no question of the kinds."""
        self.name, self.sensitive = config.name, config.sensitive
        self._config, self._seed = config, seed
        questions = read_key_point_questions(config.path, config.kinds)
        self._questions = draw_subset(((q.id, q) for q in questions), config.limit, seed)
        sampling = f"-{config.samples}-at-{config.temperature:g}" if config.samples else ""
        self.template = f"key-points-1-{config.prompt}-{config.max_new_tokens}{sampling}"
        self.rules = rules_digest(statements)
        self.data_hash = questions_hash(self._questions)

    def requests(self) -> list[Request]:
        config, requests = self._config, []
        for question in self._questions:
            prompt = self._prompt(question)
            requests.append(Generate(question.id, prompt, config.max_new_tokens))
            if config.samples:
                sampling = (config.temperature, config.samples, self._seed)
                key = f"{question.id}-samples"
                requests.append(Generate(key, prompt, config.max_new_tokens, *sampling))
        return requests

    def _prompt(self, question: KeyPointQuestion) -> Prompt:
        if self._config.prompt == "plain":
            is_text_beginning = question.kind == TEXT_BEGINNINGS
            return question.prompt if is_text_beginning else as_prompt(question.prompt, "plain")
        return as_prompt(question.prompt, "chat")

    def grade(self, responses: Mapping[str, Response]) -> list[ItemResult]:
        return [self._grade_question(question, responses) for question in self._questions]

    def _grade_question(
        self, question: KeyPointQuestion, responses: Mapping[str, Response]
    ) -> ItemResult:
        (greedy,) = reply_texts(responses[question.id])
        is_stated = states_key_points(greedy, question.key_points)
        passed = all(is_stated)
        values: dict[str, MetricValue] = {
            "greedy_passed": float(passed),
            "stated": (float(sum(is_stated)), float(len(is_stated))),
        }
        if self._config.samples:
            samples = reply_texts(responses[f"{question.id}-samples"])
            samples_passed = [all(states_key_points(s, question.key_points)) for s in samples]
            values["sampled_passed"] = float(all(samples_passed))
            values["sampled_share"] = (float(sum(samples_passed)), float(len(samples_passed)))
            passed = passed and all(samples_passed)
        values["passed"] = float(passed)
        ticks = ("✓" if stated else "✗" for stated in is_stated)
        checklist = [f"{t} {p[0]}" for t, p in zip(ticks, question.key_points, strict=True)]
        return ItemResult(
            question.id,
            values,
            {"kind": question.kind} | ({"topic": question.topic} if question.topic else {}),
            {"question": question.prompt, "answer": greedy, "key points": "   ".join(checklist)},
        )
