"""Building blocks of the PPO stage: data preparation, pools, the loop, export."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from medgpt.artifacts import Folder, commit, committed, file_entries
from medgpt.cluster.wait_for_resources import wait_for_data_task_resources
from medgpt.config.pools import RoleName
from medgpt.config.ppo import PPOStageConfig
from medgpt.data.loader.plan import Plan
from medgpt.disk import storage_errors
from medgpt.metrics import ConsoleReporter
from medgpt.rlhf.pools.pool import Pool
from medgpt.rlhf.pools.pools import Pools
from medgpt.rlhf.preflight import check_models
from medgpt.rlhf.ptx import PTX_FOLDER, prepare_ptx, ptx_stream
from medgpt.rlhf.roles.factory import build_role
from medgpt.runs import Run
from medgpt.train.driver import cluster_resources, describe_data, parent_runs
from medgpt.train.model_card import model_card
from medgpt.train.preparation import prepare, run_task

if TYPE_CHECKING:
    from medgpt.rlhf.diagnosis import History
    from medgpt.rlhf.ppo import PPO

CRITIC_FOLDER = "critic"  # folder of the exported critic


def build_pools(config: PPOStageConfig, num_iterations: int, reporter: ConsoleReporter) -> Pools:
    """Return the pools of the config, not started."""
    return Pools(
        build_role_pools(config, num_iterations),
        config.pools,
        wait_s=config.cluster.wait_s,
        say=reporter.say,
        data_cpus=config.cluster.data_cpus,
    )


def build_role_pools(config: PPOStageConfig, num_iterations: int) -> list[Pool[Any]]:
    """Return one pool per role; none for the reference if the actor computes it."""
    pools = config.pools
    independent = {
        "reward": pools.reward.zero_stage == 0,
        "rollout": config.rollout.engine == "hf",
        "reference": pools.reference.zero_stage == 0,
    }
    names: list[RoleName] = ["actor", "critic", "reward", "rollout"]
    if not pools.reference_in_actor:
        names.append("reference")
    return [
        Pool(
            name,
            pools.role(name),
            partial(build_role, name, config, num_iterations),
            independent=independent.get(name, False),
        )
        for name in names
    ]


def prepare_prompts(run: Run, config: PPOStageConfig, reporter: ConsoleReporter) -> Plan:
    """Tokenize and plan the prompts (and PPO-ptx data) unless done before; update the manifest.

    Raises:
        ConfigError: a model or the data cannot be used.
    """
    wait_for_data_task_resources(config.cluster, reporter.say)
    run_task(check_models, config, cpus=config.cluster.data_cpus)
    with storage_errors(run.folder.url, "data"):
        data, plan = prepare(run, config, reporter.advance)
    reporter.say(describe_data(data, plan))
    sources = [config.model.name, config.reward.model, config.critic.model]
    run.update_manifest(
        seed=config.run.seed,
        parents=list(dict.fromkeys(name for source in sources for name in parent_runs(source))),
        data=_without_files(data),
        plan=_without_files(plan),
        hardware=run.manifest["hardware"] | {"cluster": cluster_resources()},
    )
    prompt_plan = Plan(
        run.plan.url,
        global_batch_size=config.ppo.rollout_batch_size,
        max_steps=config.ppo.max_iterations,
    )
    if config.ptx is not None:
        with storage_errors(run.folder.url, PTX_FOLDER):
            data, plan = prepare_ptx(run, config, prompt_plan.num_steps, reporter.advance)
        reporter.say(f"PPO-ptx: {describe_data(data, plan)}")
        run.update_manifest(ptx=_without_files(data))
    return prompt_plan


def _without_files(manifest: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in manifest.items() if key != "files"}


def build_ppo(
    run: Run,
    config: PPOStageConfig,
    pools: Pools,
    reporter: ConsoleReporter,
    *,
    plan: Plan,
    prepared_run: Run | None = None,
    on_eval: "Callable[[History], None] | None" = None,
) -> "PPO":
    """Return the PPO loop over started pools.

    Args:
        plan: order of the prompts.
        prepared_run: the run directory that holds the prompts, if not `run`.
        on_eval: see `PPO`.
    """
    # imported while the workers load the same libraries
    from medgpt.rlhf.ppo import PPO
    from medgpt.rlhf.prompts import prompt_stream
    from medgpt.rlhf.weight_sync.sync import WeightSync

    data_run = prepared_run or run
    ptx = None
    if config.ptx is not None:
        ptx = partial(ptx_stream, data_run, config, say=reporter.say)
    sync = WeightSync(pools.pools["actor"], pools.pools["rollout"], pools, config.pools.sync)
    return PPO(
        run,
        config,
        pools,
        prompts=partial(
            prompt_stream,
            plan,
            data_run.data.url,
            data_cpus=config.cluster.data_cpus,
            wait_s=config.cluster.wait_s,
            say=reporter.say,
        ),
        sync=sync.run,
        num_iterations=plan.num_steps,
        reporter=reporter,
        ptx=ptx,
        on_eval=on_eval,
    )


def export_models(run: Run, config: PPOStageConfig, pools: Pools, *, critic: bool = True) -> None:
    """Export the policy to model/ and the critic to critic/, unless done before."""
    from medgpt.rlhf.roles.actor import Actor
    from medgpt.rlhf.roles.critic import Critic

    exports: list[Any] = [(pools.pools["actor"], Actor.export, run.model)]
    if critic:
        exports.append((pools.pools["critic"], Critic.export, run.folder / CRITIC_FOLDER))
    for pool, method, folder in exports:
        if committed(folder) is None:
            with storage_errors(run.folder.url, folder.name):
                files = pools.get(pool.call(method, folder.url), "export")[0]
                if folder is run.model:
                    files += _write_model_card(run, config, folder)
                commit(folder, files)


def _write_model_card(run: Run, config: PPOStageConfig, folder: Folder) -> list[Any]:
    with folder.staging() as directory:
        (directory / "README.md").write_text(model_card(run, config), "utf-8")
        return file_entries(directory, ["README.md"])
