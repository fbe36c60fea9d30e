"""What can be said of the models of a PPO run before data is prepared and pools start."""

from medgpt.config import ConfigError, PPOStageConfig


def check_models(config: PPOStageConfig) -> None:
    """Whether every model reads as many tokens as it will be given. Light, but imports models/.

    Raises:
        ConfigError: one does not, or is not there.
    """
    from medgpt.data.chat import generation_ids
    from medgpt.models.tokenizer import load_base
    from medgpt.rlhf.judge import Judge

    rollouts = config.data.max_length + config.rollout.max_new_tokens
    told = (
        f"data.max_length={config.data.max_length} and rollout.max_new_tokens="
        f"{config.rollout.max_new_tokens} make sequences of up to {rollouts} tokens"
    )
    models = {"model.name": config.model.name, "critic.model": config.critic.model}
    if config.reward.score_weight:
        models["reward.model"] = config.reward.model
    for key, name in models.items():
        _check_positions(key, name, rollouts, told)
    if config.judge.every:
        assert config.model.name is not None
        tokenizer = load_base(config.model.name)
        asked = Judge(config.judge, config.run.seed).asked
        longest = max(len(generation_ids(tokenizer, question.messages)) for question in asked)
        answers = longest + config.judge.max_new_tokens
        told = (
            f"judge.max_new_tokens={config.judge.max_new_tokens} and its longest question of "
            f"{longest} make sequences of {answers} tokens"
        )
        _check_positions("model.name", config.model.name, answers, told)
        _check_positions("judge.model", config.judge.model, answers, told)


def _check_positions(key: str, name: str | None, tokens: int, told: str) -> None:
    from medgpt.models.value_model import positions
    from medgpt.rlhf.roles.common import told_as

    if name is None:
        return
    with told_as(key):
        most = positions(name)
    if most is not None and tokens > most:
        raise ConfigError(f"{told}, {key}={name} has {most} positions; lower either")
