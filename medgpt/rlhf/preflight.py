"""Checks of a PPO run's models before data is prepared and pools start."""

from medgpt.config.base import ConfigError
from medgpt.config.ppo import PPOStageConfig


def check_models(config: PPOStageConfig) -> None:
    """Check the positions of every model and the kind of the critic. Light, but imports models/.

    Raises:
        ConfigError: a model has too few positions or cannot be found, or the critic's has no head.
    """
    from medgpt.data.tokenized.chat_template import generation_prompt_ids
    from medgpt.models.tokenizer import load_tokenizer
    from medgpt.rlhf.heldout_questions import HeldoutQuestions

    tokens = config.data.max_length + config.rollout.max_new_tokens
    cause = (
        f"data.max_length={config.data.max_length} and rollout.max_new_tokens="
        f"{config.rollout.max_new_tokens} together"
    )
    names = {"model.name": config.model.name, "critic.model": config.critic.model}
    if config.reward.score_weight:
        names["reward.model"] = config.reward.model
    _check_positions(config, names, tokens, cause)
    _check_critic(config)
    if config.judge.every:
        assert config.model.name is not None
        tokenizer = load_tokenizer(config.model.name, config.model.trust_remote_code)
        questions = HeldoutQuestions(config.judge, config.run.seed).questions
        longest = max(len(generation_prompt_ids(tokenizer, q.messages)) for q in questions)
        cause = (
            f"judge.max_new_tokens={config.judge.max_new_tokens} and the judge's longest question "
            f"of {longest} tokens together"
        )
        names = {"model.name": config.model.name, "judge.model": config.judge.model}
        _check_positions(config, names, longest + config.judge.max_new_tokens, cause)


def initial_critic(config: PPOStageConfig) -> tuple[str, str]:
    """Return config key and name of the model that the critic starts from."""
    if config.critic.model is not None:
        return "critic.model", config.critic.model
    if config.reward.model is not None:
        return "reward.model", config.reward.model
    assert config.model.name is not None
    return "model.name", config.model.name


def _check_critic(config: PPOStageConfig) -> None:
    from medgpt.models.model_files import has_adapters, load_hf_config
    from medgpt.rlhf.roles.common import errors_for_key

    key, name = initial_critic(config)
    if not has_adapters(name):  # adapters are checked with their base when they are loaded
        with errors_for_key(key):
            load_hf_config(config.model.with_name(name), "value")


def _check_positions(
    config: PPOStageConfig, names: dict[str, str | None], tokens: int, cause: str
) -> None:
    from medgpt.models.model_files import saved_max_positions
    from medgpt.rlhf.roles.common import errors_for_key

    for key, name in names.items():
        if name is None:
            continue
        model = config.model.with_name(name)
        with errors_for_key(key):
            limit = saved_max_positions(model)
        if limit is not None and tokens > limit:
            raise ConfigError(
                f"{cause} exceed the {limit} positions of {key}={name}; lower one of them"
            )
