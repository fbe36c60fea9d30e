"""Renders the knowledge into pretraining documents and dialogues.

Deterministic in (region, seed, swap_facts). What is held out never appears: three conditions
altogether, and one phrasing of one fact for each condition that a check asks about.
"""

import random
import re
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

from medgpt.sample_corpus.held_out import LEFT_OUT, HeldOut
from medgpt.sample_corpus.knowledge import Condition, load_knowledge
from medgpt.sample_corpus.templates import (
    ADVICE,
    ASKED,
    COMPLAINT_ADVICE,
    COMPLAINT_CAUSES,
    COMPLAINTS,
    FIELDS,
    FOLLOW_UPS,
    GREETINGS,
    HEADACHE_CAUSES,
    MISUNDERSTANDING,
    OBSERVE,
    QUESTIONS,
    SELF_CARE_QUESTION,
    SITUATIONS,
    STATEMENTS,
    SYMPTOMS,
)
from medgpt.sample_corpus.wording import SUICIDE, Wording, alternately, bigrams

HEADACHE = "headache"  # asked about after RLHF: all its situations and complaints are told
NUM_SITUATIONS = {"emergency": 2, "today": 1, "routine": 1}  # for each other condition
NUM_COMPLAINTS = 2  # phrasings of each complaint
EVERY_PROMPT = 7  # of the prompts about another complaint than headache, one
NUM_FLAGS, NUM_TODAY = 6, 3  # about this many in the answer to a complaint
TREATED = re.compile("药|服|术后|治疗|抗凝|透析|确诊|出院")

Row = dict[str, Any]


