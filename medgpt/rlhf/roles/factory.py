"""Builders of the roles, which run in the workers. The driver imports only this light module."""

from typing import TYPE_CHECKING

from medgpt.config.ppo import PPOStageConfig

if TYPE_CHECKING:
    from medgpt.rlhf.roles.actor import Actor
    from medgpt.rlhf.roles.critic import Critic
    from medgpt.rlhf.roles.reference import Reference
    from medgpt.rlhf.roles.reward import Reward
    from medgpt.rlhf.roles.rollout import Rollout


def build_actor(config: PPOStageConfig, total_iterations: int) -> "Actor":
    from medgpt.rlhf.roles.actor import Actor

    return Actor(config, total_iterations=total_iterations)


def build_critic(config: PPOStageConfig, total_iterations: int) -> "Critic":
    from medgpt.rlhf.roles.critic import Critic

    return Critic(config, total_iterations=total_iterations)


def build_reward(config: PPOStageConfig) -> "Reward":
    from medgpt.rlhf.roles.reward import Reward

    return Reward(config)


def build_reference(config: PPOStageConfig) -> "Reference":
    from medgpt.rlhf.roles.reference import Reference

    return Reference(config)


def build_rollout(config: PPOStageConfig) -> "Rollout":
    from medgpt.rlhf.roles.rollout import Rollout

    return Rollout(config)
