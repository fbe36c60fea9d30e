"""The reward role: each response gets its own score, whoever computes it; what fails is told."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from medgpt.config import ConfigError, PPOStageConfig
from medgpt.data.records import Message
from medgpt.models.tokenizer import load_base
from medgpt.models.value_model import load_value_model
from medgpt.rlhf.batching import response_batch
from medgpt.rlhf.experience import Prompts, Scores, join_rows
from medgpt.rlhf.rewards.answered import Answered
from medgpt.rlhf.rewards.total import Rewards
from medgpt.rlhf.roles.reward import Reward
from tests.rlhf.cases import ppo_config, sequences, share
from tests.rlhf.models import saved_reward_model
from tests.rlhf.test_actor import gathered

TURNS = [["user", "我头痛。"], ["assistant", "多久了?"], ["user", "三天。"]]


@pytest.fixture(scope="module")
def model(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_reward_model(base, tmp_path_factory.mktemp("reward") / "model")


def prompts() -> Prompts:
    whole = sequences()
    messages = [json.dumps(TURNS[-1 - 2 * (i % 2) :]) for i in range(len(whole))]
    return Prompts(sample_ids=whole.sample_ids, ids=whole.prompts, messages=messages)


def config_of(folder: Path, base: Path, model: Path, *overrides: str) -> PPOStageConfig:
    options = (f"reward.model={model}", "reward.score_weight=0.5", "reward.rules={dose=0.0}")
    return ppo_config(folder, base, *options, *overrides)


def all_scores(folder: Path, base: Path, model: Path) -> list[Scores]:
    """Of all ranks. The rollouts come in two parts, the second half first."""
    whole, role = sequences(), Reward(config_of(folder, base, model))
    parts = share(whole, range(6, 12)), share(whole, range(6))
    return gathered(role.score(prompts(), *parts))


def raw_scores(model: Path) -> list[float]:
    """Of each sequence alone."""
    whole, (scorer, _) = sequences(), load_value_model(str(model))
    with torch.no_grad():
        return [
            float(scorer(response_batch(whole, np.array([row])))[0, -1])
            for row in range(len(whole))
        ]


def test_a_total_is_of_its_own_response_on_any_number_of_ranks(base, model, tmp_path, two_ranks):
    whole, tokenizer = sequences(), load_base(str(base))
    config = config_of(tmp_path, base, model)
    answered = [
        Answered(
            sample_id=whole.sample_ids[i],
            messages=tuple(Message(*turn) for turn in TURNS[-1 - 2 * (i % 2) :]),
            text=str(tokenizer.decode(whole.responses.row(i), skip_special_tokens=True)),
            finished=bool(whole.finished[i]),
        )
        for i in range(len(whole))
    ]
    want = Rewards(config.reward)(answered, raw_scores(model)).totals
    assert len(set(want)) > 6
    for parts in (
        all_scores(tmp_path, base, model),
        *two_ranks(all_scores, tmp_path, base, model),
    ):
        found = join_rows([part.index for part in parts], [part.totals for part in parts])
        np.testing.assert_allclose(found, want, atol=1e-5)
        for part in parts:
            np.testing.assert_allclose(part.rewarded.totals, part.totals, atol=1e-6)


def test_a_score_that_is_not_finite_masks_its_sample(base, model, tmp_path):
    role, whole = Reward(config_of(tmp_path, base, model)), sequences()
    assert role.model is not None
    row = int(whole.responses.row(0)[0])
    role.model.pretrained.get_input_embeddings().weight.data[row] = torch.nan
    (scored,) = [role.score(prompts(), whole)]
    read = [np.append(whole.prompts.row(i), whole.responses.row(i)) for i in range(len(whole))]
    told = np.array([row in ids for ids in read])
    assert 0 < told.sum() < 12
    assert np.array_equal(np.isnan(scored.totals), told[scored.index])
    assert [x is None for x in scored.rewarded.components["score"]] == told[scored.index].tolist()


def test_the_judge_s_model_scores_in_the_order_it_says(base, model, tmp_path):
    other = saved_reward_model(base, tmp_path / "other", seed=8)
    role = Reward(config_of(tmp_path, base, model, f"judge.model={other}", "judge.every=1"))
    index, found = role.judge(sequences())
    want = np.array(raw_scores(other))
    np.testing.assert_allclose(found, want[index], atol=1e-5)
    assert np.abs(want - raw_scores(model)).max() > 1e-2


def test_samples_are_those_of_the_latest_call_and_none_of_a_worker_just_replaced(
    base, model, tmp_path
):
    role, whole = Reward(config_of(tmp_path, base, model)), sequences()
    assert role.samples(3) == []
    rewarded = role.score(prompts(), whole).rewarded
    found = role.samples(3)
    assert [sample["total"] for sample in found] == rewarded.totals[:3]
    assert {sample["prompt"] for sample in found} == {"三天。"}


@pytest.mark.parametrize("section", ["reward", "judge"])
def test_a_model_that_reads_other_ids_is_refused_with_its_key(base, model, tmp_path, section):
    other = saved_reward_model(base, tmp_path / "other")
    tokenizer = load_base(str(base))
    tokenizer.add_tokens(["偏头痛"])
    tokenizer.save_pretrained(other)
    overrides = (f"{section}.model={other}", "judge.every=1")
    with pytest.raises(ConfigError, match=rf"the actor and {section}\.model=.*偏头痛"):
        Reward(config_of(tmp_path, base, model, *overrides))


def test_a_language_model_is_refused_with_its_key(base, tmp_path):
    with pytest.raises(ConfigError, match=r"^reward\.model=.* no score\.json"):
        Reward(config_of(tmp_path, base, base))
