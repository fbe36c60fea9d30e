"""A value depends on its own sequence only; a saved head is loaded, a missing one is an error."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from medgpt.config.base import ConfigError
from medgpt.config.model import LoraConfig, ModelConfig, TokenizerConfig
from medgpt.models.lora import apply_lora
from medgpt.models.model_files import VALUE_HEAD, VALUE_HEAD_WEIGHT
from medgpt.models.tokenizer import train_tokenizer
from medgpt.models.value_model import (
    RewardModelInfo,
    ValueModel,
    build_value_model,
    last_token_values,
    load_value_model,
)
from medgpt.stages.merge import merge_adapter
from tests.models.tiny_models import VOCAB, pack, tiny_model

LENGTHS = [7, 1, 20, 3]
SCORE = RewardModelInfo(mean=0.25, std=0.5, normalised_on="chosen answers", speech={})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a language model with untied embeddings, whose output layer value models drop."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model(tie_embeddings=False).save_pretrained(folder)
    return folder


def fresh(base: Path, **options) -> ValueModel:
    model = build_value_model(ModelConfig(name=str(base)), seed=3, dtype=torch.float32)
    return ValueModel(model, **options).eval()


def saved(base: Path, folder: Path) -> Path:
    """Save a reward model in `folder`."""
    fresh(base).pretrained.save_pretrained(folder)
    SCORE.write(folder)
    return folder


def random_texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in LENGTHS]


def values(model: ValueModel, chosen: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return model(pack(chosen, chosen))


def scores(model: ValueModel, chosen: list[Tensor]) -> Tensor:
    with torch.no_grad():
        batch = pack(chosen, chosen)
        return last_token_values(model(batch), batch)


def test_a_score_does_not_depend_on_batch_size_or_neighbors(base):
    model, texts = fresh(base), random_texts()

    together = scores(model, texts)
    alone = torch.cat([scores(model, [text]) for text in texts])
    reversed_ = scores(model, texts[::-1]).flip(0)

    assert together.shape == (4,)
    assert together.std() > 0.1
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    torch.testing.assert_close(reversed_, together, rtol=0, atol=1e-5)


def test_a_score_is_transformers_own_at_the_last_token_also_of_a_padding_token(base):
    model, texts = fresh(base), random_texts()
    texts[0][-1] = 0  # the id of padding, which may double as the end token

    ours = scores(model, texts)
    plain = model.pretrained
    plain.set_attn_implementation("sdpa")
    with torch.no_grad():
        theirs = [
            plain.get_submodule(VALUE_HEAD)(plain.base_model(text[None]).last_hidden_state)[
                0, -1, 0
            ]
            for text in texts
        ]

    torch.testing.assert_close(ours, torch.stack(theirs), rtol=0, atol=1e-5)


def test_the_value_of_a_position_depends_on_earlier_tokens_only(base):
    model, (text, *_) = fresh(base), random_texts()

    whole = values(model, [text])
    prefixes = torch.cat([scores(model, [text[:n]]) for n in range(1, len(text) + 1)])

    assert whole.shape == (1, len(text))
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole[0], prefixes, rtol=0, atol=1e-5)


def test_values_are_relative_to_mean_and_deviation(base):
    raw, normalized = fresh(base), fresh(base, mean=0.25, std=0.5)

    torch.testing.assert_close(
        values(normalized, random_texts()), (values(raw, random_texts()) - 0.25) / 0.5
    )


def test_a_fresh_head_follows_from_the_seed(base):
    first, again = fresh(base), fresh(base)
    other = build_value_model(ModelConfig(name=str(base)), seed=4, dtype=torch.float32)
    heads = [
        m.get_submodule(VALUE_HEAD).weight for m in (first.pretrained, again.pretrained, other)
    ]

    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].std().item() == pytest.approx(33**-0.5, rel=0.4)


def test_the_head_computes_in_float32_under_bf16_weights(base):
    model = build_value_model(ModelConfig(name=str(base)), seed=3, dtype=torch.bfloat16)
    head = model.get_submodule(VALUE_HEAD)

    value = head(torch.ones(1, 32, dtype=torch.bfloat16))

    assert head.weight.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(head.weight.float().sum().item(), abs=1e-6)


def test_a_saved_reward_model_gives_the_same_scores_normalized(base, tmp_path):
    expected = (scores(fresh(base), random_texts()) - SCORE.mean) / SCORE.std

    model, facts = load_value_model(str(saved(base, tmp_path)))

    assert facts == SCORE
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(scores(model, random_texts()), expected)


def test_a_reward_model_of_adapters_is_folded_in(base, tmp_path):
    plain = build_value_model(ModelConfig(name=str(base)), seed=3, dtype=torch.float32)
    adapted = ValueModel(apply_lora(plain, LoraConfig(rank=2), head=VALUE_HEAD))
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in trained.values():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    adapted.model.save_pretrained(tmp_path)  # type: ignore[operator]
    SCORE.write(tmp_path)

    model, _ = load_value_model(str(tmp_path))

    tokenizer = train_tokenizer(iter(["头痛"]), TokenizerConfig(vocab_size=300), "bpe")
    tokenizer.save_pretrained(tmp_path)
    merge_adapter(str(tmp_path), tmp_path / "merged")
    merged, facts = load_value_model(str(tmp_path / "merged"))

    heads = [name for name in trained if VALUE_HEAD in name]
    assert len(heads) == 1
    assert len(trained) == 1 + 2 * 7 * 2  # two matrices for seven layers of two blocks
    expected = (scores(adapted.eval(), random_texts()) - SCORE.mean) / SCORE.std
    torch.testing.assert_close(scores(model, random_texts()), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores(merged, random_texts()), expected, rtol=0, atol=1e-5)
    assert facts == SCORE


def test_a_language_model_is_refused_as_reward_model(base):
    with pytest.raises(ConfigError, match=r"no score\.json.*medgpt reward"):
        load_value_model(str(base))


def test_a_reward_model_without_its_head_is_refused(base, tmp_path):
    folder = saved(base, tmp_path)
    weights = load_file(folder / "model.safetensors")
    assert weights.pop(VALUE_HEAD_WEIGHT).shape == (1, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ConfigError, match=r"no score\.weight, the head"):
        load_value_model(str(folder))


def test_adapters_without_their_head_are_refused(base, tmp_path):
    plain = build_value_model(ModelConfig(name=str(base)), seed=3, dtype=torch.float32)
    apply_lora(plain, LoraConfig(rank=2)).save_pretrained(tmp_path)
    SCORE.write(tmp_path)

    with pytest.raises(ConfigError, match="the adapter has no head"):
        load_value_model(str(tmp_path))


def test_a_score_file_beside_a_language_model_is_refused(base, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    SCORE.write(tmp_path)

    with pytest.raises(ConfigError, match="no head"):
        load_value_model(str(tmp_path))


def test_a_head_of_several_numbers_is_refused(base, tmp_path):
    folder = saved(base, tmp_path)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    names = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    (folder / "config.json").write_text(json.dumps(config | names), "utf-8")

    with pytest.raises(ConfigError, match="head has 2 outputs"):
        load_value_model(str(folder))
