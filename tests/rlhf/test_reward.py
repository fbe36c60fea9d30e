"""The reward role: each answer's own score, whatever the ranks; partitioned, offloaded, refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from medgpt.config.base import ConfigError
from medgpt.data.sources.records import Message
from medgpt.engine.setup import join_process_group
from medgpt.models.tokenizer import load_base
from medgpt.models.value_model import ValueModel, last_values, load_value_model
from medgpt.rlhf.batching import response_batch
from medgpt.rlhf.rewards.reward_sample import RewardSample
from medgpt.rlhf.rewards.total import Rewards
from medgpt.rlhf.roles.reward import Reward
from medgpt.rlhf.rollout_batch import Prompts, join_rows
from tests.engine.cases import CPU
from tests.rlhf.cases import asked, ppo_config, save_reward_model, sequences, share
from tests.rlhf.test_actor import gathered

NO_RULES = (
    "reward.rules={urgency=0.0,dose=0.0,diagnosis=0.0,hotline=0.0,language=0.0,repetition=0.0}"
)
WEIGHTED = ("reward.score_weight=0.5", "reward.rules={dose=0.0}")


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


def test_a_total_is_of_its_own_response_in_whatever_parts_rollouts_come(base, tmp_path, saved):
    turns = [["user", "我头痛。"], ["assistant", "多久了?"], ["user", "三天。"]]
    whole, tokenizer = sequences(), load_base(str(base))
    asked_by = [turns[-1 - 2 * (i % 2) :] for i in range(len(whole))]
    config = ppo_config(tmp_path, base, *WEIGHTED, f"reward.model={saved}")
    answered = [
        RewardSample(
            sample_id=whole.sample_ids[i],
            messages=tuple(Message(*turn) for turn in asked_by[i]),
            text=str(tokenizer.decode(whole.responses.row(i), skip_special_tokens=True)),
            finished=bool(whole.finished[i]),
        )
        for i in range(len(whole))
    ]
    want = Rewards(config.reward)(answered, alone(saved).tolist()).totals
    assert len(set(want)) > 6

    found, messages = Reward(config), [json.dumps(turn) for turn in asked_by]
    assert found.samples(3) == []
    prompts = Prompts(sample_ids=whole.sample_ids, ids=whole.prompts, messages=messages)
    part = found.score(prompts, share(whole, range(6, 12)), share(whole, range(6)))
    np.testing.assert_allclose(join_rows([part.index], [part.totals]), want, atol=1e-5)
    np.testing.assert_allclose(part.rewarded.totals, part.totals, atol=1e-6)
    samples = found.samples(3)
    assert [sample["total"] for sample in samples] == part.rewarded.totals[:3]
    assert {sample["prompt"] for sample in samples} == {"三天。"}


def test_a_score_that_is_not_finite_masks_its_sample(base, tmp_path, saved):
    found, whole = role(tmp_path, base, saved), sequences()
    assert isinstance(found.model, ValueModel)
    token = int(whole.responses.row(0)[0])
    found.model.pretrained.get_input_embeddings().weight.data[token] = torch.nan
    part = found.score(asked(whole), whole)
    read = [np.append(whole.prompts.row(i), whole.responses.row(i)) for i in range(len(whole))]
    told = np.array([token in ids for ids in read])
    assert 0 < told.sum() < 12
    assert np.array_equal(np.isnan(part.totals), told[part.index])
    assert [x is None for x in part.rewarded.components["score"]] == told[part.index].tolist()


def test_the_judge_s_model_scores_in_the_order_it_says(base, tmp_path, saved):
    other = save_reward_model(base, tmp_path / "other", seed=8)
    found = role(tmp_path, base, saved, f"judge.model={other}", "judge.every=1")
    index, marks = found.judge(sequences())
    np.testing.assert_allclose(marks, alone(other)[index], atol=1e-5)
    assert np.abs(alone(other) - alone(saved)).max() > 1e-2


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
    adapter = save_reward_model(base, tmp_path / "adapter", lora=True)
    np.testing.assert_allclose(all_scores(tmp_path, base, adapter), alone(adapter), atol=1e-5)
    with pytest.raises(ConfigError, match=r"reward\.model=.*medgpt merge"):
        role(tmp_path, base, adapter, "pools.reward.zero_stage=3")
