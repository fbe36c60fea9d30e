"""Text from a finished model, one prompt at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TextStreamer,
)

from medgpt.config import ConfigError
from medgpt.data.chat import generation_ids, stop_ids
from medgpt.data.records import Message
from medgpt.models.load import fitting_architectures
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
        eos_token_id=_document_ends(tokenizer), pad_token_id=tokenizer.pad_token_id
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
    return _generate_all(model, tokenizer, prompts, _document_ends(tokenizer), max_new_tokens)


def _document_ends(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    if tokenizer.chat_template:
        return stop_ids(tokenizer)
    end = tokenizer.eos_token_id
    assert isinstance(end, int), "load_base takes no tokenizer without an end token"
    return [end]


@torch.inference_mode()
def _generate_all(
    model: Any,  # transformers does not type generate()
    tokenizer: Any,
    prompts: list[list[int]],
    ends: list[int],
    max_new_tokens: int,
    **options: Any,
) -> list[str]:
    """Texts generated after the prompts (padded left), up to the token that ends each."""
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
    new = [_until(row, ends) for row in output[:, width:].tolist()]
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in new]


def _until(ids: list[int], ends: list[int]) -> list[int]:
    """`ids` before the first that is in `ends`."""
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]
