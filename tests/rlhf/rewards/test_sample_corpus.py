from medgpt.config.ppo_rewards import RewardFunctionConfig
from medgpt.data.sources.records import Message
from medgpt.rlhf.rewards.functions import RewardFunction
from medgpt.rlhf.rewards.reward_sample import RewardSample
from medgpt.rlhf.rewards.sample_corpus import causes_and_advice
from medgpt.sample_corpus.generator import CorpusGenerator


def mark(question: str, answer: str) -> float:
    (value,) = causes_and_advice([RewardSample("0", (Message("user", question),), answer, True)])
    return value


def test_the_sample_corpus_replies_earn_the_full_reward():
    for _, prompt, reply in CorpusGenerator().prompts_with_replies():
        assert mark(prompt, reply) == 1.0, prompt


def test_stated_causes_and_advice_count_and_denied_or_unrelated_ones_do_not():
    asked = "我最近总是头痛,可能是什么原因?"
    assert mark(asked, "常见原因有紧张性头痛、偏头痛。") == 2 / 3
    assert mark(asked, "可能是偏头痛。建议您去看医生。") == 2 / 3
    assert mark(asked, "不是偏头痛。") == 0.0
    assert mark(asked, "头痛可能与痛风、偏头痛有关。") == 1 / 3 - 1 / 2
    assert mark(asked, "建议您去看医生。") == 1 / 3
    assert mark(asked, "") == 0.0


def test_other_questions_earn_nothing():
    assert mark("糖尿病怎么治疗?", "建议您去看医生。") == 0.0


def test_the_reward_can_be_named_in_a_config():
    path = "medgpt.rlhf.rewards.sample_corpus:causes_and_advice"
    function = RewardFunction(RewardFunctionConfig(name="complaint", path=path))
    assert function([]) == []
