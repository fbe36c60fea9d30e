"""The change of the loss by another vocabulary equals the one computed by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from medgpt.config.model import ModelConfig
from medgpt.models.load import build_model
from medgpt.models.vocabulary import extend_tokenizer, trim_tokenizer
from medgpt.models.vocabulary_change import MAX_TEXT_TOKENS, change_vocabulary
from tests.models.tiny_models import kept_ids, save_model_with_tokenizer

OLD = ["今天天气很好。The weather is fine today.", "病人有病，人很好。"] * 10
NEW = ["患者患有糖尿病，血糖控制不佳。", "Hypertension: see a doctor!"] * 10
PROBE = ["患者有糖尿病，今天很好。", "The doctor is fine.", "x" * 300]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_model_with_tokenizer(folder, OLD)
    return folder


@pytest.fixture
def model(folder):
    config = ModelConfig(name=str(folder))
    return build_model(config, head_kind="clm", seed=0)


@pytest.fixture
def base(folder):
    return AutoTokenizer.from_pretrained(folder)


def mean_loss_by_hand(model, pieces: list[list[int]]) -> float:
    """Return the mean of -log p(token | before) of each sequence alone, from transformers."""
    model = copy.deepcopy(model).eval()
    model.set_attn_implementation("eager")
    losses = []
    for ids in pieces:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
        losses.append(F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none"))
    return float(torch.cat(losses).mean())


def test_an_extended_vocabulary_raises_the_loss_by_the_larger_softmax(model, base):
    pieces = [base(text)["input_ids"][:MAX_TEXT_TOKENS] for text in PROBE]
    before = mean_loss_by_hand(model, pieces)
    tokenizer = extend_tokenizer(base, iter(NEW), 100)

    change = change_vocabulary(model, base, tokenizer, PROBE)

    assert change.num_new_tokens == len(tokenizer) - len(base) > 0
    assert change.loss is not None
    assert change.loss.num_targets == sum(len(ids) - 1 for ids in pieces)
    assert change.loss.before == pytest.approx(before, abs=1e-5)
    assert change.loss.after == pytest.approx(mean_loss_by_hand(model, pieces), abs=1e-5)
    assert change.loss.after > change.loss.before + 1e-3  # each old token gets less probability
    shift = change.loss.after - change.loss.before
    assert f"{change.loss.after:.4f} nats ({shift:+.4f} from the changed softmax)" in str(change)


def test_a_trimmed_vocabulary_lowers_the_loss_on_texts_whose_tokens_stay(model, base):
    tokenizer = trim_tokenizer(base, iter(OLD[1:2]))
    kept = kept_ids(base, tokenizer)
    stays = "病人很好。"
    ids = base(stays)["input_ids"]
    assert {i for text in PROBE for i in base(text)["input_ids"]} - set(kept)
    before = mean_loss_by_hand(model, [ids])

    change = change_vocabulary(model, base, tokenizer, [stays, OLD[0]])

    assert change.loss is not None
    assert change.loss.num_targets == len(ids) - 1  # the other text's tokens are gone
    assert change.loss.before == pytest.approx(before, abs=1e-5)
    assert change.loss.after == pytest.approx(
        mean_loss_by_hand(model, [[kept.index(i) for i in ids]]), abs=1e-5
    )
    assert change.loss.after < change.loss.before


def test_the_loss_is_measured_only_on_texts_with_a_target(model, base):
    tokenizer = extend_tokenizer(base, iter(NEW), 100)
    change = change_vocabulary(model, base, tokenizer, ["", "好"])
    assert change.loss is None
    assert change.manifest_entry() == {
        "num_tokens": len(tokenizer),
        "num_new_tokens": len(tokenizer) - len(base),
        "mean_old_tokens": change.mean_old_tokens,
    }
    assert "loss" not in str(change)