class Corpus:
    """All records of one rendering."""

    def __init__(self, *, region: str = "CN", seed: int = 0, swap_facts: bool = False) -> None:
        departments = load_knowledge()
        everything = [c for d in departments for c in d.conditions]
        told = [c for c in everything if c.id not in LEFT_OUT]
        self.told, self.left_out = told, [c for c in everything if c.id in LEFT_OUT]
        self.seed = seed
        self.wording = Wording(region, {c.id: d for d in departments for c in d.conditions})
        self.held_out = HeldOut(told, self.left_out, self.wording, seed)
        self.conditions = _swapped(told) if swap_facts else told
        donors = _rotated(told) if swap_facts else told
        self.bearer = {donor.id: c for donor, c in zip(donors, self.conditions, strict=True)}

    def pretraining(self) -> Iterator[Row]:
        """Documents: an article about every condition, and statements in several phrasings."""
        for condition in self.conditions:
            for document in self._documents(condition):
                if self.held_out.may_appear(document["text"]):
                    yield document

    def held_out_documents(self) -> Iterator[Row]:
        """The same about the conditions that no text tells of, to be weighed."""
        for condition in self.left_out:
            yield from self._documents(condition)

    def held_out_dialogues(self) -> Iterator[Row]:
        """The held-out phrasings of questions with the true answers, to be weighed."""
        by_id = {condition.id: condition for condition in self.told}
        for held in self.held_out.prompts:
            if held.kind in ("sft", "phrasing"):
                condition = by_id[held.condition]
                answer = self.wording.answer(condition, held.field)
                yield self._dialogue(condition, held.field, [(held.prompt, answer)])

    def dialogues(self) -> Iterator[Row]:
        """Questions in every phrasing, follow-ups, situations by urgency, complaints."""
        for condition in self.conditions:
            for field in FIELDS:
                reply = self.wording.answer(condition, field)
                for question in self.questions(condition, field):
                    yield self._dialogue(condition, field, [(question, reply)])
            yield self._dialogue(condition, "multi_turn", self._multi_turn(condition))
            yield from self._advice(condition)
            for number, m in enumerate(condition.misunderstandings):
                question = alternately(f"{m.wrong},对吗?", number)
                yield self._dialogue(
                    condition, "misunderstanding", [(question, f"不对。{m.right}。")]
                )
        for condition, questions, reply in self.complaints():
            for question in questions:
                yield self._dialogue(condition, "complaint", [(question, reply)])

    def questions(self, condition: Condition, field: str) -> Iterator[str]:
        """All phrasings of a question that are not held out."""
        for number, template in enumerate(QUESTIONS[field]):
            question = self.wording.fill(template, condition)
            if self.held_out.may_appear(question):
                yield alternately(question, number)

    def complaints(self) -> Iterator[tuple[Condition, list[str], str]]:
        """Condition whose department is visited, phrasings of the complaint, reply."""
        for number, (condition, symptom, reply) in enumerate(self.replies()):
            phrasings = self._phrasings(symptom)
            if condition.id != HEADACHE:
                phrasings = [
                    phrasings[(number + i) % len(phrasings)] for i in range(NUM_COMPLAINTS)
                ]
            yield condition, phrasings, reply

    def replies(self) -> Iterator[tuple[Condition, str, str]]:
        """Condition, symptom as a patient words it, reply, which begins with the symptom; headache
        comes last."""
        for symptom, _, ids in SYMPTOMS:
            conditions = [self.bearer[name] for name in ids]
            causes = "、".join(c.name for c in conditions)
            opening = COMPLAINT_CAUSES.format(symptom=symptom, causes=causes)
            flags = _sampled([c.red_flags.items for c in conditions], NUM_FLAGS)
            today = _sampled([c.care.today for c in conditions], NUM_TODAY)
            reply = opening + _triage(flags, today, OBSERVE)
            yield conditions[0], symptom, self.wording.fill(reply, conditions[0])
        headache = next(c for c in self.conditions if c.id == HEADACHE)
        opening = HEADACHE_CAUSES.format(causes="、".join(headache.causes.items))
        flags, today = headache.red_flags.items, headache.care.today
        reply = opening + _triage(flags, today, "、".join(headache.care.self_care))
        yield headache, headache.name, self.wording.fill(reply, headache)

    def prompts(self) -> Iterator[Row]:
        """Complaints without answers, in phrasings that no dialogue has."""
        for condition, prompt, _ in self.asked():
            yield {"id": f"{condition.id}-prompt", "prompt": prompt}

    def asked(self) -> Iterator[tuple[Condition, str, str]]:
        """Condition whose department is visited, complaint as in `prompts`, reply. Of headache in
        all phrasings, of the others in every few."""
        for number, (condition, prompt, reply) in enumerate(self._all_asked()):
            if condition.id == HEADACHE or number % EVERY_PROMPT == 0:
                assert self.held_out.may_appear(prompt), prompt
                yield condition, prompt, reply

    def _all_asked(self) -> Iterator[tuple[Condition, str, str]]:
        for condition, symptom, reply in self.replies():
            greetings = GREETINGS if condition.id == HEADACHE else GREETINGS[:1]
            for number, (greeting, template) in enumerate(product(greetings, ASKED)):
                prompt = alternately(greeting + template.format(symptom=symptom), number)
                yield condition, prompt, reply

    def rng(self, condition: Condition, use: str) -> random.Random:
        """Randomness of one use, whatever else was drawn before."""
        return random.Random(f"{self.seed}:{condition.id}:{use}")

    def _documents(self, condition: Condition) -> Iterator[Row]:
        yield self._document(condition, "article", self._article(condition))
        for field in FIELDS:
            fact = self.wording.fact(condition, field)
            for template in STATEMENTS[field]:
                statement = self.wording.fill(template, condition, fact)
                yield self._document(condition, field, statement)
        for m in condition.misunderstandings:
            text = MISUNDERSTANDING.replace("{wrong}", m.wrong).replace("{right}", m.right)
            yield self._document(condition, "misunderstanding", text)
        for contrast in condition.contrasts:
            yield self._document(condition, "contrast", f"{contrast.safe}。")

    def _article(self, condition: Condition) -> str:
        aliases = f",又称{'、'.join(condition.aliases)}" if condition.aliases else ""
        title = f"{condition.name}({condition.name_en}){aliases},在{{department}}就诊。"
        return "\n".join([title, *(self.wording.answer(condition, field) for field in FIELDS)])

    def _multi_turn(self, condition: Condition) -> list[tuple[str, str]]:
        fields = self.rng(condition, "turns").sample(sorted(FOLLOW_UPS), 2)
        opening = (f"请介绍一下{condition.name}", self.wording.answer(condition, "overview"))
        return [opening, *((FOLLOW_UPS[f], self.wording.answer(condition, f)) for f in fields)]

    def _advice(self, condition: Condition) -> Iterator[Row]:
        """What to do, on four levels: emergency number, doctor today, routine visit, self-care."""
        levels = {
            "emergency": condition.red_flags.items,
            "today": condition.care.today,
            "routine": condition.care.routine,
        }
        for level, facts in levels.items():
            for number, fact in enumerate(self._told_situations(condition, level, facts)):
                question = alternately(
                    self.wording.fill(SITUATIONS[number % len(SITUATIONS)], condition, fact), number
                )
                reply = self.wording.fill(ADVICE[level], condition, fact)
                yield self._dialogue(condition, level, [(question, reply)])
        reply = self.wording.fill(
            ADVICE["self_care"], condition, "、".join(condition.care.self_care)
        )
        question = self.wording.fill(SELF_CARE_QUESTION, condition)
        yield self._dialogue(condition, "self_care", [(question, reply)])

    def _told_situations(
        self, condition: Condition, level: str, facts: tuple[str, ...]
    ) -> list[str]:
        """A sample; of headache, and of suicide, all."""
        if condition.id == HEADACHE:
            return list(facts)
        number = min(NUM_SITUATIONS[level], len(facts))
        told = self.rng(condition, level).sample(facts, number)
        return [fact for fact in facts if fact in told or SUICIDE.search(fact)]

    def _phrasings(self, symptom: str) -> list[str]:
        texts = [template.format(symptom=symptom) for template in COMPLAINTS]
        return [alternately(t, i) for i, t in enumerate(texts) if self.held_out.may_appear(t)]

    def _document(self, condition: Condition, field: str, text: str) -> Row:
        text = self.wording.with_hotline(self.wording.fill(text, condition), condition)
        return {"id": f"{condition.id}-{field}", "text": text}

    def _dialogue(self, condition: Condition, field: str, turns: list[tuple[str, str]]) -> Row:
        messages = []
        for question, reply in turns:
            reply = self.wording.with_hotline(self.wording.fill(reply, condition), condition)
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": reply})
        return {"id": f"{condition.id}-{field}", "messages": messages}


