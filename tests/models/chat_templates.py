"""Chat templates per model family, for tests of templates, families and exports.

Most are read from TRL's package, which ships them as the hub has them. Those in DOCUMENTED are
written from the documented format of the family, because no package ships them.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

_SPEC = find_spec("trl")
assert _SPEC is not None
assert _SPEC.origin is not None
TRL_TEMPLATES = Path(_SPEC.origin).parent / "chat_templates"

_TRL_FAMILIES = {
    "qwen2.5": "qwen2_5",
    "qwen3": "qwen3",
    "qwen3-2507": "qwen3_instruct_2507",
    "qwen3.5": "qwen3_5_think",
    "qwen3.5-nothink": "qwen3_5_nothink",
    "qwen3.6": "qwen3_6",
    "llama3": "llama3",
    "llama3.1": "llama3_1",
    "llama3.2": "llama3_2",
    "gemma": "gemma",
    "gemma3": "gemma3",
    "phi3": "phi3",
    "glm4moe": "glm4moe",
    "deepseek-v3": "deepseekv3",
    "deepseek-r1": "deepseek_r1_distill",
    "gpt-oss": "gptoss",
    "nemotron3": "nemotron_3_nano",
    "cohere": "cohere",
}

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN2 = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}" + _CHATML
)
_ALTERNATE = (
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) "
    "%}{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
)
_LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = '<<SYS>>\n' + messages[0]['content'].strip() + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = '' %}{% endif %}"
    + _ALTERNATE
    + "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system_message if loop.first "
    "else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_MISTRAL_V1 = (  # no system role; a space between instruction and answer comes from the tokenizer
    "{{ bos_token }}{% set loop_messages = messages %}"
    + _ALTERNATE
    + "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
_MISTRAL_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}"
    "{% set loop_messages = messages[1:] %}"
    "{% else %}{% set loop_messages = messages %}{% endif %}"
)


def _mistral(before: str, after: str) -> str:
    """Versions 3 and later: the system message is joined to the last user message."""
    return (
        _MISTRAL_SYSTEM
        + "{{ bos_token }}"
        + "{% for message in loop_messages %}{% if message['role'] == 'user' %}"
        + "{% if loop.last and system_message is defined %}"
        + f"{{{{ '[INST]{before}' + system_message + '\n\n' + message['content'] + '{after}' }}}}"
        + f"{{% else %}}{{{{ '[INST]{before}' + message['content'] + '{after}' }}}}{{% endif %}}"
        + f"{{% else %}}{{{{ '{before}' + message['content'] + eos_token }}}}{{% endif %}}"
        + "{% endfor %}"
    )


_MISTRAL_V7 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST]' + message['content'] + '[/INST]' }}{% elif message['role'] == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' + message['content'] + '[/SYSTEM_PROMPT]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
_GLM4 = (
    "[gMASK]<sop>{% for item in messages %}{% if item['tools'] is defined %}"
    "{{ '<|system|>\n' + item['tools'] | tojson }}{% endif %}"
    "{% if item['content'] %}<|{{ item['role'] }}|>{{ item['metadata'] }}\n{{ item['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_DEEPSEEK_V2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'User: ' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}{% elif message['role'] == 'system' %}"
    "{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_OLMO2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<|system|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'user' %}"
    "{{ '<|user|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}"
    "{% if not loop.last %}{{ '<|assistant|>\n' + message['content'] + eos_token + '\n' }}"
    "{% else %}{{ '<|assistant|>\n' + message['content'] + eos_token }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
_MINICPM = (  # a system message is written like an answer
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<用户>' + message['content'].strip() + '<AI>' }}"
    "{% else %}{{ message['content'].strip() }}{% endif %}{% endfor %}"
)

DOCUMENTED = {
    "chatml": _CHATML,
    "qwen2": _QWEN2,
    "llama2": _LLAMA2,
    "mistral-v0.1": _MISTRAL_V1,
    "mistral-v0.3": _mistral(" ", "[/INST]"),
    "mistral-nemo": _mistral("", "[/INST]"),
    "mistral-v7": _MISTRAL_V7,
    "glm4": _GLM4,
    "deepseek-v2": _DEEPSEEK_V2,
    "olmo2": _OLMO2,
    "minicpm": _MINICPM,
    "minicpm3": _CHATML,
}
"""Templates written from the documented format of a family."""

CHAT_TEMPLATES = DOCUMENTED | {
    family: (TRL_TEMPLATES / f"{name}.jinja").read_text("utf-8")
    for family, name in _TRL_FAMILIES.items()
}
"""family -> template."""


class SpecialTokens(NamedTuple):
    bos: str | None
    eos: str  # of the base model: the end of a text
    extra: tuple[str, ...]  # other special tokens of the template
    plain: tuple[str, ...] = ()  # tokens of the template that the tokenizer does not call special


_IM = ("<|im_start|>", "<|im_end|>")
_THINK = ("<think>", "</think>")
_TOOL = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
_DEEPSEEK = (
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
)
_GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_OSS = (
    "<|start|>",
    "<|message|>",
    "<|channel|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|constrain|>",
)
_PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_COHERE = (
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
)
_QWEN = SpecialTokens(None, "<|endoftext|>", _IM)
_QWEN3 = SpecialTokens(None, "<|endoftext|>", _IM, (*_THINK, *_TOOL))
_LLAMA3 = SpecialTokens("<|begin_of_text|>", "<|end_of_text|>", _HEADERS)
_MISTRAL = SpecialTokens(
    "<s>", "</s>", ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
)
_DEEPSEEK_TOKENS = SpecialTokens(
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", (), (*_DEEPSEEK, *_THINK)
)

SPECIAL_TOKENS = {
    "chatml": _QWEN,
    "qwen2": _QWEN,
    "qwen2.5": SpecialTokens(None, "<|endoftext|>", _IM, _TOOL[:2]),
    "qwen3": _QWEN3,
    "qwen3-2507": _QWEN3,
    "qwen3.5": _QWEN3,
    "qwen3.5-nothink": _QWEN3,
    "qwen3.6": _QWEN3,
    "llama2": SpecialTokens("<s>", "</s>", ()),
    "llama3": _LLAMA3,
    "llama3.1": _LLAMA3,
    "llama3.2": _LLAMA3,
    "mistral-v0.1": SpecialTokens("<s>", "</s>", ()),
    "mistral-v0.3": _MISTRAL,
    "mistral-nemo": _MISTRAL,
    "mistral-v7": _MISTRAL,
    "gemma": SpecialTokens("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "gemma3": SpecialTokens("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "phi3": SpecialTokens("<s>", "<|endoftext|>", _PHI),
    "glm4": SpecialTokens(None, "<|endoftext|>", _GLM),
    "glm4moe": SpecialTokens(None, "<|endoftext|>", _GLM, (*_THINK, *_TOOL)),
    "deepseek-v2": SpecialTokens("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ()),
    "deepseek-v3": _DEEPSEEK_TOKENS,
    "deepseek-r1": _DEEPSEEK_TOKENS,
    "gpt-oss": SpecialTokens("<|startoftext|>", "<|return|>", _OSS),
    "olmo2": SpecialTokens("<|endoftext|>", "<|endoftext|>", ()),
    "minicpm": SpecialTokens("<s>", "</s>", (), ("<用户>", "<AI>")),
    "minicpm3": SpecialTokens("<s>", "</s>", _IM),
    "nemotron3": SpecialTokens("<s>", "</s>", _IM, _THINK),
    "cohere": SpecialTokens("<BOS_TOKEN>", "<EOS_TOKEN>", _COHERE),
}
"""family -> the tokens that its tokenizer has for the template."""
