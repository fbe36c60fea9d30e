"""Finds out whether a model computes a packed batch exactly, by trying it on a small copy.

Two texts run through our training forward, in one row and then in a row each, and alone through
the model's own forward. No list of models is needed: positions that count from another number,
attention or state that crosses from one text to the next, dropout in a model's own code and logits
that are scaled all show in the difference.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from medgpt.config.base import ModelError
from medgpt.config.data import Packing
from medgpt.data.loader.batch import PackedBatch
from medgpt.data.loader.collate import packed_batch
from medgpt.models.attention import VARLEN
from medgpt.models.language_model import LanguageModel
from medgpt.models.model_files import HeadKind
from medgpt.models.packed import PackedModel
from medgpt.models.small_model import SMALL_VOCABULARY, copy_of, small_model
from medgpt.models.training_mode import prepare_for_training

LENGTHS = (9, 14)  # tokens of the texts; more than SIZES leaves to a window
FIRST_ID = 10  # special tokens have lower ids in a small vocabulary
TOLERANCE = 1e-4  # largest difference of logits or hidden states, relative to the largest of them


@dataclass(frozen=True, slots=True)
class _Case:
    """What a check depends on; equal cases have equal JSON."""

    hf_config: PreTrainedConfig = field(compare=False)
    config_json: str
    head_kind: HeadKind
    trust_remote_code: bool


def is_packed(
    hf_config: PreTrainedConfig,
    head_kind: HeadKind,
    packing: Packing,
    *,
    name: str | None,
    trust_remote_code: bool = False,
) -> bool:
    """Return whether the model's sequences run packed in one row rather than in a row each.

    Raises:
        ConfigError: the model is exact in neither way, or not in the one that `packing` demands.
    """
    json_text = hf_config.to_json_string(use_diff=False)
    case = _Case(hf_config, json_text, head_kind, trust_remote_code)
    packed = "data.packing=off" if packing == "off" else _difference(case, packed=True)
    if packed is None:
        return True
    if packing == "on":
        raise ModelError(name, f"packed rows are not exact: {packed}; set data.packing=auto")
    padded = _difference(case, packed=False)
    if padded is None:
        return False
    raise ModelError(
        name,
        f"medgpt does not compute {hf_config.model_type} as transformers does, with texts in rows "
        f"of their own ({padded}) or packed ({packed}); use a model like Qwen, Llama, Mistral or "
        "BERT",
    )


@lru_cache(maxsize=256)
def _difference(case: _Case, *, packed: bool) -> str | None:
    """Return how our forward differs from the model's own on texts alone, or None."""
    # whatever device and gradient mode the caller builds its own model in, and without a draw from
    # the generator that it may use next
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        return _find_difference(case, packed=packed)


def _find_difference(case: _Case, *, packed: bool) -> str | None:
    texts = random_texts(case.hf_config)
    options = {"trust_remote_code": case.trust_remote_code}
    attention = VARLEN if packed else None
    try:
        plain = small_model(case.hf_config, case.head_kind, texts[-1][None], **options)
        options |= {"attn_implementation": attention}
        model = prepare_for_training(copy_of(plain, case.head_kind, **options), None)
        ours = _Hidden(model) if case.head_kind == "value" else _Logits(model, loss_chunk_tokens=8)
        if ours.is_padded == packed:
            return "its attention cannot keep texts in one row apart"
        weights = [weight.detach().clone() for weight in model.parameters()]
        batch = packed_batch(torch.cat(texts), torch.cat(texts), np.array(LENGTHS))
        outputs = [ours(batch), ours(batch)]
        outputs[0].sum().backward()
        outputs.append(ours.eval()(batch))
        if not all(map(torch.equal, weights, model.parameters())):
            return "its forward changes its weights"
        expected = torch.cat([_own_output(plain, case.head_kind, text) for text in texts])
    except Exception as error:  # the model's code may raise anything
        lines = str(error).splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:200]}"
    largest = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not _gap(outputs[0], outputs[1]) <= largest:
        return "two forwards of one batch differ, as with dropout in its own code"
    gap = max(_gap(output, expected) for output in outputs)
    return None if gap <= largest else f"outputs differ by {gap:.2g} from those of a text alone"


class _Logits(LanguageModel):
    """Returns the logits (N, V) of the training forward."""

    def forward(self, batch: PackedBatch) -> Tensor:  # type: ignore[override]
        positions = torch.arange(batch.labels.shape[1])
        return torch.cat(self._map_label_chunks(lambda logits, _: logits, batch, positions))


class _Hidden(PackedModel):
    """Returns the hidden states (N, H) of the training forward."""

    def forward(self, batch: PackedBatch) -> Tensor:
        return self.hidden_states(batch, None)


def random_texts(hf_config: PreTrainedConfig) -> list[Tensor]:
    """Return texts of LENGTHS tokens without special ones, for a small model of this config."""
    size = hf_config.get_text_config().to_dict().get("vocab_size") or SMALL_VOCABULARY
    high = min(size, SMALL_VOCABULARY)
    generator = torch.Generator().manual_seed(0)
    low = min(FIRST_ID, high // 2)
    return [torch.randint(low, high, (length,), generator=generator) for length in LENGTHS]


@torch.no_grad()
def _own_output(model: PreTrainedModel, head_kind: HeadKind, text: Tensor) -> Tensor:
    """Return logits (L, V), or hidden states (L, H) of a value model."""
    if head_kind == "value":
        return model.base_model(text[None]).last_hidden_state[0]
    return model(text[None]).logits[0]


def _gap(x: Tensor, y: Tensor) -> float:
    return float((x - y).detach().abs().max())
