"""A small model fine-tuned on questions and answers like the sample corpus's."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from medgpt.data.loader.batch import IGNORE
from medgpt.data.sources.records import Message
from medgpt.data.tokenized.chat_template import generation_prompt_ids, stop_token_ids
from medgpt.rlhf.rewards.sample_corpus import NUM_CAUSES, known_causes
from medgpt.sample_corpus.templates import TEXTS
from tests.models.tiny_models import model_with_tokenizer

NUM_COMPLAINTS, HELD_OUT = 10, 5  # complaints; phrasings kept for evaluation
VAGUE_OPENINGS = ("这个问题比较复杂", "可能有很多种原因", "每个人的情况都不一样")
GOOD_SHARE = 0.35  # of answers that name causes; independently, of those with advice
STEPS, BATCH = 250, 48


def questions(templates: Sequence[str]) -> list[str]:
    """Each complaint in each phrasing."""
    symptoms = list(known_causes())[:NUM_COMPLAINTS]
    return [template.format(symptom=symptom) for template in templates for symptom in symptoms]


def train_prompts() -> list[str]:
    return questions(TEXTS.prompt_complaints[HELD_OUT:])


def held_out_prompts() -> list[str]:
    return questions(TEXTS.prompt_complaints[:HELD_OUT])


def answer(question: str, dice: random.Random) -> str:
    """Return a random answer; GOOD_SHARE of them are good."""
    causes = next(causes for symptom, causes in known_causes().items() if symptom in question)
    good = f"可能是{'或'.join(causes[:NUM_CAUSES])}"
    opening = good if dice.random() < GOOD_SHARE else dice.choice(VAGUE_OPENINGS)
    advice = "建议您到医院检查" if dice.random() < GOOD_SHARE else "平时多注意休息"
    return f"{opening}。{advice}。"


def save_fine_tuned(folder: Path) -> None:
    """Train for some seconds and write model and tokenizer."""
    dice = random.Random(0)
    pairs = [(q, answer(q, dice)) for _ in range(20) for q in train_prompts()]
    texts = [text for pair in pairs for text in pair]
    model, tokenizer = model_with_tokenizer(
        texts, vocab_size=500, hidden_size=64, intermediate_size=128, max_positions=128
    )
    model.set_attn_implementation("sdpa")
    end = stop_token_ids(tokenizer)[-1]
    rows = []
    for question, text in pairs:
        prompt = generation_prompt_ids(tokenizer, [Message("user", question)])
        rows.append((prompt, [*tokenizer.encode(text, add_special_tokens=False), end]))
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, 3e-3, total_steps=STEPS)
    for _ in range(STEPS):
        ids, labels = batch(dice.sample(rows, BATCH))
        model(input_ids=ids, labels=labels).loss.backward()
        adam.step()
        adam.zero_grad()
        rate.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def batch(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """(B, L) ids and labels, padded on the right, where causal attention ignores it."""
    ids = pad_sequence([torch.tensor(p + r) for p, r in rows], batch_first=True)
    labels = [torch.tensor([IGNORE] * len(p) + r) for p, r in rows]
    return ids, pad_sequence(labels, batch_first=True, padding_value=IGNORE)


def shuffled(prompts: Sequence[str], size: int, seed: int) -> Iterator[list[str]]:
    """Yield endless batches with each prompt once per pass."""
    dice, left = random.Random(seed), []
    while True:
        while len(left) < size:
            left += dice.sample(prompts, len(prompts))
        yield left[:size]
        left = left[size:]
