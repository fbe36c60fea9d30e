"""Generates the sample corpus: documents, dialogues and prompts from the knowledge files.

Deterministic in (region, seed, swap_facts). Training texts never contain the held-out prompts or
the three excluded conditions.
"""

import random
import re
from collections.abc import Iterable, Iterator
from itertools import cycle, product
from typing import Any

from medgpt.sample_corpus.held_out import EXCLUDED_CONDITIONS, HeldOutPrompts
from medgpt.sample_corpus.knowledge import Condition, load_knowledge
from medgpt.sample_corpus.templates import FIELDS, TEXTS
from medgpt.sample_corpus.wording import SUICIDE, Wording, alternate_punctuation, char_bigrams

HEADACHE_ID = "headache"  # tested after RLHF: the corpus has all its situations and complaints
NUM_SITUATIONS = {"emergency": 2, "today": 1, "routine": 1}  # per level, for every other condition
NUM_COMPLAINTS = 2  # phrasings per complaint, except headache
PROMPT_STRIDE = 7  # every seventh prompt about complaints other than headache is used
NUM_FLAGS, NUM_TODAY = 6, 3  # approximate numbers in the reply to a complaint
UNDER_TREATMENT = re.compile("药|服|术后|治疗|抗凝|透析|确诊|出院")

CorpusRow = dict[str, Any]


