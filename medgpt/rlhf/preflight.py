"""Checks of a PPO run's models before data is prepared and pools start."""

from medgpt.config.base import ConfigError
from medgpt.config.model import ModelConfig
from medgpt.config.ppo import PPOStageConfig


def check_models(config: PPOStageConfig) -> None:
    """Check that every model has enough positions. Light, but imports models/.

    Raises:
        ConfigError: a model has too few positions or cannot be found.
    """
    from medgpt.data.tokenized.chat_template import generation_prompt_ids
    from medgpt.models.tokenizer import load_tokenizer
    from medgpt.rlhf.heldout_questions import HeldoutQuestions

    rollout_tokens = config.data.max_length + config.rollout.max_new_tokens
    source = (
        f"data.max_length={config.data.max_length} and rollout.max_new_tokens="
        f"{config.rollout.max_new_tokens} together"
    )
    _check_positions("model.name", config.model, rollout_tokens, source)
    _check_positions("critic.model", _model_config(config.critic.model), rollout_tokens, source)
    if config.reward.score_weight:
        _check_positions("reward.model", _model_config(config.reward.model), rollout_tokens, source)
    if config.judge.every:
        assert config.model.name is not None
        tokenizer = load_tokenizer(config.model.name)
        questions = HeldoutQuestions(config.judge, config.run.seed).questions
        longest = max(
            len(generation_prompt_ids(tokenizer, question.messages)) for question in questions
        )
        answer_tokens = longest + config.judge.max_new_tokens
        source = (
            f"judge.max_new_tokens={config.judge.max_new_tokens} and the judge's longest question "
            f"of {longest} tokens together"
        )
        _check_positions("model.name", config.model, answer_tokens, source)
        _check_positions("judge.model", _model_config(config.judge.model), answer_tokens, source)


def _model_config(name: str | None) -> ModelConfig | None:
    return None if name is None else ModelConfig(name=name)


def _check_positions(key: str, model: ModelConfig | None, tokens: int, source: str) -> None:
    from medgpt.models.value_model import max_positions
    from medgpt.rlhf.roles.common import errors_for_key

    if model is None:
        return
    with errors_for_key(key):
        max_positions = max_positions(model)
    if max_positions is not None and tokens > max_positions:
        source = f"{source} exceed the {max_positions} positions of {key}={model.name}"
        raise ConfigError(f"{source}; lower one of them")
