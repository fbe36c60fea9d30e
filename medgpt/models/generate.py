"""Load a finished model and generate text with it.

Only the temperature shapes the distribution. generation_config.json, such as a repetition penalty,
is ignored, so that evaluation scores measure the model itself.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from medgpt.config.base import ConfigError
from medgpt.data.sources.records import Message
from medgpt.data.tokenized.chat_template import generation_prompt_ids, stop_token_ids
from medgpt.models.answers import (
    answer_text,
    end_of_thought_ids,
    generate_within_budget,
    is_thinking,
)
from medgpt.models.decode import TokenGenerator
from medgpt.models.lora import load_merged
from medgpt.models.model_files import (
    compatible_architectures,
    has_adapters,
    read_hf_config,
    weight_files,
)
from medgpt.models.stops import document_stop_ids
from medgpt.models.tokenizer import check_embedding_rows, load_tokenizer


def load_for_generation(
    folder: str,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    init_seed: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load the model and tokenizer of an export, in eval mode; adapters are merged in memory.

    Raises ConfigError if the folder holds no causal model.

    Args:
        dtype: of the weights; None: as saved.
        init_seed: draw weights with this seed instead of loading them.
    """
    check_causal_model(folder, trust_remote_code)
    if init_seed is not None:
        model, tokenizer = _load_untrained(folder, trust_remote_code, init_seed)
    elif has_adapters(folder):
        model, tokenizer = load_merged(Path(folder), trust_remote_code=trust_remote_code)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=trust_remote_code
        )
        tokenizer = load_tokenizer(folder, trust_remote_code)
    embedding: Any = model.get_input_embeddings()
    check_embedding_rows(folder, tokenizer, len(embedding.weight))
    if dtype is not None:
        for parameter in model.parameters():  # model.to would also round the rotary frequencies
            parameter.data = parameter.data.to(dtype)
    model.to(device)  # type: ignore[arg-type]
    return model.eval(), tokenizer


def _load_untrained(
    folder: str, trust_remote_code: bool, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    if has_adapters(folder):
        raise ConfigError(
            f"model.untrained=true: {folder} holds adapters of a trained base model; merge them "
            "first, or name the base model"
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model, load_tokenizer(folder, trust_remote_code)


def check_causal_model(folder: str, trust_remote_code: bool = False) -> None:
    """Raise ConfigError unless the folder holds a causal model or adapters; load nothing."""
    if has_adapters(folder):
        return
    if not (Path(folder) / "config.json").exists():
        raise ConfigError(f"no model in {folder}; give a finished run or its model folder")
    config = read_hf_config(Path(folder), folder, trust_remote_code)
    architectures = config.architectures or []
    if not compatible_architectures(config, "clm").intersection(architectures):
        raise ConfigError(
            f"{folder} holds {', '.join(architectures) or 'no known model'}, which cannot "
            "generate text; give a causal model"
        )
    weight_files(folder)


def stream_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt: list[int],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    thinking_tokens: int | None = None,
) -> Iterator[int]:
    """Yield the ids of the assistant's next turn as they are generated, with the stop token.

    A thought of more than `thinking_tokens` is ended there.
    """
    generator, stops = TokenGenerator(model), stop_token_ids(tokenizer)
    options: dict[str, Any] = {"temperature": temperature, "stop_token_ids": stops}
    budget = max_new_tokens if thinking_tokens is None else min(thinking_tokens, max_new_tokens)
    ids: list[int] = []
    for token in generator.stream(prompt, seed, max_new_tokens=budget, **options):
        ids.append(token)
        yield token
    if ids[-1] in stops or budget == max_new_tokens:
        return
    ended = end_of_thought_ids(tokenizer) if is_thinking(tokenizer, prompt, ids) else []
    yield from ended
    num_left = max_new_tokens - budget - len(ended)
    if num_left > 0:
        prompt = [*prompt, *ids, *ended]
        yield from generator.stream(prompt, seed + 1, max_new_tokens=num_left, **options)


def generate_greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    are_questions: bool,
    max_new_tokens: int,
) -> list[str]:
    """Return greedy answers to independent questions, or greedy continuations of documents."""
    if are_questions:
        prompts = [generation_prompt_ids(tokenizer, [Message("user", text)]) for text in texts]
        stop_ids = stop_token_ids(tokenizer)
    else:
        prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        stop_ids = document_stop_ids(tokenizer)
    options: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": max_new_tokens}
    seeds = [0] * len(prompts)
    responses = generate_responses(model, tokenizer, prompts, stop_ids, seeds=seeds, **options)
    return [text for text, _ in responses]


def generate_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    stop_token_ids: list[int],
    *,
    max_new_tokens: int,
    temperature: float,
    seeds: Sequence[int],
    thinking_tokens: int | None = None,
) -> list[tuple[str, bool]]:
    """Return the answer to each prompt, after its thought, and whether it ended with a stop token.

    Takes the arguments of TokenGenerator.generate; a thought of more than `thinking_tokens` is
    ended there.
    """
    generator = TokenGenerator(model)
    options: dict[str, Any] = {"temperature": temperature, "stop_token_ids": stop_token_ids}
    options["max_new_tokens"] = max_new_tokens
    if thinking_tokens is None:
        responses = generator.generate(prompts, seeds, **options)
    else:
        responses = generate_within_budget(
            generator, tokenizer, prompts, seeds, thinking_tokens=thinking_tokens, **options
        )
    answers = []
    for prompt, reply in zip(prompts, responses, strict=True):
        ids = reply.ids[:-1] if reply.finished else reply.ids
        answers.append((answer_text(tokenizer, prompt, ids).strip(), reply.finished))
    return answers