class CorpusGenerator:
    """Generates all records of a corpus."""

    def __init__(self, *, region: str = "CN", seed: int = 0, swap_facts: bool = False) -> None:
        departments = load_knowledge()
        all_conditions = [c for d in departments for c in d.conditions]
        included = [c for c in all_conditions if c.id not in EXCLUDED_CONDITIONS]
        self.true_conditions = included
        self.excluded_conditions = [c for c in all_conditions if c.id in EXCLUDED_CONDITIONS]
        self.seed = seed
        self.wording = Wording(region, {c.id: d for d in departments for c in d.conditions})
        self.held_out = HeldOutPrompts(included, self.excluded_conditions, self.wording, seed)
        half = len(included) // 2
        donors = included[half:] + included[:half] if swap_facts else included
        self.conditions = [_with_facts(c, donor) for c, donor in zip(included, donors, strict=True)]
        self.with_facts_of = {d.id: c for d, c in zip(donors, self.conditions, strict=True)}

    def documents(self) -> Iterator[CorpusRow]:
        """Yield documents: an article per condition, and statements in several phrasings."""
        for condition in self.conditions:
            for document in self._condition_documents(condition):
                if self.held_out.is_allowed(document["text"]):
                    yield document

    def held_out_documents(self) -> Iterator[CorpusRow]:
        """Yield the same documents about the excluded conditions, for evaluation."""
        for condition in self.excluded_conditions:
            yield from self._condition_documents(condition)

    def held_out_dialogues(self) -> Iterator[CorpusRow]:
        """Yield the held-out phrasings of questions with the true answers, for evaluation."""
        by_id = {condition.id: condition for condition in self.true_conditions}
        for prompt in self.held_out.prompts:
            if prompt.kind in ("sft", "phrasing"):
                condition = by_id[prompt.condition]
                answer = self.wording.answer(condition, prompt.field)
                yield self._dialogue(condition, prompt.field, [(prompt.prompt, answer)])

    def dialogues(self) -> Iterator[CorpusRow]:
        """Yield dialogues: questions, follow-ups, situations by urgency, complaints."""
        for condition in self.conditions:
            for field in FIELDS:
                reply = self.wording.answer(condition, field)
                for question in self.questions(condition, field):
                    yield self._dialogue(condition, field, [(question, reply)])
            yield self._dialogue(condition, "multi_turn", self._multi_turn(condition))
            yield from self._advice_dialogues(condition)
            for number, m in enumerate(condition.misunderstandings):
                question = alternate_punctuation(f"{m.wrong},对吗?", number)
                yield self._dialogue(
                    condition, "misunderstanding", [(question, f"不对。{m.right}。")]
                )
        for condition, questions, reply in self.complaints():
            for question in questions:
                yield self._dialogue(condition, "complaint", [(question, reply)])

    def questions(self, condition: Condition, field: str) -> Iterator[str]:
        """Yield all phrasings of a question that are not held out."""
        for number, template in enumerate(TEXTS.questions[field]):
            question = self.wording.fill(template, condition)
            if self.held_out.is_allowed(question):
                yield alternate_punctuation(question, number)

    def complaints(self) -> Iterator[tuple[Condition, list[str], str]]:
        """Yield (condition whose department the patient visits, complaint phrasings, reply)."""
        for number, (condition, symptom, reply) in enumerate(self.complaint_replies()):
            phrasings = self._complaint_phrasings(symptom)
            if condition.id != HEADACHE_ID:
                phrasings = [
                    phrasings[(number + i) % len(phrasings)] for i in range(NUM_COMPLAINTS)
                ]
            yield condition, phrasings, reply

    def complaint_replies(self) -> Iterator[tuple[Condition, str, str]]:
        """Yield (condition, symptom in a patient's words, reply), headache last.

        A reply starts with the symptom.
        """
        for symptom, _, ids in TEXTS.complaint_symptoms:
            conditions = [self.with_facts_of[name] for name in ids]
            causes = "、".join(c.name for c in conditions)
            opening = TEXTS.complaint_causes.format(symptom=symptom, causes=causes)
            flags = _sample_facts([c.red_flags.items for c in conditions], NUM_FLAGS)
            today = _sample_facts([c.care.today for c in conditions], NUM_TODAY)
            reply = opening + _triage_advice(flags, today, TEXTS.observation_advice)
            yield conditions[0], symptom, self.wording.fill(reply, conditions[0])
        headache = next(c for c in self.conditions if c.id == HEADACHE_ID)
        opening = TEXTS.headache_causes.format(causes="、".join(headache.causes.items))
        flags, today = headache.red_flags.items, headache.care.today
        reply = opening + _triage_advice(flags, today, "、".join(headache.care.self_care))
        yield headache, headache.name, self.wording.fill(reply, headache)

    def prompts(self) -> Iterator[CorpusRow]:
        """Yield complaints without answers, in phrasings that no dialogue has."""
        for condition, prompt, _ in self.prompts_with_replies():
            yield {"id": f"{condition.id}-prompt", "prompt": prompt}

    def prompts_with_replies(self) -> Iterator[tuple[Condition, str, str]]:
        """Yield (condition whose department the patient visits, complaint as in `prompts`, reply).

        Headache comes in all phrasings, the other complaints in every PROMPT_STRIDE-th.
        """
        for number, (condition, prompt, reply) in enumerate(self._all_prompts_with_replies()):
            if condition.id == HEADACHE_ID or number % PROMPT_STRIDE == 0:
                assert self.held_out.is_allowed(prompt), prompt
                yield condition, prompt, reply

    def _all_prompts_with_replies(self) -> Iterator[tuple[Condition, str, str]]:
        for condition, symptom, reply in self.complaint_replies():
            greetings = TEXTS.greetings if condition.id == HEADACHE_ID else TEXTS.greetings[:1]
            phrasings = product(greetings, TEXTS.prompt_complaints)
            for number, (greeting, template) in enumerate(phrasings):
                prompt = alternate_punctuation(greeting + template.format(symptom=symptom), number)
                yield condition, prompt, reply

    def rng(self, condition: Condition, key: str) -> random.Random:
        """Return a random generator that does not depend on earlier draws."""
        return random.Random(f"{self.seed}:{condition.id}:{key}")

    def _condition_documents(self, condition: Condition) -> Iterator[CorpusRow]:
        yield self._document(condition, "article", self._article(condition))
        for field in FIELDS:
            fact = self.wording.fact(condition, field)
            for template in TEXTS.statements[field]:
                statement = self.wording.fill(template, condition, fact)
                yield self._document(condition, field, statement)
        for m in condition.misunderstandings:
            text = TEXTS.misunderstanding.replace("{wrong}", m.wrong)
            text = text.replace("{right}", m.right)
            yield self._document(condition, "misunderstanding", text)
        for contrast in condition.contrasts:
            yield self._document(condition, "contrast", f"{contrast.safe}。")

    def _article(self, condition: Condition) -> str:
        aliases = f",又称{'、'.join(condition.aliases)}" if condition.aliases else ""
        title = f"{condition.name}({condition.name_en}){aliases},在{{department}}就诊。"
        return "\n".join([title, *(self.wording.answer(condition, field) for field in FIELDS)])

    def _multi_turn(self, condition: Condition) -> list[tuple[str, str]]:
        turns = [(f"请介绍一下{condition.name}", self.wording.answer(condition, "overview"))]
        for field in self.rng(condition, "turns").sample(sorted(TEXTS.follow_ups), 2):
            turns.append((TEXTS.follow_ups[field], self.wording.answer(condition, field)))
        return turns

    def _advice_dialogues(self, condition: Condition) -> Iterator[CorpusRow]:
        """Yield advice on four levels: emergency number, doctor today, routine visit, self-care."""
        levels = {
            "emergency": condition.red_flags.items,
            "today": condition.care.today,
            "routine": condition.care.routine,
        }
        for level, facts in levels.items():
            sampled = self._sample_situations(condition, level, facts)
            situations = zip(sampled, cycle(TEXTS.situations), strict=False)
            for number, (fact, template) in enumerate(situations):
                question = self.wording.fill(template, condition, fact)
                question = alternate_punctuation(question, number)
                reply = self.wording.fill(TEXTS.advice[level], condition, fact)
                yield self._dialogue(condition, level, [(question, reply)])
        reply = self.wording.fill(
            TEXTS.advice["self_care"], condition, "、".join(condition.care.self_care)
        )
        question = self.wording.fill(TEXTS.self_care_question, condition)
        yield self._dialogue(condition, "self_care", [(question, reply)])

    def _sample_situations(
        self, condition: Condition, level: str, facts: tuple[str, ...]
    ) -> list[str]:
        """Sample facts, but keep all of headache and all about suicide."""
        if condition.id == HEADACHE_ID:
            return list(facts)
        number = min(NUM_SITUATIONS[level], len(facts))
        sampled = self.rng(condition, level).sample(facts, number)
        return [fact for fact in facts if fact in sampled or SUICIDE.search(fact)]

    def _complaint_phrasings(self, symptom: str) -> list[str]:
        texts = [template.format(symptom=symptom) for template in TEXTS.complaints]
        return [
            alternate_punctuation(t, i) for i, t in enumerate(texts) if self.held_out.is_allowed(t)
        ]

    def _document(self, condition: Condition, field: str, text: str) -> CorpusRow:
        text = self.wording.with_hotline(self.wording.fill(text, condition), condition)
        return {"id": f"{condition.id}-{field}", "text": text}

    def _dialogue(
        self, condition: Condition, field: str, turns: list[tuple[str, str]]
    ) -> CorpusRow:
        messages = []
        for question, reply in turns:
            reply = self.wording.with_hotline(self.wording.fill(reply, condition), condition)
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": reply})
        return {"id": f"{condition.id}-{field}", "messages": messages}


