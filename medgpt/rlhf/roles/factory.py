"""Builds the roles, in the workers. The driver imports only this light module."""

from typing import Any

from medgpt.config.ppo import PPOStageConfig


def build_role(role: str, config: PPOStageConfig, num_iterations: int) -> Any:
    """Return the role of this name; `num_iterations` sets the learning rate schedules."""
    match role:
        case "actor":
            from medgpt.rlhf.roles.actor import Actor

            return Actor(config, total_iterations=num_iterations)
        case "critic":
            from medgpt.rlhf.roles.critic import Critic

            return Critic(config, total_iterations=num_iterations)
        case "reward":
            from medgpt.rlhf.roles.reward import Reward

            return Reward(config)
        case "reference":
            from medgpt.rlhf.roles.reference import Reference

            return Reference(config)
    from medgpt.rlhf.roles.rollout import Rollout

    return Rollout(config)