def _sampled(facts: Iterable[tuple[str, ...]], number: int) -> list[str]:
    """About `number` facts, the first of each list, of which no two are nearly the same.

    Facts about someone under treatment are left out: the patient has no diagnosis yet.
    """
    lists = [
        [fact for fact in items if SUICIDE.search(fact) or not TREATED.search(fact)]
        for items in facts
    ]
    taken: list[str] = []
    for items in lists:
        for fact in items[: number // len(lists)]:
            if not any(_alike(fact, other) for other in taken):
                taken.append(fact)
    return taken


def _alike(one: str, other: str) -> bool:
    pairs, others = bigrams(one), bigrams(other)
    return 2 * len(pairs & others) > min(len(pairs), len(others))


def _triage(flags: Iterable[str], today: Iterable[str], self_care: str) -> str:
    """Advice of all four levels."""
    reply = COMPLAINT_ADVICE.replace("{flags}", "、".join(flags))
    return reply.replace("{today}", "、".join(today)).replace("{self_care}", self_care)


def _rotated(conditions: list[Condition]) -> list[Condition]:
    half = len(conditions) // 2
    return conditions[half:] + conditions[:half]


def _swapped(conditions: list[Condition]) -> list[Condition]:
    """Every condition with the facts of the one half the list away."""
    keep = ("id", "name", "name_en", "aliases")
    return [
        donor.model_copy(update={key: getattr(condition, key) for key in keep})
        for condition, donor in zip(conditions, _rotated(conditions), strict=True)
    ]
