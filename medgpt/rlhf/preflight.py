"""What can be said of the models of a PPO run before data is prepared and pools start."""

from medgpt.config.base import ConfigError
from medgpt.config.model import ModelConfig
from medgpt.config.ppo import PPOStageConfig


def check_models(config: PPOStageConfig) -> None:
    """Whether every model reads as many tokens as it will be given. Light, but imports models/.

    Raises:
        ConfigError: one does not, or is not there.
    """
    from medgpt.data.tokenized.chat import generation_ids
    from medgpt.models.tokenizer import load_base
    from medgpt.rlhf.heldout_questions import Judge

    rollouts = config.data.max_length + config.rollout.max_new_tokens
    told = (
        f"data.max_length={config.data.max_length} and rollout.max_new_tokens="
        f"{config.rollout.max_new_tokens} together"
    )
    _check_positions("model.name", config.model, rollouts, told)
    _check_positions("critic.model", _named(config.critic.model), rollouts, told)
    if config.reward.score_weight:
        _check_positions("reward.model", _named(config.reward.model), rollouts, told)
    if config.judge.every:
        assert config.model.name is not None
        tokenizer = load_base(config.model.name)
        asked = Judge(config.judge, config.run.seed).asked
        longest = max(len(generation_ids(tokenizer, question.messages)) for question in asked)
        answers = longest + config.judge.max_new_tokens
        told = (
            f"judge.max_new_tokens={config.judge.max_new_tokens} and the judge's longest question "
            f"of {longest} tokens together"
        )
        _check_positions("model.name", config.model, answers, told)
        _check_positions("judge.model", _named(config.judge.model), answers, told)


def _named(name: str | None) -> ModelConfig | None:
    return None if name is None else ModelConfig(name=name)


def _check_positions(key: str, model: ModelConfig | None, tokens: int, told: str) -> None:
    from medgpt.models.value_model import positions
    from medgpt.rlhf.roles.common import errors_for_key

    if model is None:
        return
    with errors_for_key(key):
        most = positions(model)
    if most is not None and tokens > most:
        told = f"{told} exceed the {most} positions of {key}={model.name}"
        raise ConfigError(f"{told}; lower one of them")
