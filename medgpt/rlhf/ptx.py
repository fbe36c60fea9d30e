"""PPO-ptx: a stream of SFT conversations whose loss is added to the actor's updates. They are
prepared as for fine-tuning, in a subfolder of the run."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import ClassVar

from medgpt.config.base import Config, ConfigError
from medgpt.config.data import DataConfig
from medgpt.config.model import ModelConfig, TokenizerConfig
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.stages import Passes, RunConfig, SampleKind
from medgpt.config.train import ClusterConfig
from medgpt.data.loader.plan import Plan
from medgpt.data.loader.stream import training_stream
from medgpt.rlhf.prompts import with_timeout
from medgpt.rlhf.rollout_batch import PtxBatch
from medgpt.runs import Run
from medgpt.train.preparation import PreparedData, prepare

PTX_FOLDER = "ptx"


class PtxDataConfig(Config):
    """The sections that `prepare` reads of a stage, for the conversations of PPO-ptx."""

    sample_kind: ClassVar[SampleKind] = "conversations"

    run: RunConfig
    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    cluster: ClusterConfig
    passes: Passes


def ptx_run(run: Run) -> Run:
    """Return the subfolder with the tokens and the plan, as a run."""
    return Run((run.folder / PTX_FOLDER).url)


def prepare_ptx(
    run: Run,
    config: PPOStageConfig,
    num_iterations: int,
    on_progress: Callable[[str, int, int], None],
) -> PreparedData:
    """Tokenize the conversations and plan this many iterations, unless done before.

    Raises:
        ConfigError: the conversations cannot be used, with the message of fine-tuning.
    """
    assert config.ptx is not None
    num_steps = num_iterations * config.ppo.num_steps
    stage = PtxDataConfig(
        run=config.run,
        model=config.model,
        tokenizer=config.tokenizer,
        data=config.ptx.data,
        cluster=config.cluster,
        passes=Passes(num_steps, num_steps * config.ptx.batch_size),  # a pass has at least one step
    )
    try:
        return prepare(ptx_run(run), stage, on_progress)
    except ConfigError as error:
        raise ConfigError(f"[ptx] {error}") from None


def ptx_stream(
    run: Run, config: PPOStageConfig, start: int, *, say: Callable[[str], None]
) -> Iterator[PtxBatch]:
    """Yield the batches from iteration `start` on. Raises ConfigError after cluster.wait_s."""
    assert config.ptx is not None
    folder_run, num_steps = ptx_run(run), config.ppo.num_steps
    plan = Plan(folder_run.plan.url, global_batch_size=config.ptx.batch_size, max_steps=None)
    steps = training_stream(
        plan,
        folder_run.data.url,
        rank=0,
        world_size=1,
        start=start * num_steps,
        data_cpus=config.cluster.data_cpus,
    )
    iterations = iter(lambda: list(islice(steps, num_steps)), [])
    batches = (PtxBatch(steps=[step.rows for step in iteration]) for iteration in iterations)
    return with_timeout(batches, "conversations of [ptx]", wait_s=config.cluster.wait_s, say=say)
