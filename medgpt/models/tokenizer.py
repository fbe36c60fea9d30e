"""Load the tokenizer of a base model, or train one on the data.

A trained byte-level BPE pre-tokenizes text as Qwen2 does, because AutoTokenizer rebuilds the
tokenizer of every model of type qwen2 with Qwen2's rules (and NFC), whatever its tokenizer.json
says. Its tokens obey stricter rules: whole Chinese words, no punctuation inside, single digits.
"""

import datetime
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from medgpt.config.base import ModelError
from medgpt.config.model import DEFAULT_DATE, TokenizerConfig
from medgpt.data.tokenized.chat_template import CHATML, END_OF_TEXT, TURN_END, TURN_START
from medgpt.data.tokenized.template_choice import freeze_date
from medgpt.data.tokenized.words import HAN, han_words
from medgpt.models.fetch import local_copy

_BPE_SPECIAL = [END_OF_TEXT, TURN_START, TURN_END]
_WORDPIECE_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_BYTE_TO_CHARACTER = bytes_to_unicode()
_WORD_BREAK = "\x1f"
_CHARACTER_COVERAGE = 0.9995  # rarer characters are spelled in bytes; SentencePiece's default
_TOKEN_PATTERN = (  # a token is within one match: digit, Chinese, other letters, space, punctuation
    rf"\p{{N}}|[{HAN}]+| ?[\p{{L}}\p{{M}}&&[^{HAN}]]+"
    rf"|\s*[\r\n]+|\s+(?!\S)|\s+|[^\s\p{{L}}\p{{M}}\p{{N}}{HAN}]+"
)
_TOKEN_SPLITTER = pre_tokenizers.Split(Regex(_TOKEN_PATTERN), "isolated")
MAX_RUN = 256  # characters; longer than the words and chemical names of any language
_LONG_STRETCH = re.compile(rf"[^\s\d{HAN}]{{{MAX_RUN + 1},}}|\s{{{MAX_RUN + 1},}}")  # may be a run

Merge = tuple[str, str]


def load_tokenizer(
    name: str, trust_remote_code: bool = False, date: datetime.date = DEFAULT_DATE
) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model: a folder, a URI or a hub id.

    Its chat template prints `date` if it asks for the day, so that prompts do not change from day
    to day. Raises ConfigError if there is none, or it has no fast version or no end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            local_copy(name), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            name,
            f"the tokenizer cannot be loaded ({str(error).splitlines()[0]}); name a folder "
            "with tokenizer.json and tokenizer_config.json, or a hub id",
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(name, "the tokenizer has no fast version; save it as tokenizer.json")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers made it from config.json
        raise ModelError(name, "the model has no tokenizer; copy tokenizer.json into its folder")
    if tokenizer.eos_token is None and tokenizer.sep_token is None:
        raise ModelError(
            name, "the tokenizer has no end token; set eos_token in tokenizer_config.json"
        )
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = freeze_date(tokenizer.chat_template, date)
    return tokenizer


def check_embedding_rows(name: str, tokenizer: PreTrainedTokenizerFast, num_rows: int) -> None:
    """Raise ConfigError if the tokenizer of model `name` has ids without a row of its embedding."""
    num_ids = max(tokenizer.get_vocab().values()) + 1
    if num_ids > num_rows:
        raise ModelError(
            name,
            f"its tokenizer has the ids 0 to {num_ids - 1}, and its embedding only {num_rows} "
            "rows, as when tokens were added to the tokenizer alone; save the model with "
            f"resize_token_embeddings({num_ids}, pad_to_multiple_of=64) of transformers, or take "
            "the added tokens out of the tokenizer's files",
        )


