"""Text from a finished model, one batch of prompts at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TextStreamer,
)

from medgpt.config import ConfigError
from medgpt.data.chat import generation_ids, stop_ids
from medgpt.data.records import Message
from medgpt.models.base import fitting_architectures
from medgpt.models.lora import load_merged
from medgpt.models.tokenizer import load_base


def load_for_generation(
    folder: str, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model and tokenizer of an export; adapters are merged in memory.

    Raises:
        ConfigError: the folder holds no causal model.
    """
    if (Path(folder) / "adapter_config.json").exists():
        model, tokenizer = load_merged(Path(folder))
    elif (Path(folder) / "config.json").exists():
        config = AutoConfig.from_pretrained(folder)
        found = config.architectures or []
        if not fitting_architectures(config, "clm").intersection(found):
            raise ConfigError(
                f"{folder} holds {', '.join(found) or 'no known model'}, which cannot generate "
                "text; give a causal model"
            )
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
        tokenizer = load_base(folder)
    else:
        raise ConfigError(f"no model in {folder}; give a finished run or its model folder")
    model.to(device)  # type: ignore[arg-type]
    return model.eval(), tokenizer


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """What tells others' generate() where to stop."""
    return GenerationConfig(
        eos_token_id=document_ends(tokenizer), pad_token_id=tokenizer.pad_token_id
    )


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    question: str | Sequence[Message],
    *,
    max_new_tokens: int,
    streamer: TextStreamer | None = None,
    **sampling: Any,
) -> str:
    """The assistant's next turn, greedy unless `sampling` says otherwise."""
    messages = [Message("user", question)] if isinstance(question, str) else question
    prompt = generation_ids(tokenizer, messages)
    ends = stop_ids(tokenizer)
    options = {"streamer": streamer, **sampling}
    return _generate_all(model, tokenizer, [prompt], ends, max_new_tokens, **options)[0]


def answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    *,
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers to single questions, generated together."""
    prompts = [generation_ids(tokenizer, [Message("user", text)]) for text in questions]
    return _generate_all(model, tokenizer, prompts, stop_ids(tokenizer), max_new_tokens)


def continue_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
) -> list[str]:
    """Greedy continuations of documents, generated together."""
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return _generate_all(model, tokenizer, prompts, document_ends(tokenizer), max_new_tokens)


def reply_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    ends: list[int],
    *,
    max_new_tokens: int,
    temperature: float,
    seeds: Sequence[int],
) -> list[tuple[str, bool]]:
    """What the model says after each prompt's ids, and whether it came to an end by itself.

    Args:
        seeds: one for each prompt; a sampled reply depends on it, not on the others of the batch.
        temperature: 0 always takes the likeliest token.
    """
    sampler = [Sampler(temperature, seeds)] if temperature else []
    options: dict[str, Any] = {"logits_processor": LogitsProcessorList(sampler)}
    options["repetition_penalty"] = 1.0  # a score is the model's, not of what was tuned around it
    rows = _generate_ids(model, prompts, ends, max_new_tokens, **options)
    return [
        (_decode(tokenizer, _until(row, ends)), any(token in ends for token in row)) for row in rows
    ]


class Sampler(LogitsProcessor):
    """Makes the likeliest token a sample at `temperature`, by Gumbel noise of a row's own seed.

    Maddison et al., 2014, https://arxiv.org/abs/1411.0030: argmax(logits / T + Gumbel) is a draw
    from softmax(logits / T).
    """

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V)"""
        noise = torch.stack(
            [torch.empty(scores.shape[1]).exponential_(generator=g) for g in self.generators]
        )
        return scores.float() / self.temperature - noise.log().to(scores.device)


def document_ends(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids that end a continued text."""
    if tokenizer.chat_template:
        return stop_ids(tokenizer)
    end = tokenizer.eos_token_id
    assert isinstance(end, int), "load_base takes no tokenizer without an end token"
    return [end]


def _generate_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    ends: list[int],
    max_new_tokens: int,
    **options: Any,
) -> list[str]:
    """Texts generated after the prompts, up to the token that ends each."""
    rows = _generate_ids(model, prompts, ends, max_new_tokens, **options)
    return [_decode(tokenizer, _until(row, ends)) for row in rows]


@torch.inference_mode()
def _generate_ids(
    model: Any,  # transformers does not type generate()
    prompts: list[list[int]],
    ends: list[int],
    max_new_tokens: int,
    **options: Any,
) -> list[list[int]]:
    """Token ids after the prompts (padded left), with what follows an end in a longer batch."""
    width = max(len(prompt) for prompt in prompts)
    padded = [[ends[0]] * (width - len(prompt)) + prompt for prompt in prompts]
    real = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    output = model.generate(
        torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(real, device=model.device),
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=ends[0],
        **{"do_sample": False, **options},
    )
    return output[:, width:].tolist()


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def _until(ids: list[int], ends: list[int]) -> list[int]:
    """`ids` before the first that is in `ends`."""
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]
