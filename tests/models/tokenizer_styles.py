"""Train tokenizers in the styles of the model families on a few sentences."""

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AddedToken, PreTrainedTokenizerFast
from transformers.models.gpt2.tokenization_gpt2 import GPT2Tokenizer
from transformers.models.llama.tokenization_llama import LlamaTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX, Qwen2Tokenizer
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

SENTENCES = (
    "糖尿病的主要症状包括多饮、多尿、多食和体重下降。",
    "什么是高血压?高血压是常见的慢性病,血压持续升高。",
    "我头痛3天了,请测量体温。体温38.5度时请多喝水,注意休息。",
    "冠状动脉粥样硬化的发病机制很复杂,与高血压、吸烟有关。",
    "如果胸痛持续不缓解,请立即拨打120。",
    "The patient has had a headache for three days; what should she do now?",
    "Take 500 mg of the medicine twice a day with water, and see a doctor if it gets worse.",
    "High blood pressure is common. Measure it every day and write the value down.",
    "Diabetes causes thirst, frequent urination and weight loss.",
)
CORPUS = [*SENTENCES * 20, "user assistant system model final analysis\n\n" * 5]
VOCAB_SIZE = 480  # before special tokens; 256 of them spell bytes

Rules = dict[str, Any]


def byte_level_rules(size: int = VOCAB_SIZE, first: Sequence[str] = ()) -> Rules:
    """Return vocabulary and merges of a byte-level BPE whose first ids are the tokens `first`."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(first),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(CORPUS, trainer)
    return _vocab_and_merges(learner)


def byte_fallback_rules(first: Sequence[str]) -> Rules:
    """Return vocabulary and merges of a SentencePiece-like BPE: characters, rare ones in bytes."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE + 40,
        special_tokens=[*first, *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=150,  # the other characters of the corpus are spelled in bytes
        max_token_length=8,
        show_progress=False,
    )
    learner.train_from_iterator(chain.from_iterable(c.split(",") for c in CORPUS), trainer)
    return _vocab_and_merges(learner)


def unigram_vocabulary(first: Sequence[str], unknown: str) -> list[tuple[str, float]]:
    """Return pieces and scores of a Unigram model whose first ids are the tokens `first`."""
    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=list(first), unk_token=unknown, show_progress=False
    )
    learner.train_from_iterator(CORPUS, trainer)
    pieces = json.loads(learner.to_str())["model"]["vocab"]
    return [(token, 0.0 if token in first else score) for token, score in pieces]


def _vocab_and_merges(learner: Tokenizer) -> Rules:
    model = json.loads(learner.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def special(*texts: str) -> list[AddedToken]:
    return [AddedToken(text, special=True, normalized=False) for text in texts]


def plain(*texts: str) -> list[AddedToken]:
    """Added tokens that are no special tokens, such as <think> in Qwen3."""
    return [AddedToken(text, special=False, normalized=False) for text in texts]


def qwen(eos: str, *, added: Sequence[AddedToken] = (), newest: bool = False) -> Any:
    cls = Qwen3_5Tokenizer if newest else Qwen2Tokenizer
    tokenizer = cls(**byte_level_rules(), eos_token=eos, pad_token="<|endoftext|>")
    tokenizer.add_tokens([*special("<|endoftext|>", "<|im_start|>", "<|im_end|>"), *added])
    return tokenizer


def gpt2_style(added: Sequence[AddedToken] = (), first: Sequence[str] = (), **tokens: Any) -> Any:
    """GPT-2, OPT, OLMo2."""
    tokenizer = GPT2Tokenizer(**byte_level_rules(first=first), **tokens)
    tokenizer.add_tokens(list(added))
    return tokenizer


def tiktoken_style(
    added: Sequence[AddedToken], *, adds_bos: bool = False, **tokens: str | None
) -> PreTrainedTokenizerFast:
    """Llama-3, GLM-4, DeepSeek, gpt-oss, Mistral's tekken, BLOOM, Falcon: byte-level, as saved."""
    backend = Tokenizer(models.BPE(**byte_level_rules(), ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(list(added))
    if adds_bos:
        bos = tokens["bos_token"]
        assert bos is not None
        backend.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(
                    single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
                ),
            ]
        )
    given: Any = {name: token for name, token in tokens.items() if token is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **given
    )


def llama_style(added: Sequence[AddedToken] = (), *, as_saved: bool = False, **tokens: Any) -> Any:
    """Llama-2, Mistral, MiniCPM, Phi-3: ▁ before the text, bos, byte fallback.

    as_saved: the rules as older tokenizer.json files hold them, in a normalizer.
    """
    rules = byte_fallback_rules(["<unk>", "<s>", "</s>"])
    if not as_saved:
        tokenizer = LlamaTokenizer(**rules, **tokens)
        tokenizer.add_tokens(list(added))
        return tokenizer
    backend = Tokenizer(models.BPE(**rules, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_tokens([*special("<unk>", "<s>", "</s>"), *added])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    defaults = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **defaults | tokens
    )
