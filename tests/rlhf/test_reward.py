"""The reward role: each answer's own score, whatever the ranks; partitioned, offloaded, refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from medgpt.config import ConfigError, LoraConfig, ModelConfig
from medgpt.engine.setup import join_process_group
from medgpt.models.base import HEAD
from medgpt.models.lora import apply_lora
from medgpt.models.tokenizer import load_base
from medgpt.models.value_model import Score, build_value_model, last_values, load_value_model
from medgpt.rlhf.batching import response_batch
from medgpt.rlhf.experience import join_rows
from medgpt.rlhf.roles.reward import Reward
from tests.engine.cases import CPU
from tests.rlhf.cases import asked, ppo_config, save_reward_model, sequences
from tests.rlhf.test_actor import gathered

NO_RULES = (
    "reward.rules={urgency=0.0,dose=0.0,diagnosis=0.0,hotline=0.0,language=0.0,repetition=0.0}"
)


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory) -> Path:
    return save_reward_model(base, tmp_path_factory.mktemp("saved") / "reward")


def role(folder: Path, base: Path, saved: Path, *overrides: str) -> Reward:
    join_process_group(CPU)  # of one, unless this is one of two ranks
    options = ("reward.score_weight=1.0", f"reward.model={saved}", NO_RULES, *overrides)
    return Reward(ppo_config(folder, base, *options))


def alone(saved: Path) -> np.ndarray:
    """(B,) score of each sequence in a forward of its own."""
    model, _ = load_value_model(str(saved))
    whole = sequences()
    batches = [response_batch(whole, [row]) for row in range(len(whole))]
    with torch.no_grad():
        return np.array([float(last_values(model(batch), batch)) for batch in batches])


def all_scores(folder: Path, base: Path, saved: Path, *overrides: str) -> np.ndarray:
    """(B,) of this process's ranks together."""
    whole = sequences()
    parts = gathered(role(folder, base, saved, *overrides).score(asked(whole), whole))
    assert sum(map(len, (part.index for part in parts))) == len(whole)
    return join_rows([part.index for part in parts], [part.totals for part in parts])


def test_scores_are_those_of_each_answer_alone(base, tmp_path, saved):
    found = all_scores(tmp_path, base, saved)
    np.testing.assert_allclose(found, alone(saved), atol=1e-5)
    assert found.std() > 0.1


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("budget", [1, 48])  # 1: a forward for each, which no two ranks divide
def test_ranks_and_zero_stages_change_no_score(base, tmp_path, saved, two_ranks, stage, budget):
    options = (f"pools.reward.zero_stage={stage}", f"ppo.micro_batch_tokens={budget}")
    one, other = two_ranks(all_scores, tmp_path, base, saved, *options)
    np.testing.assert_allclose(one, alone(saved), atol=1e-5)
    np.testing.assert_array_equal(one, other)


def partitioned_shares(folder: Path, base: Path, saved: Path) -> tuple[int, int]:
    """Elements of the embedding that this rank holds, and that there are."""
    found = role(folder, base, saved, "pools.reward.zero_stage=3")
    (weight,) = (p for name, p in found.model.run.module.named_parameters() if "embed" in name)  # type: ignore[union-attr]
    return weight.ds_tensor.numel(), weight.ds_numel


def test_at_stage_3_a_rank_holds_its_part_of_the_weights(base, tmp_path, saved, two_ranks):
    for part, whole in two_ranks(partitioned_shares, tmp_path, base, saved):
        assert part <= whole // 2 + 1


def one_sequence(folder: Path, base: Path, saved: Path) -> tuple[int, list[float]]:
    whole = sequences(1)
    part = role(folder, base, saved, "pools.reward.zero_stage=3").score(asked(whole), whole)
    return dist.get_rank(), part.totals.tolist()


def test_a_rank_without_a_sequence_keeps_in_step(base, tmp_path, saved, two_ranks):
    found = two_ranks(one_sequence, tmp_path, base, saved)
    assert [len(totals) for _, totals in found] == [1, 0]


def test_offloaded_and_back_the_numbers_are_the_same(base, tmp_path, saved):
    options = ("judge.every=1", f"judge.model={saved}")
    found, whole = role(tmp_path, base, saved, *options), sequences()
    before = found.score(asked(whole), whole).totals
    judged = found.judge(whole)[1]
    found.offload()
    found.onload()
    np.testing.assert_array_equal(found.score(asked(whole), whole).totals, before)
    assert found.judge(whole)[1] == judged


@pytest.mark.gpu
def test_offloaded_it_leaves_the_gpu_to_others(base, tmp_path, saved):
    found, whole = role(tmp_path, base, saved), sequences()
    before = found.score(asked(whole), whole).totals
    assert torch.cuda.memory_allocated() > 0
    found.offload()
    assert torch.cuda.memory_allocated() == torch.cuda.memory_reserved() == 0
    found.onload()
    np.testing.assert_array_equal(found.score(asked(whole), whole).totals, before)


def with_other_tokenizer(saved: Path, folder: Path, change) -> Path:
    """A copy of the reward model beside a tokenizer that `change` has altered."""
    model, score = load_value_model(str(saved))
    model.pretrained.save_pretrained(folder)
    score.write(folder)
    tokenizer = load_base(str(saved))
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def add_token(tokenizer) -> None:
    tokenizer.add_tokens(["偏头痛"])


def other_template(tokenizer) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (add_token, r"1 tokens have other ids, as '偏头痛' is none and \d+"),
        (other_template, "their chat templates differ from character"),
    ],
)
@pytest.mark.parametrize("stage", [0, 3])
def test_a_reward_model_that_reads_other_ids_is_refused(
    base, tmp_path, saved, change, words, stage
):
    other = with_other_tokenizer(saved, tmp_path / "other", change)
    with pytest.raises(ConfigError, match=f"the actor and reward.model=.*{words}"):
        role(tmp_path, base, other, f"pools.reward.zero_stage={stage}")
    judge = ("judge.every=1", f"judge.model={other}")
    with pytest.raises(ConfigError, match=f"the actor and judge.model=.*{words}"):
        role(tmp_path, base, saved, *judge)


@pytest.mark.parametrize("stage", [0, 3])
def test_what_is_no_reward_model_is_told_under_its_key(base, tmp_path, stage):
    with pytest.raises(ConfigError, match=r"reward\.model=.*: no score\.json in it"):
        role(tmp_path, base, base, f"pools.reward.zero_stage={stage}")


def test_adapters_are_folded_in_whole_and_refused_partitioned(base, tmp_path):
    plain = build_value_model(ModelConfig(name=str(base)), seed=3, dtype=torch.float32)
    apply_lora(plain, LoraConfig(rank=2), head=HEAD).save_pretrained(tmp_path / "adapter")
    load_base(str(base)).save_pretrained(tmp_path / "adapter")
    Score(mean=0.0, std=1.0, normalised_on="chosen", speech={}).write(tmp_path / "adapter")

    whole = sequences()
    role(tmp_path, base, tmp_path / "adapter").score(asked(whole), whole)
    with pytest.raises(ConfigError, match=r"reward\.model=.*medgpt merge"):
        role(tmp_path, base, tmp_path / "adapter", "pools.reward.zero_stage=3")
