"""The reward role: scores do not depend on ranks, ZeRO stage or offload; bad models are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from medgpt.config.base import ConfigError
from medgpt.data.sources.records import Message
from medgpt.engine.setup import ensure_process_group
from medgpt.models.tokenizer import load_tokenizer
from medgpt.models.value_model import ValueModel, last_token_values, load_value_model
from medgpt.rlhf.batching import response_batch
from medgpt.rlhf.rewards.reward_sample import RewardSample
from medgpt.rlhf.rewards.weighted_sum import WeightedRewards
from medgpt.rlhf.roles.reward import Reward
from medgpt.rlhf.rollout_batch import Prompts, join_per_sequence
from tests.engine.cases import CPU
from tests.rlhf.cases import ppo_config, prompts_of, save_reward_model, sequences, share
from tests.rlhf.test_actor import gathered

NO_RULES = (
    "reward.rules={urgency=0.0,dose=0.0,diagnosis=0.0,hotline=0.0,language=0.0,repetition=0.0}"
)
WEIGHTED = ("reward.score_weight=0.5", "reward.rules={dose=0.0}")


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory) -> Path:
    return save_reward_model(base, tmp_path_factory.mktemp("saved") / "reward")


def role(folder: Path, base: Path, saved: Path, *overrides: str) -> Reward:
    ensure_process_group(CPU)  # of one rank, unless two_ranks has set up two
    options = ("reward.score_weight=1.0", f"reward.model={saved}", NO_RULES, *overrides)
    return Reward(ppo_config(folder, base, *options))


def alone(saved: Path) -> np.ndarray:
    """(B,) scores of single-sequence forward passes."""
    model, _ = load_value_model(str(saved))
    rollouts = sequences()
    batches = [response_batch(rollouts, [row]) for row in range(len(rollouts))]
    with torch.no_grad():
        return np.array([float(last_token_values(model(batch), batch)) for batch in batches])


def all_scores(folder: Path, base: Path, saved: Path, *overrides: str) -> np.ndarray:
    """(B,) scores gathered from all ranks."""
    rollouts = sequences()
    parts = gathered(role(folder, base, saved, *overrides).score(prompts_of(rollouts), rollouts))
    assert sum(map(len, (part.index for part in parts))) == len(rollouts)
    return join_per_sequence([(part.index, part.totals) for part in parts])


def test_packed_scores_equal_those_of_single_answers(base, tmp_path, saved):
    reward = all_scores(tmp_path, base, saved)
    np.testing.assert_allclose(reward, alone(saved), atol=1e-5)
    assert reward.std() > 0.1


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("budget", [1, 48])  # 1: one forward pass per sequence
def test_ranks_and_zero_stages_change_no_score(base, tmp_path, saved, two_ranks, stage, budget):
    options = (f"pools.reward.zero_stage={stage}", f"ppo.micro_batch_tokens={budget}")
    one, other = two_ranks(all_scores, tmp_path, base, saved, *options)
    np.testing.assert_allclose(one, alone(saved), atol=1e-5)
    np.testing.assert_array_equal(one, other)


def partitioned_shares(folder: Path, base: Path, saved: Path) -> tuple[int, int]:
    """Number of embedding elements on this rank, and in all."""
    reward = role(folder, base, saved, "pools.reward.zero_stage=3")
    (weight,) = (p for name, p in reward.model.run.module.named_parameters() if "embed" in name)  # type: ignore[union-attr]
    return weight.ds_tensor.numel(), weight.ds_numel


def test_at_stage_3_a_rank_holds_its_part_of_the_weights(base, tmp_path, saved, two_ranks):
    for part, rollouts in two_ranks(partitioned_shares, tmp_path, base, saved):
        assert part <= rollouts // 2 + 1


def one_sequence(folder: Path, base: Path, saved: Path) -> tuple[int, list[float]]:
    rollouts = sequences(1)
    part = role(folder, base, saved, "pools.reward.zero_stage=3").score(
        prompts_of(rollouts), rollouts
    )
    return dist.get_rank(), part.totals.tolist()


def test_a_rank_without_a_sequence_makes_the_same_number_of_passes(
    base, tmp_path, saved, two_ranks
):
    reward = two_ranks(one_sequence, tmp_path, base, saved)
    assert [len(totals) for _, totals in reward] == [1, 0]


def test_offloading_and_onloading_changes_no_number(base, tmp_path, saved):
    options = ("judge.every=1", f"judge.model={saved}")
    reward, rollouts = role(tmp_path, base, saved, *options), sequences()
    before = reward.score(prompts_of(rollouts), rollouts).totals
    judge_scores_before = reward.judge_scores(rollouts)[1]
    reward.offload()
    reward.onload()
    np.testing.assert_array_equal(reward.score(prompts_of(rollouts), rollouts).totals, before)
    assert reward.judge_scores(rollouts)[1] == judge_scores_before


def test_totals_match_their_responses_whatever_the_shares(base, tmp_path, saved):
    turns = [["user", "我头痛。"], ["assistant", "多久了?"], ["user", "三天。"]]
    rollouts, tokenizer = sequences(), load_tokenizer(str(base))
    conversations = [turns[-1 - 2 * (i % 2) :] for i in range(len(rollouts))]
    config = ppo_config(tmp_path, base, *WEIGHTED, f"reward.model={saved}")
    samples_in = [
        RewardSample(
            sample_id=rollouts.sample_ids[i],
            messages=tuple(Message(*turn) for turn in conversations[i]),
            text=str(tokenizer.decode(rollouts.responses.row(i), skip_special_tokens=True)),
            finished=bool(rollouts.finished[i]),
        )
        for i in range(len(rollouts))
    ]
    expected = WeightedRewards(config.reward)(samples_in, alone(saved).tolist()).totals
    assert len(set(expected)) > 6

    reward, messages = Reward(config), [json.dumps(turn) for turn in conversations]
    assert reward.report_samples(3) == []
    prompts = Prompts(sample_ids=rollouts.sample_ids, ids=rollouts.prompts, messages=messages)
    part = reward.score(prompts, share(rollouts, range(6, 12)), share(rollouts, range(6)))
    np.testing.assert_allclose(join_per_sequence([(part.index, part.totals)]), expected, atol=1e-5)
    np.testing.assert_allclose(part.rewards.totals, part.totals, atol=1e-6)
    samples = reward.report_samples(3)
    assert [sample["total"] for sample in samples] == part.rewards.totals[:3]
    assert {sample["prompt"] for sample in samples} == {"三天。"}


def test_a_score_that_is_not_finite_masks_its_sample(base, tmp_path, saved):
    reward, rollouts = role(tmp_path, base, saved), sequences()
    assert isinstance(reward.model, ValueModel)
    token = int(rollouts.responses.row(0)[0])
    reward.model.pretrained.get_input_embeddings().weight.data[token] = torch.nan
    part = reward.score(prompts_of(rollouts), rollouts)
    token_ids = [
        np.append(rollouts.prompts.row(i), rollouts.responses.row(i)) for i in range(len(rollouts))
    ]
    has_nan_token = np.array([token in ids for ids in token_ids])
    assert 0 < has_nan_token.sum() < 12
    assert np.array_equal(np.isnan(part.totals), has_nan_token[part.index])
    assert [x is None for x in part.rewards.components["score"]] == has_nan_token[
        part.index
    ].tolist()


def test_judge_scores_come_in_the_order_of_the_returned_rows(base, tmp_path, saved):
    other = save_reward_model(base, tmp_path / "other", seed=8)
    reward = role(tmp_path, base, saved, f"judge.model={other}", "judge.every=1")
    index, judge_scores = reward.judge_scores(sequences())
    np.testing.assert_allclose(judge_scores, alone(other)[index], atol=1e-5)
    assert np.abs(alone(other) - alone(saved)).max() > 1e-2


@pytest.mark.gpu
def test_offloading_frees_all_gpu_memory(base, tmp_path, saved):
    reward, rollouts = role(tmp_path, base, saved), sequences()
    before = reward.score(prompts_of(rollouts), rollouts).totals
    assert torch.cuda.memory_allocated() > 0
    reward.offload()
    assert torch.cuda.memory_allocated() == torch.cuda.memory_reserved() == 0
    reward.onload()
    np.testing.assert_array_equal(reward.score(prompts_of(rollouts), rollouts).totals, before)


def with_other_tokenizer(saved: Path, folder: Path, change) -> Path:
    """Copy of the reward model with a tokenizer altered by `change`."""
    model, score = load_value_model(str(saved))
    model.pretrained.save_pretrained(folder)
    score.write(folder)
    tokenizer = load_tokenizer(str(saved))
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
        (add_token, r"1 tokens have other ids, such as '偏头痛' is none and \d+"),
        (other_template, "their chat templates differ from character"),
    ],
)
@pytest.mark.parametrize("stage", [0, 3])
def test_a_reward_model_with_another_tokenizer_is_refused(
    base, tmp_path, saved, change, words, stage
):
    other = with_other_tokenizer(saved, tmp_path / "other", change)
    with pytest.raises(ConfigError, match=f"the actor and reward.model=.*{words}"):
        role(tmp_path, base, other, f"pools.reward.zero_stage={stage}")
    judge = ("judge.every=1", f"judge.model={other}")
    with pytest.raises(ConfigError, match=f"the actor and judge.model=.*{words}"):
        role(tmp_path, base, saved, *judge)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_folder_without_a_reward_model_is_named_by_its_config_key(base, tmp_path, stage):
    with pytest.raises(ConfigError, match=r"reward\.model=.*: the folder has no score\.json"):
        role(tmp_path, base, base, f"pools.reward.zero_stage={stage}")


def test_lora_reward_models_are_merged_when_replicated_and_refused_when_partitioned(base, tmp_path):
    adapter = save_reward_model(base, tmp_path / "adapter", lora=True)
    np.testing.assert_allclose(all_scores(tmp_path, base, adapter), alone(adapter), atol=1e-5)
    with pytest.raises(ConfigError, match=r"reward\.model=.*medgpt merge"):
        role(tmp_path, base, adapter, "pools.reward.zero_stage=3")
