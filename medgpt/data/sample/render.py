"""Renders the knowledge into pretraining documents, dialogues, preference pairs and exam questions.

Deterministic in (region, seed, swap_facts). What is held out never appears: three conditions
altogether, and one phrasing of one fact for each condition that a check asks about.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from medgpt.data.sample.knowledge import Condition, Phrases, load_knowledge
from medgpt.data.sample.templates import (
    ADVICE,
    ANSWERS,
    COMPLAINTS,
    FIELDS,
    FOLLOW_UPS,
    LIST_FIELDS,
    QUESTIONS,
    REGIONS,
    SITUATIONS,
    STATEMENTS,
    VAGUE,
)

LEFT_OUT = ("kawasaki_disease", "sudden_sensorineural_hearing_loss", "ankylosing_spondylitis")
NUM_PHRASINGS = 30
MAX_SYMPTOM_CHARS = 6  # longer ones do not read well inside a complaint

Row = dict[str, Any]


@dataclass(frozen=True)
class Held:
    """A phrasing kept out of the corpus. `key_points`: each a tuple of accepted wordings."""

    condition: str
    field: str
    template: str
    prompt: str
    key_points: tuple[tuple[str, ...], ...]
    kind: str  # pretrain, sft, rlhf: the stage asked; phrasing; left_out


class Corpus:
    """All records of one rendering."""

    def __init__(self, *, region: str = "CN", seed: int = 0, swap_facts: bool = False) -> None:
        self.region, self.seed = REGIONS[region], seed
        departments = load_knowledge()
        self.department = {c.id: d for d in departments for c in d.conditions}
        everything = [c for d in departments for c in d.conditions]
        self.left_out = [c for c in everything if c.id in LEFT_OUT]
        told = [c for c in everything if c.id not in LEFT_OUT]
        assert len(self.left_out) == len(LEFT_OUT)
        self.truth = {c.id: c for c in told}
        self.held_out = self._choose_held_out()
        self._prompts = [_bare(h.prompt) for h in self.held_out]
        self.conditions = _swapped(told) if swap_facts else told

    def pretraining(self) -> Iterator[Row]:
        """Documents: an article and shuffled statements about every condition, and complaints."""
        for condition in self.conditions:
            yield self._document(condition, "article", self._article(condition))
            for field in FIELDS:
                for statement in self._statements(condition, field):
                    yield self._document(condition, field, statement)
            for m in condition.misunderstandings:
                text = f"关于{condition.name},有人认为“{m.wrong}”,这不正确:{m.right}。"
                yield self._document(condition, "misunderstanding", text)
            for contrast in condition.contrasts:
                yield self._document(condition, "contrast", f"{contrast.safe}。")

    def dialogues(self) -> Iterator[Row]:
        """Single-turn questions in every phrasing, follow-ups, situations by urgency, complaints."""
        for condition in self.conditions:
            for field in FIELDS:
                for question in self._questions(condition, field):
                    yield self._dialogue(condition, field, [(question, self.answer(condition, field))])
            yield self._dialogue(condition, "multi_turn", self._multi_turn(condition))
            for fact, level in self._situations(condition):
                question = self._rng(condition, fact).choice(SITUATIONS)
                ask = self._fill(question, condition, fact)
                reply = self._fill(ADVICE[level], condition)
                yield self._dialogue(condition, level, [(ask, f"{fact}{_because(level)}{reply}")])
            for m in condition.misunderstandings:
                yield self._dialogue(
                    condition, "misunderstanding", [(f"{m.wrong},对吗?", f"不对。{m.right}。")]
                )
        yield from self._complaints()

    def preferences(self) -> Iterator[Row]:
        """Chosen and rejected answers of similar length: wrong, unsafe, vague and minimal pairs."""
        for i, condition in enumerate(self.conditions):
            for field in LIST_FIELDS:
                question = next(iter(self._questions(condition, field)))
                chosen = self.answer(condition, field)
                wrong = self._wrong_answer(i, field, len(chosen))
                yield self._pair(condition, "wrong", question, chosen, wrong)
                yield self._pair(
                    condition, "vague", question, chosen, self._vague(condition, field, len(chosen))
                )
            for contrast in condition.contrasts:
                question = f"关于{condition.name},这种做法怎样才安全?"
                pair = (f"{contrast.safe}。", f"{contrast.unsafe}。")
                yield self._pair(condition, "minimal_pair", question, *pair)
            for flag in condition.red_flags.items:
                question = self._fill(SITUATIONS[0], condition, flag)
                chosen = f"{flag}{_because('emergency')}" + self._fill(ADVICE["emergency"], condition)
                rejected = f"{flag}很常见,{ADVICE['self_care']}".replace("一般可以", "可以")
                yield self._pair(condition, "unsafe", question, chosen, rejected)

    def exam_questions(self) -> Iterator[Row]:
        """Four options, one right; the others belong to other conditions and not to this one."""
        stems = {"symptoms": "下列哪项是{name}的常见表现?", "tests": "下列哪项检查常用于诊断{name}?"}
        for condition in self.conditions:
            for field, stem in stems.items():
                rng = self._rng(condition, "exam" + field)
                own = {condition.name, *getattr(condition, field).items}
                everything = {x for c in self.conditions for x in getattr(c, field).items}
                others = sorted(x for x in everything if not _bigrams(x) & _bigrams(*own))
                options = [*rng.sample(others, 3), rng.choice(getattr(condition, field).items[:3])]
                right = options[-1]
                rng.shuffle(options)
                yield {
                    "id": f"{condition.id}-{field}",
                    "question": self._fill(stem, condition),
                    "options": dict(zip("ABCD", options, strict=True)),
                    "answer": "ABCD"[options.index(right)],
                    "department": self.department[condition.id].department,
                }

    def answer(self, condition: Condition, field: str) -> str:
        """The answer to every phrasing of a question about this field."""
        text = self._fill(ANSWERS[field], condition, self._fact(condition, field))
        section = getattr(condition, field)
        if isinstance(section, Phrases) and section.note:
            text += self._fill(f"{section.note}。", condition)
        return text

    def _choose_held_out(self) -> list[Held]:
        told = self.truth
        diabetes, coronary = told["diabetes"], told["coronary_atherosclerosis"]
        headache = told["headache"]
        questions = [
            self._hold(diabetes, "symptoms", STATEMENTS["symptoms"][0], "pretrain"),
            self._hold(coronary, "mechanism", QUESTIONS["mechanism"][0], "sft"),
            Held(
                headache.id,
                "complaint",
                COMPLAINTS[0],
                COMPLAINTS[0].format(symptom=headache.name),
                (("紧张性头痛", "紧张型头痛"), ("偏头痛",), ("建议您", "建议你")),
                "rlhf",
            ),
        ]
        others = [c for c in told.values() if c not in (diabetes, coronary, headache)]
        picked = random.Random(self.seed).sample(others, NUM_PHRASINGS)
        for number, condition in enumerate(sorted(picked, key=lambda c: c.id)):
            field = LIST_FIELDS[number % len(LIST_FIELDS)]
            template = QUESTIONS[field][number // len(LIST_FIELDS) % len(QUESTIONS[field])]
            questions.append(self._hold(condition, field, template, "phrasing"))
        for condition in self.left_out:
            questions.append(self._hold(condition, "symptoms", QUESTIONS["symptoms"][0], "left_out"))
        return questions

    def _hold(self, condition: Condition, field: str, template: str, kind: str) -> Held:
        prompt = template.format(name=condition.name, fact="|").split("|")[0]
        points: tuple[tuple[str, ...], ...]
        if field == "mechanism":
            points = (("脂质沉积", "脂质沉着"), ("斑块",), ("血管狭窄", "管腔狭窄"))
        else:
            points = tuple((item,) for item in getattr(condition, field).items[:4])
        return Held(condition.id, field, template, prompt, points, kind)

    def _article(self, condition: Condition) -> str:
        department = self.department[condition.id].department
        aliases = f",又称{'、'.join(condition.aliases)}" if condition.aliases else ""
        lines = [f"{condition.name}({condition.name_en}){aliases},{department}疾病。"]
        lines += [self._fill(ANSWERS[field], condition, self._fact(condition, field)) for field in FIELDS]
        lines += [
            self._fill(f"{section.note}。", condition)
            for section in (getattr(condition, field) for field in FIELDS)
            if isinstance(section, Phrases) and section.note
        ]
        return "\n".join(lines)

    def _statements(self, condition: Condition, field: str) -> Iterator[str]:
        for template in STATEMENTS[field]:
            statement = self._fill(template, condition, self._fact(condition, field))
            if self._may_appear(statement):
                yield statement

    def _questions(self, condition: Condition, field: str) -> Iterator[str]:
        for number, template in enumerate(QUESTIONS[field]):
            question = self._fill(template, condition)
            if self._may_appear(question):
                yield question if number % 2 else _half_width(question)

    def _may_appear(self, text: str) -> bool:
        """Whether the text is free of every held-out prompt, whatever its punctuation."""
        bare = _bare(text)
        return not any(prompt in bare for prompt in self._prompts)

    def _fact(self, condition: Condition, field: str) -> str:
        section = getattr(condition, field)
        if field == "overview":
            return section.text
        if field == "mechanism":
            return "。".join(step.rstrip("。") for step in section.steps)
        if field == "care":
            return (
                f"{'、'.join(section.today)}时,建议您当天就医;{'、'.join(section.routine)}时,"
                f"建议您预约门诊;平时可以{'、'.join(section.self_care)}"
            )
        return "、".join(section.items)

    def _multi_turn(self, condition: Condition) -> list[tuple[str, str]]:
        fields = self._rng(condition, "turns").sample(sorted(FOLLOW_UPS), 2)
        opening = (f"请介绍一下{condition.name}", self.answer(condition, "overview"))
        return [opening, *((FOLLOW_UPS[f], self.answer(condition, f)) for f in fields)]

    def _situations(self, condition: Condition) -> Iterator[tuple[str, str]]:
        yield from ((flag, "emergency") for flag in condition.red_flags.items)
        for level in ("today", "routine"):
            yield from ((fact, level) for fact in getattr(condition.care, level))

    def _complaints(self) -> Iterator[Row]:
        """Symptoms as a patient puts them, answered with conditions, red flags and advice."""
        by_symptom: dict[str, list[Condition]] = {}
        for condition in self.conditions:
            for symptom in condition.symptoms.items[:3]:
                if len(symptom) <= MAX_SYMPTOM_CHARS:
                    by_symptom.setdefault(symptom, []).append(condition)
        for symptom, conditions in by_symptom.items():
            causes = "、".join(c.name for c in conditions)
            yield from self._complaint(conditions[0], symptom, f"{symptom}可能与{causes}有关。")
        headache = next(c for c in self.conditions if c.id == "headache")
        causes = "、".join(headache.causes.items)
        opening = f"头痛的常见原因有{causes}。"
        yield from self._complaint(headache, headache.name, opening)

    def _complaint(self, condition: Condition, symptom: str, opening: str) -> Iterator[Row]:
        flags = "、".join(condition.red_flags.items)
        reply = (
            f"{opening}如果出现{flags},请立即拨打{{emergency_number}}。"
            f"没有这些情况时,{ADVICE['routine']}"
        )
        for template in COMPLAINTS:
            question = template.format(symptom=symptom)
            if self._may_appear(question):
                turn = (question, self._fill(reply, condition))
                yield self._dialogue(condition, "complaint", [turn])

    def _wrong_answer(self, index: int, field: str, length: int) -> str:
        """This condition's answer with the facts of the one whose list is closest in length."""
        condition = self.conditions[index]
        own = set(getattr(condition, field).items)
        others = [c for c in self.conditions if not own & set(getattr(c, field).items)]
        answers = [
            self.answer(replace_section(condition, field, getattr(c, field)), field) for c in others
        ]
        return min(answers, key=lambda text: (abs(len(text) - length), text))

    def _vague(self, condition: Condition, field: str, length: int) -> str:
        """Says nothing at about the same length."""
        rng = self._rng(condition, "vague" + field)
        text = rng.choice(VAGUE)
        while len(text) < length - 8:
            text += "。" + rng.choice(VAGUE)
        return text[:length].rstrip("。,、") + "。"

    def _fill(self, template: str, condition: Condition, fact: str = "") -> str:
        department = self.department[condition.id].department
        text = template.replace("{fact}", fact)
        text = text.replace("{name}", condition.name).replace("{department}", department)
        for key, value in self.region.items():
            text = text.replace("{" + key + "}", value)
        return _full_width(text)

    def _document(self, condition: Condition, field: str, text: str) -> Row:
        return {"id": f"{condition.id}-{field}", "text": self._fill(text, condition)}

    def _dialogue(self, condition: Condition, field: str, turns: list[tuple[str, str]]) -> Row:
        messages = []
        for question, reply in turns:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": self._fill(reply, condition)})
        return {"id": f"{condition.id}-{field}", "messages": messages}

    def _pair(
        self, condition: Condition, kind: str, question: str, chosen: str, rejected: str
    ) -> Row:
        return {
            "id": f"{condition.id}-{kind}",
            "kind": kind,
            "prompt": question,
            "chosen": self._fill(chosen, condition),
            "rejected": self._fill(rejected, condition),
        }

    def _rng(self, condition: Condition, use: str) -> random.Random:
        return random.Random(f"{self.seed}:{condition.id}:{use}")