def _sample_facts(facts: Iterable[tuple[str, ...]], number: int) -> list[str]:
    """Return about `number` facts, the first of each list, without near duplicates.

    Excludes facts about someone under treatment: the patient has no diagnosis yet.
    """
    lists = [
        [fact for fact in items if SUICIDE.search(fact) or not UNDER_TREATMENT.search(fact)]
        for items in facts
    ]
    sampled: list[str] = []
    for items in lists:
        for fact in items[: number // len(lists)]:
            if not any(_is_similar(fact, other) for other in sampled):
                sampled.append(fact)
    return sampled


def _is_similar(fact: str, other: str) -> bool:
    pairs, others = char_bigrams(fact), char_bigrams(other)
    return 2 * len(pairs & others) > min(len(pairs), len(others))


def _triage_advice(flags: Iterable[str], today: Iterable[str], self_care: str) -> str:
    """Return advice on all four levels."""
    reply = TEXTS.complaint_advice.replace("{flags}", "、".join(flags))
    return reply.replace("{today}", "、".join(today)).replace("{self_care}", self_care)


def _with_facts(condition: Condition, donor: Condition) -> Condition:
    """Return the condition with the facts of another one."""
    identity_fields = ("id", "name", "name_en", "aliases")
    return donor.model_copy(update={key: getattr(condition, key) for key in identity_fields})
