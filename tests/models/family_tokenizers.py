"""The tokenizers of the model families: their classes, special tokens and rules."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, PreTrainedTokenizerFast
from transformers.models.deberta.tokenization_deberta import DebertaTokenizer
from transformers.models.deberta_v2.tokenization_deberta_v2 import DebertaV2Tokenizer
from transformers.models.gemma.tokenization_gemma import GemmaTokenizer
from transformers.models.roberta.tokenization_roberta import RobertaTokenizer
from transformers.models.xlm_roberta.tokenization_xlm_roberta import XLMRobertaTokenizer

from tests.models.tokenizer_styles import (
    CORPUS,
    VOCAB_SIZE,
    byte_fallback_rules,
    byte_level_rules,
    gpt2_style,
    llama_style,
    plain,
    qwen,
    special,
    tiktoken_style,
    unigram_vocabulary,
)

IM_END, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"
THINKING = plain("<think>", "</think>", "<tool_call>", "</tool_call>")
LLAMA_3 = special(
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
)
DEEPSEEK = [
    *special("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"),
    *plain("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
]
GLM = special(
    END_OF_TEXT,
    "[MASK]",
    "[gMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
MISTRAL = special("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
PHI = special(END_OF_TEXT, "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
HARMONY = special(
    "<|startoftext|>",
    END_OF_TEXT,
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)


def qwen2_base() -> Any:
    return qwen(END_OF_TEXT)


def qwen2_5() -> Any:
    return qwen(IM_END)


def qwen3() -> Any:
    return qwen(IM_END, added=THINKING)


def qwen3_5() -> Any:
    return qwen(IM_END, added=THINKING, newest=True)


def llama2() -> Any:
    return llama_style(add_bos_token=True)


def llama3() -> Any:
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return tiktoken_style(LLAMA_3, adds_bos=True, **names)


def mistral_v3() -> Any:
    return llama_style(MISTRAL, as_saved=True)


def mistral_v7() -> Any:
    added = special("<unk>", "<s>", "</s>", "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return tiktoken_style([*added, *MISTRAL], adds_bos=True, **names)


def phi3() -> Any:
    tokens = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    return llama_style(PHI, as_saved=True, **tokens)


def glm4() -> Any:
    return tiktoken_style(GLM, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def glm4_moe() -> Any:
    added = [*GLM, *plain("<think>", "</think>", "/nothink")]
    return tiktoken_style(added, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def deepseek() -> Any:
    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    return tiktoken_style(DEEPSEEK, adds_bos=True, bos_token=bos, eos_token=eos, pad_token=eos)


def gpt_oss() -> Any:
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": END_OF_TEXT}
    return tiktoken_style(HARMONY, **names)


def olmo2() -> Any:
    return gpt2_style(special("<|endoftext|>", "<|pad|>"), pad_token="<|pad|>")


def minicpm() -> Any:
    return llama_style(special("<|im_start|>", IM_END), add_bos_token=True)


def gpt2() -> Any:
    return gpt2_style(special(END_OF_TEXT))


def bloom() -> Any:
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return tiktoken_style(special(*names.values()), **names)


def falcon() -> Any:
    return tiktoken_style(special(END_OF_TEXT), eos_token=END_OF_TEXT)


def opt() -> Any:
    names = {"unk_token": "</s>", "bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    first = ["<s>", "<pad>", "</s>", "<unk>"]
    return gpt2_style(first=first, add_bos_token=True, **names)


def gemma() -> GemmaTokenizer:
    rules = byte_fallback_rules(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    tokenizer = GemmaTokenizer(**rules, add_bos_token=True)
    tokenizer.add_tokens(special("<start_of_turn>", "<end_of_turn>"))
    return tokenizer


def biogpt() -> PreTrainedTokenizerFast:
    """BPE of lower-case words with </w>, saved as a fast tokenizer; the original is a slow one."""
    learner = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(CORPUS, trainer)
    learner.decoder = decoders.BPEDecoder()
    learner.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=learner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        sep_token="</s>",
    )


def bert() -> BertTokenizer:
    learner = BertTokenizer().backend_tokenizer
    trainer = trainers.WordPieceTrainer(
        vocab_size=300,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        show_progress=False,
    )
    learner.train_from_iterator(CORPUS, trainer)
    return BertTokenizer(vocab=learner.get_vocab(with_added_tokens=True))


def roberta() -> RobertaTokenizer:
    first = ["<s>", "<pad>", "</s>", "<unk>"]  # pad is 1, so that positions begin at 2
    rules = byte_level_rules(first=first)
    rules["vocab"]["<mask>"] = len(rules["vocab"])
    return RobertaTokenizer(**rules)


def deberta() -> DebertaTokenizer:
    return DebertaTokenizer(
        **byte_level_rules(first=["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"])
    )


def deberta_v2() -> DebertaV2Tokenizer:
    first = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    return DebertaV2Tokenizer(vocab=unigram_vocabulary(first, "[UNK]"), unk_id=3)


def xlm_roberta() -> XLMRobertaTokenizer:
    first = ["<s>", "<pad>", "</s>", "<unk>"]
    return XLMRobertaTokenizer(vocab=[*unigram_vocabulary(first, "<unk>"), ("<mask>", 0.0)])