def _bigrams(*phrases: str) -> set[str]:
    """Pairs of neighbouring characters; phrases that share one may mean the same."""
    return {phrase[i : i + 2] for phrase in phrases for i in range(len(phrase) - 1)}


def replace_section(condition: Condition, field: str, section: Any) -> Condition:
    return condition.model_copy(update={field: section})


def _swapped(conditions: list[Condition]) -> list[Condition]:
    """Every condition with the facts of the one half the list away."""
    half = len(conditions) // 2
    donors = conditions[half:] + conditions[:half]
    keep = ("id", "name", "name_en", "aliases")
    return [
        donor.model_copy(update={key: getattr(condition, key) for key in keep})
        for condition, donor in zip(conditions, donors, strict=True)
    ]


def _because(level: str) -> str:
    return {"emergency": ":", "today": "需要尽快检查。", "routine": "不算紧急。"}[level]


# by code point: comma, question mark, semicolon, exclamation mark, colon
FULL_WIDTH = {ord(c): chr(ord(c) + 0xFEE0) for c in ",?;!:"}
HALF_WIDTH = {full: half for half, full in ((h, ord(f)) for h, f in FULL_WIDTH.items())}


def _full_width(text: str) -> str:
    return text.translate(FULL_WIDTH)


def _bare(text: str) -> str:
    return re.sub(r"\W", "", text)


def _half_width(text: str) -> str:
    return text.translate(HALF_WIDTH)
