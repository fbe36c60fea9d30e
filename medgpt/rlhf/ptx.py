"""The second stream of PPO-ptx: conversations prepared as for fine-tuning, in a folder of their own
in the run, and dealt to the optimizer steps."""

from collections.abc import Callable, Iterator
from itertools import islice

from medgpt.config.base import ConfigError
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.stages import RunConfig, SFTConfig
from medgpt.config.train import ClusterConfig, TrainConfig
from medgpt.data.loader.plan import Plan
from medgpt.data.loader.stream import training_stream
from medgpt.rlhf.prompts import within
from medgpt.rlhf.rollout_batch import Lessons
from medgpt.runs import Run
from medgpt.train.preparation import Prepared, prepare

FOLDER = "ptx"


def lesson_run(run: Run) -> Run:
    """Where their tokens and their plan are."""
    return Run((run.folder / FOLDER).url)


def prepare_lessons(
    run: Run,
    config: PPOStageConfig,
    num_iterations: int,
    on_progress: Callable[[str, int, int], None],
) -> Prepared:
    """Tokenised data and the plan for so many iterations, made unless they are there.

    Raises:
        ConfigError: whatever is wrong with the conversations, as fine-tuning would tell it.
    """
    own = lesson_run(run)
    as_told = _fine_tuning(config, own, num_iterations * config.ppo.num_steps)
    try:
        return prepare(own, as_told, on_progress)
    except ConfigError as error:
        raise ConfigError(f"[ptx] {error}") from None


def lesson_stream(
    run: Run, config: PPOStageConfig, start: int, *, say: Callable[[str], None]
) -> Iterator[Lessons]:
    """Those of iteration `start` and all after it, each `within` cluster.wait_s."""
    assert config.ptx is not None
    own, num_steps = lesson_run(run), config.ppo.num_steps
    plan = Plan(own.plan.url, global_batch_size=config.ptx.batch_size, max_steps=None)
    steps = training_stream(
        plan,
        own.data.url,
        rank=0,
        world_size=1,
        start=start * num_steps,
        data_cpus=config.cluster.data_cpus,
    )
    parts = iter(lambda: list(islice(steps, num_steps)), [])
    lessons = (Lessons(steps=[step.rows for step in part]) for part in parts)
    return within(lessons, "conversations of [ptx]", wait_s=config.cluster.wait_s, say=say)


def _fine_tuning(config: PPOStageConfig, run: Run, num_steps: int) -> SFTConfig:
    """What fine-tuning on the conversations would be told; an epoch has at least one step."""
    assert config.ptx is not None
    return SFTConfig(
        run=RunConfig(
            dir=run.folder.url, seed=config.run.seed, allow_changes=config.run.allow_changes
        ),
        model=config.model,
        data=config.ptx.data,
        train=TrainConfig(
            epochs=num_steps,
            max_steps=num_steps,
            global_batch_size=config.ptx.batch_size,
            micro_batch_size=1,
        ),
        cluster=ClusterConfig(data_cpus=config.cluster.data_cpus),
    )
