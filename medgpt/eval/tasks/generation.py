"""Answers compared with reference answers."""

from collections.abc import Mapping, Sequence

import jieba

from medgpt.config.base import ConfigError
from medgpt.config.replies import GenerationConfig
from medgpt.data.sources.records import Conversation
from medgpt.data.sources.rows import content_hash, draw, records
from medgpt.eval.requests import Prompt, Replied, Reply, Response
from medgpt.eval.stats import Interval
from medgpt.eval.task import ItemResult, rules_of
from medgpt.eval.tasks import overlap as comparing
from medgpt.eval.tasks.overlap import (
    BLEU_METRICS,
    DISTINCT_METRICS,
    counts,
    overlap,
    score_of,
)


class GenerationTask:
    """BLEU-1..4 and Distinct-1..2 of the whole corpus; ROUGE-1, -2, -L, GLEU, words and repeated
    4-grams of each answer. The first answer to a question counts if it occurs twice."""

    kind = "generation"
    corpus_metrics = (*BLEU_METRICS, *DISTINCT_METRICS)

    def __init__(self, config: GenerationConfig, seed: int) -> None:
        """Raises ConfigError: a source cannot be read or holds no conversation."""
        self.name, self._config = config.name, config
        self.sensitive = config.sensitive or any(source.sensitive for source in config.sources)
        items = self._conversations()
        self._items = draw(((key, (key, item)) for key, item in items.items()), config.limit, seed)
        self.template = (
            f"generation-1-{config.prompt}-{config.max_new_tokens}-jieba-{jieba.__version__}"
        )
        self.rules = rules_of(comparing)
        self.data_hash = content_hash(*(repr(item) for item in self._items))

    def _conversations(self) -> dict[str, Conversation]:
        items: dict[str, Conversation] = {}
        for source in self._config.sources:
            found = 0
            for record in records(source):
                if isinstance(record, Conversation):
                    asked = [message.content for message in record.messages[:-1]]
                    items.setdefault(f"{source.name}-{content_hash(*asked)}", record)
                    found += 1
            if not found:
                raise ConfigError(
                    f"source {source.name} has no conversation; name files of questions with "
                    "answers, or map their columns"
                )
        return items

    def requests(self) -> list[Reply]:
        return [
            Reply(key, self._prompt(item), self._config.max_new_tokens) for key, item in self._items
        ]

    def _prompt(self, item: Conversation) -> Prompt:
        asked = item.messages[:-1]
        if self._config.prompt == "chat":
            return asked
        return "".join(f"{message.content}\n" for message in asked)

    def judge(self, responses: Mapping[str, Response]) -> list[ItemResult]:
        answers = self._answers(responses)
        references = [item.messages[-1].content for _, item in self._items]
        return [
            ItemResult(
                key,
                overlap(answer, right),
                {"source": item.source},
                {"question": item.messages[-2].content, "answer": answer, "right": right},
                counted,
            )
            for (key, item), answer, right, counted in zip(
                self._items, answers, references, counts(answers, references), strict=True
            )
        ]

    def corpus(self, items: Sequence[ItemResult], seed: int) -> dict[str, Interval]:
        """Metrics that are no mean over answers."""
        found = {m: score_of(m, [item.counts for item in items], seed) for m in self.corpus_metrics}
        return {metric: score for metric, score in found.items() if score is not None}

    def _answers(self, responses: Mapping[str, Response]) -> list[str]:
        found = []
        for key, _ in self._items:
            response = responses[key]
            assert isinstance(response, Replied)
            found.append(response.texts[0])
        return found
