"""Loads templates.toml: the sentence templates of the sample corpus."""

import tomllib
from pathlib import Path

from medgpt.sample_corpus.knowledge import KnowledgeModel

FIELDS = ("overview", "symptoms", "causes", "mechanism", "tests", "treatment", "red_flags", "care")
LIST_FIELDS = ("symptoms", "causes", "tests", "treatment")  # their facts are lists of phrases


class Templates(KnowledgeModel):
    statements: dict[str, tuple[str, ...]]
    """Sentences of documents, by field."""
    questions: dict[str, tuple[str, ...]]
    """Phrasings of questions, by field."""
    answers: dict[str, str]
    """The answer to all phrasings of a question, by field."""
    follow_ups: dict[str, str]
    """Later questions of a dialogue, by field."""
    care: str
    urgency: dict[str, str]
    """Last sentence of answers about a condition that cannot wait, by level."""
    doctor_decides: str
    hotline: str
    misunderstanding: str
    situations: tuple[str, ...]
    advice: dict[str, str]
    """Reply to a situation, by level of urgency."""
    self_care_question: str
    care_question: str
    complaints: tuple[str, ...]
    prompt_complaints: tuple[str, ...]
    greetings: tuple[str, ...]
    held_out_headache_prompts: tuple[str, ...]
    complaint_symptoms: tuple[tuple[str, str, tuple[str, ...]], ...]
    """(complaint, its wording in the symptoms of the conditions, condition ids)."""
    complaint_causes: str
    headache_causes: str
    complaint_advice: str
    observation_advice: str
    vague_clauses: tuple[str, ...]
    unsafe_answers: tuple[str, ...]
    unsafe_suicide_answer: str
    exam_questions: dict[str, str]
    """Question, by field."""
    regions: dict[str, dict[str, str]]
    """Values of {emergency_number} and {hotline}, by region."""


_FILE = Path(__file__).with_name("templates.toml")
TEXTS = Templates.model_validate(tomllib.loads(_FILE.read_text("utf-8")))
