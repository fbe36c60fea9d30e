"""The PPO stage from config to finished run: prompts, pools, iterations, export."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from medgpt.artifacts import Folder, commit, committed, entries
from medgpt.cluster.wait_for_resources import await_data_room
from medgpt.config.ppo import PPOStageConfig
from medgpt.data.loader.plan import Plan
from medgpt.disk import storage_errors
from medgpt.metrics import ConsoleReporter
from medgpt.rlhf.pools.pool import Pool
from medgpt.rlhf.pools.pools import Pools
from medgpt.rlhf.preflight import check_models
from medgpt.rlhf.ptx import FOLDER, lesson_stream, prepare_lessons
from medgpt.rlhf.roles.make import (
    make_actor,
    make_critic,
    make_reference,
    make_reward,
    make_rollout,
)
from medgpt.runs import Run
from medgpt.train.driver import cluster_resources, describe, parents
from medgpt.train.model_card import model_card
from medgpt.train.preparation import prepare, run_task

if TYPE_CHECKING:
    from medgpt.rlhf.diagnosis import History
    from medgpt.rlhf.ppo import PPO

CRITIC = "critic"  # the folder of its export


def make_pools(config: PPOStageConfig, num_iterations: int, reporter: ConsoleReporter) -> Pools:
    """The pools of the config, not started yet."""
    found = role_pools(config, num_iterations)
    return Pools(
        found,
        config.pools,
        wait_s=config.cluster.wait_s,
        say=reporter.say,
        data_cpus=config.cluster.data_cpus,
    )


def role_pools(config: PPOStageConfig, num_iterations: int) -> list[Pool[Any]]:
    """A pool for every role that has one of its own."""
    pools = config.pools
    found: list[Pool[Any]] = [
        Pool("actor", pools.actor, partial(make_actor, config, num_iterations)),
        Pool("critic", pools.critic, partial(make_critic, config, num_iterations)),
        Pool(
            "reward",
            pools.reward,
            partial(make_reward, config),
            independent=pools.reward.zero_stage == 0,
        ),
        Pool(
            "rollout",
            pools.rollout,
            partial(make_rollout, config),
            independent=config.rollout.engine == "hf",
        ),
    ]
    if not pools.reference_in_actor:
        make = partial(make_reference, config)
        independent = pools.reference.zero_stage == 0
        found.append(Pool("reference", pools.reference, make, independent=independent))
    return found


def prepare_prompts(run: Run, config: PPOStageConfig, reporter: ConsoleReporter) -> Plan:
    """The order of the prompts, made unless it is there; the manifest says what it is made of.

    Raises:
        ConfigError: a model or the data is not fit for this.
    """
    await_data_room(config.cluster, reporter.say)
    run_task(check_models, config, cpus=config.cluster.data_cpus)
    with storage_errors(run.folder.url, "data"):
        data, plan = prepare(run, config, reporter.advance)
    reporter.say(describe(data, plan))
    sources = [config.model.name, config.reward.model, config.critic.model]
    run.update_manifest(
        seed=config.run.seed,
        parents=list(dict.fromkeys(name for source in sources for name in parents(source))),
        data={key: value for key, value in data.items() if key != "files"},
        plan={key: value for key, value in plan.items() if key != "files"},
        hardware=run.manifest["hardware"] | {"cluster": cluster_resources()},
    )
    found = Plan(
        run.plan.url,
        global_batch_size=config.ppo.rollout_batch_size,
        max_steps=config.ppo.max_iterations,
    )
    if config.ptx is not None:
        with storage_errors(run.folder.url, FOLDER):
            data, plan = prepare_lessons(run, config, found.num_steps, reporter.advance)
        reporter.say(f"PPO-ptx: {describe(data, plan)}")
        facts = {key: value for key, value in data.items() if key != "files"}
        run.update_manifest(ptx=facts)
    return found


def build_ppo(
    run: Run,
    config: PPOStageConfig,
    pools: Pools,
    reporter: ConsoleReporter,
    *,
    plan: Plan,
    prepared: Run | None = None,
    judged: "Callable[[History], None] | None" = None,
) -> "PPO":
    """The loop over started pools.

    Args:
        plan: of the prompts.
        prepared: the run directory that holds the prompts, if not `run`.
        judged: as of PPO.
    """
    # after the workers have begun to load the same libraries
    from medgpt.rlhf.ppo import PPO
    from medgpt.rlhf.prompts import prompt_stream
    from medgpt.rlhf.weight_sync.sync import WeightSync

    prepared = prepared or run
    sync = WeightSync(pools.pools["actor"], pools.pools["rollout"], pools, config.pools.sync)
    return PPO(
        run,
        config,
        pools,
        prompts=partial(
            prompt_stream,
            plan,
            prepared.data.url,
            data_cpus=config.cluster.data_cpus,
            wait_s=config.cluster.wait_s,
            say=reporter.say,
        ),
        sync=sync.run,
        num_iterations=plan.num_steps,
        reporter=reporter,
        lessons=None
        if config.ptx is None
        else partial(lesson_stream, prepared, config, say=reporter.say),
        judged=judged,
    )


def export(run: Run, config: PPOStageConfig, pools: Pools, *, critic: bool = True) -> None:
    """The policy in model/, and the critic beside it."""
    from medgpt.rlhf.roles.actor import Actor
    from medgpt.rlhf.roles.critic import Critic

    exports: list[Any] = [(pools.pools["actor"], Actor.export, run.model)]
    if critic:
        exports.append((pools.pools["critic"], Critic.export, run.folder / CRITIC))
    for pool, method, folder in exports:
        if committed(folder) is None:
            with storage_errors(run.folder.url, folder.url.rsplit("/", 1)[-1]):
                files = pools.get(pool.call(method, folder.url), "export")[0]
                if folder is run.model:
                    files += _card(run, config, folder)
                commit(folder, files)


def _card(run: Run, config: PPOStageConfig, folder: Folder) -> list[Any]:
    with folder.staging() as directory:
        (directory / "README.md").write_text(model_card(run, config), "utf-8")
        return entries(directory, ["README.md"])
