"""A reward for the sample corpus: does an answer to a complaint name its causes and give advice?
For `reward.functions` of the debug configs; not a medical model."""

from collections.abc import Mapping, Sequence
from functools import cache

from medgpt.medical.statements import states_fact
from medgpt.rlhf.rewards.reward_sample import RewardSample
from medgpt.sample_corpus.generator import HEADACHE_ID, CorpusGenerator
from medgpt.sample_corpus.knowledge import load_knowledge
from medgpt.sample_corpus.templates import TEXTS

ADVICE = ("建议您", "建议你")
NUM_CAUSES = 2  # the first ones are the most typical


def causes_and_advice(samples: Sequence[RewardSample]) -> list[float]:
    """Return per answer the share of causes and advice stated, minus the share of unrelated
    conditions among those named; 0 for questions that are not about a known complaint."""
    causes = known_causes()
    return [_reward(sample, causes) for sample in samples]


def _reward(sample: RewardSample, causes: Mapping[str, tuple[str, ...]]) -> float:
    symptom = next((name for name in causes if name in sample.question), None)
    if symptom is None:
        return 0.0
    opening = sample.text.split("。")[0]
    wanted = causes[symptom][:NUM_CAUSES]
    stated = [states_fact(opening, (cause,)) for cause in wanted] + [
        states_fact(sample.text, ADVICE)
    ]
    named = {name for name in condition_names() if name in opening} - {symptom}
    unrelated = [name for name in named if name not in causes[symptom]]
    return sum(stated) / len(stated) - len(unrelated) / max(1, len(named))


@cache
def condition_names() -> tuple[str, ...]:
    return tuple(c.name for department in load_knowledge() for c in department.conditions)


@cache
def known_causes() -> dict[str, tuple[str, ...]]:
    """Return causes by symptom in patients' words, longest first: some contain others."""
    by_id = {c.id: c for c in CorpusGenerator().conditions}
    causes = {
        symptom: tuple(by_id[i].name for i in ids) for symptom, _, ids in TEXTS.complaint_symptoms
    }
    causes[by_id[HEADACHE_ID].name] = by_id[HEADACHE_ID].causes.items
    return dict(sorted(causes.items(), key=lambda item: -len(item[0])))