def end_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id of the end-of-text token, which some models also see before a text."""
    end = tokenizer.eos_token_id
    assert isinstance(end, int), "load_tokenizer refuses tokenizers without an end token"
    return end


def common_prefix_length(sequences: Sequence[Any]) -> int:
    """Return how many leading elements all sequences share: token ids or characters."""
    first, last = min(sequences), max(sequences)  # the two that differ earliest
    pairs = enumerate(zip(first, last, strict=False))
    return next((i for i, (a, b) in pairs if a != b), len(first))


def train_tokenizer(
    texts: Iterator[str], config: TokenizerConfig, kind: Literal["bpe", "wordpiece"]
) -> PreTrainedTokenizerFast:
    """Train a tokenizer of at most config.vocab_size tokens; the order of `texts` does not matter.

    bpe: byte-level, decodes to exactly the text; <|endoftext|> ends documents and pads.
    wordpiece: BERT's, cased.
    """
    return _train_bpe(texts, config) if kind == "bpe" else _train_wordpiece(texts, config)


def may_be_one_token(text: str, max_chinese_run: int) -> bool:
    """Return whether a trained byte-level BPE may have `text` as one token."""
    is_chinese = any(True for _ in han_words(text))
    is_unsplit = len(_TOKEN_SPLITTER.pre_tokenize_str(text)) == 1
    return is_unsplit and not (is_chinese and len(text) > max_chinese_run)


def _train_bpe(texts: Iterator[str], config: TokenizerConfig) -> PreTrainedTokenizerFast:
    """Learn merges on characters, then spell them as bytes: no token ends inside a character."""
    corpus = [_mark_word_breaks(text, config.max_chinese_run) for text in texts]
    vocabulary = {
        token: i for i, token in enumerate([*_BPE_SPECIAL, *sorted(_BYTE_TO_CHARACTER.values())])
    }
    num_merges = config.vocab_size - len(vocabulary)
    characters, merges = character_merges(
        frequent_characters(corpus), lambda character: list(spell_bytes(character)), num_merges // 2
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_WORD_BREAK, "removed"), _TOKEN_SPLITTER]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=len(characters) + num_merges - len(merges),
        min_frequency=2,
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)
    for left, right in json.loads(learner.to_str())["model"]["merges"]:
        merges.append((spell_bytes(left), spell_bytes(right)))
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    return _wrap_bpe(vocabulary, merges)


def _mark_word_breaks(text: str, max_run: int) -> str:
    """Insert a break after every Chinese word, and every `max_run` characters inside long ones."""
    parts, done = [], 0
    for start, end in han_words(text):
        parts.append(text[done:start])
        parts += [text[i : min(i + max_run, end)] + _WORD_BREAK for i in range(start, end, max_run)]
        done = end
    return cut_long_runs("".join([*parts, text[done:]]), _WORD_BREAK)


def cut_long_runs(text: str, mark: str) -> str:
    """Insert `mark` into runs of letters, punctuation or spaces longer than MAX_RUN characters.

    The trainers of tokenizers take a time quadratic in the longest run, such as DNA.
    """
    parts, done = [], 0
    for stretch in _LONG_STRETCH.finditer(text):
        for _, (start, end) in _TOKEN_SPLITTER.pre_tokenize_str(stretch.group()):
            for cut in range(stretch.start() + start + MAX_RUN, stretch.start() + end, MAX_RUN):
                parts.append(text[done:cut])
                done = cut
    return mark.join([*parts, text[done:]])


def frequent_characters(corpus: list[str]) -> list[str]:
    """Return the characters that cover _CHARACTER_COVERAGE of the corpus, most frequent first."""
    counts = Counter[str]()
    for text in corpus:
        counts.update(text)
    del counts[_WORD_BREAK]
    ordered = sorted(counts, key=lambda character: (-counts[character], character))
    running_totals = accumulate(counts[character] for character in ordered)
    limit = _CHARACTER_COVERAGE * counts.total()
    return [
        c for c, total in zip(ordered, running_totals, strict=True) if total - counts[c] < limit
    ]


def character_merges(
    characters: list[str], spell: Callable[[str], list[str]], max_merges: int
) -> tuple[list[str], list[Merge]]:
    """Return the first characters that at most `max_merges` merges can build, and the merges.

    Args:
        spell: returns the tokens from which a character is built.
    """
    built: list[str] = []
    merges: dict[Merge, None] = {}
    for character in characters:
        tokens = spell(character)
        chain = list(zip(accumulate(tokens), tokens[1:], strict=False))
        if len(merges) + sum(pair not in merges for pair in chain) > max_merges:
            break
        merges.update(dict.fromkeys(chain))
        built.append(character)
    return built, list(merges)


def spell_bytes(text: str) -> str:
    """Return `text` as byte-level tokenizers spell it: one printable character per byte."""
    return "".join(_BYTE_TO_CHARACTER[byte] for byte in text.encode())


def _wrap_bpe(vocabulary: dict[str, int], merges: list[Merge]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=AddedToken(END_OF_TEXT, special=True, normalized=False),
        pad_token=AddedToken(END_OF_TEXT, special=True, normalized=False),
        extra_special_tokens=[
            AddedToken(text, special=True, normalized=False) for text in (TURN_START, TURN_END)
        ],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,  # it would remove spaces while decoding
    )


def _train_wordpiece(texts: Iterator[str], config: TokenizerConfig) -> PreTrainedTokenizerFast:
    corpus = [cut_long_runs(text, " ") for text in texts]
    cased = partial(BertTokenizer, do_lower_case=False, strip_accents=False)
    learner = cased().backend_tokenizer
    characters = [c for c in frequent_characters(corpus) if not c.isspace()][
        : config.vocab_size // 2
    ]
    # continuations of a word; listed here, as the trainer would number them in random hash order
    continuations = [f"##{c}" for c in characters if learner.normalizer.normalize_str(c) == c]
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,
        special_tokens=[*_WORDPIECE_SPECIAL, *continuations],
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)
    return cased(vocab=learner.get_vocab(with_added_tokens=True))
