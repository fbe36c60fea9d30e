"""Generated answers compared with reference answers, word by word."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import jieba

from medgpt.config.base import ConfigError
from medgpt.config.evaluation import GenerationConfig
from medgpt.data.sources.readers import read_records
from medgpt.data.sources.records import Conversation
from medgpt.data.sources.sampling import draw_subset, hash_texts
from medgpt.eval.requests import Generate, Prompt, Response, reply_texts
from medgpt.eval.stats import Interval
from medgpt.eval.task import ItemResult, rules_digest
from medgpt.eval.tasks import text_metrics
from medgpt.eval.tasks.text_metrics import (
    BLEU_METRICS,
    DISTINCT_METRICS,
    answer_metrics,
    corpus_counts,
    corpus_score,
)


class GenerationTask:
    """BLEU-1..4 and Distinct-1..2 of the whole corpus; ROUGE-1, -2, -L, GLEU, words and repeated
    4-grams per answer. If a question occurs twice, its first reference answer counts."""

    kind = "generation"
    corpus_metrics = (*BLEU_METRICS, *DISTINCT_METRICS)

    def __init__(self, config: GenerationConfig, seed: int) -> None:
        """Raises ConfigError if a source cannot be read or has no conversation."""
        self.name, self._config = config.name, config
        self.sensitive = config.sensitive or any(source.sensitive for source in config.sources)
        items = self._read_conversations()
        keys = draw_subset(((key, key) for key in items), config.limit, seed)
        self._items = [(key, items[key]) for key in keys]
        words = f"jieba-{jieba.__version__}"
        self.template = f"generation-1-{config.prompt}-{config.max_new_tokens}-{words}"
        self.rules = rules_digest(text_metrics)
        self.data_hash = hash_texts(*(repr(item) for item in self._items))

    def _read_conversations(self) -> dict[str, Conversation]:
        items: dict[str, Conversation] = {}
        for source in self._config.sources:
            num_conversations = 0
            for record in read_records(source):
                if isinstance(record, Conversation):
                    record = _until_last_learned(record)
                    question_texts = [message.content for message in record.messages[:-1]]
                    items.setdefault(f"{source.name}-{hash_texts(*question_texts)}", record)
                    num_conversations += 1
            if not num_conversations:
                raise ConfigError(
                    f"source {source.name} has no conversation; give files of questions with "
                    "answers, or map their columns"
                )
        return items

    def requests(self) -> list[Generate]:
        return [
            Generate(key, self._prompt(item), self._config.max_new_tokens)
            for key, item in self._items
        ]

    def _prompt(self, item: Conversation) -> Prompt:
        messages = item.messages[:-1]
        if self._config.prompt == "chat":
            return messages
        return "".join(f"{message.content}\n" for message in messages)

    def grade(self, responses: Mapping[str, Response]) -> list[ItemResult]:
        answers = [reply_texts(responses[key])[0] for key, _ in self._items]
        references = [item.messages[-1].content for _, item in self._items]
        return [
            ItemResult(
                key,
                answer_metrics(answer, reference),
                {"source": item.source},
                {"question": item.messages[-2].content, "answer": answer, "right": reference},
                counts,
            )
            for (key, item), answer, reference, counts in zip(
                self._items, answers, references, corpus_counts(answers, references), strict=True
            )
        ]

    def corpus_scores(self, items: Sequence[ItemResult], seed: int) -> dict[str, Interval]:
        """Return BLEU and Distinct, which are no means over answers."""
        counts = [item.counts for item in items]
        scores = {metric: corpus_score(metric, counts, seed) for metric in self.corpus_metrics}
        return {metric: score for metric, score in scores.items() if score is not None}


def _until_last_learned(item: Conversation) -> Conversation:
    """Return a conversation that ends with its last answer to learn, the reference.

    Raises ConfigError for a prompt without an answer, and for tools, which a task does not offer
    to the model.
    """
    if item.messages[-1].role != "assistant":
        raise ConfigError(
            f"{item.file} row {item.row}: has no answer to compare with; give files of questions "
            "with answers"
        )
    if item.tools is not None or any(message.tool_calls for message in item.messages):
        raise ConfigError(
            f"{item.file} row {item.row}: has tools, but evaluations of kind generation compare "
            "texts; remove rows with tools"
        )
    learned = [i for i, m in enumerate(item.messages) if m.role == "assistant" and m.learn]
    return replace(item, messages=item.messages[: learned[-1] + 1])
