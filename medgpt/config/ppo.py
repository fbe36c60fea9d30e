"""PPO: the algorithm's choices, and the root of its stage."""

from typing import Annotated, ClassVar, Literal, Self

from annotated_types import Ge, Gt, Le
from pydantic import model_validator

from medgpt.config.base import Config, Count, ModelPath
from medgpt.config.data import DataConfig
from medgpt.config.model import LoraConfig, ModelConfig, TokenizerConfig
from medgpt.config.pools import ROLES, PoolsConfig
from medgpt.config.ppo_rewards import DiagnosisConfig, JudgeConfig, PPORewardConfig
from medgpt.config.stages import Passes, RunConfig, SampleKind
from medgpt.config.train import ClusterConfig, OptimizerConfig, Schedule

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]


class PPOConfig(Config):
    """One iteration: sample a rollout batch, score it, fit it for `epochs` passes."""

    prompt_epochs: Count = 1
    """Passes over the prompts."""
    max_iterations: Count | None = None
    """Stop earlier, after this many iterations; the learning rates' schedules are fitted to it."""
    rollout_batch_size: Count = 512
    """Prompts per iteration, over all workers; each gets one response."""
    global_batch_size: Count = 128
    """Sequences per optimizer step, over all workers."""
    epochs: Count = 1
    """Passes over each rollout batch, each in another order."""
    micro_batch_tokens: Count = 8192
    """Most tokens of a forward pass, on each worker. A longer sequence has one of its own."""
    async_rollouts: bool = False
    """Sample the next batch while the present one is learnt, with weights that are one iteration
    old."""
    checkpoint_every: Count = 10
    """Iterations between checkpoints; the last one always has one."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept."""
    log_every: Count = 1
    """Iterations between lines on the console."""
    audit: bool = False
    """Write which prompt was learnt from in which iteration to audit/."""

    kl_coef: NonNegative = 0.05
    """Reward lost per nat of divergence from the reference; the first of an adaptive one."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Of each token's divergence (http://joschu.net/blog/kl-approx.html). As a reward only k1 has
    the gradient of the reverse KL, in expectation; k2 and k3 vary less and pull elsewhere."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: steer kl_coef towards kl_target (arXiv 1909.08593, section 2.2)."""
    kl_target: Positive = 6.0
    """adaptive: nats of a whole response."""
    kl_horizon: Positive = 10000.0
    """adaptive: sequences in which the coefficient may change by about a fifth."""
    score_clip: Positive | None = None
    """Scores count as at most this, and at least its negative; unset does not clip."""
    normalise_scores: bool = False
    """Scores relative to the running mean and standard deviation of all so far."""
    length_penalty: float = 0.0
    """Taken from the score for each token of the response."""
    missing_end_penalty: NonNegative = 0.0
    """Taken from the score of a response without end token."""
    gamma: Annotated[float, Gt(0), Le(1)] = 1.0
    """Discount per token."""
    gae_lambda: Annotated[float, Ge(0), Le(1)] = 0.95
    """Bias against variance of the advantages; 1 is Monte Carlo."""
    bootstrap_truncated: bool = False
    """Value what follows a response that was cut off by the critic; false counts its last token as
    the end."""
    whiten_advantages: bool = True
    """Advantages of a rollout batch have mean 0 and variance 1."""

    clip_range: Annotated[float, Gt(0), Le(1)] = 0.2
    """The policy's ratio is clipped to [1 - clip_range, 1 + clip_range]."""
    clip_range_high: Positive | None = None
    """Instead of clip_range above 1 (arXiv 2503.14476); unset is the same."""
    dual_clip: Annotated[float, Gt(1)] | None = None
    """Bounds the loss of bad tokens at this times the advantage (arXiv 1912.09729); unset: off."""
    target_kl: Positive | None = None
    """End an iteration's updates when a step's KL from the old policy, in nats per token, exceeds
    this; unset never does."""
    entropy_coef: NonNegative = 0.0
    """Of the entropy bonus in the policy's loss."""
    max_logprob_gap: Positive = 0.01
    """Mean distance, in nats per token, of the rollout engine's log-probabilities from training's
    above which tokens get truncated importance weights. Async rollouts always have them."""
    max_importance_weight: Annotated[float, Ge(1)] = 2.0
    """Importance weights are cut off here (arXiv 2505.24034 and others)."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps of a full iteration."""
        return self.epochs * (self.rollout_batch_size // self.global_batch_size)

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        rollout, batch = self.rollout_batch_size, self.global_batch_size
        if rollout % batch:
            fitting = [
                str(size) for size in (rollout // batch * batch, -(-rollout // batch) * batch)
            ]
            raise ValueError(
                f"rollout_batch_size={rollout} must be a multiple of global_batch_size={batch}; "
                f"{' or '.join(size for size in fitting if size != '0')} would do"
            )
        if self.clip_range_high is not None and self.clip_range_high < self.clip_range:
            raise ValueError(
                f"clip_range_high={self.clip_range_high} is below clip_range={self.clip_range}; "
                "raise it or leave it out"
            )
        return self


class RolloutConfig(Config):
    """How responses are sampled."""

    engine: Literal["hf", "vllm"] = "hf"
    """hf: medgpt's own loop over the Hugging Face model. vllm: the package of that name."""
    max_new_tokens: Count = 256
    """Longest response."""
    temperature: Positive = 1.0
    """Of sampling. Policy, old policy and reference are compared at it, too."""
    batch_tokens: Count = 65536
    """hf: most tokens of a batch, room for responses included: what its keys and values need."""
    gpu_memory_share: Annotated[float, Gt(0), Le(1)] = 0.85
    """vllm: share of a GPU's memory that it takes for weights, keys and values."""


class PolicyOptimizerConfig(OptimizerConfig):
    learning_rate: Positive = 1e-6
    """Peak learning rate."""
    schedule: Schedule = "linear"
    """After warm-up: cosine or linear to min_lr_ratio; wsd stays and decays linearly at the end."""
    min_lr_ratio: Annotated[float, Ge(0), Le(1)] = 0.0
    """The schedule ends at this share of learning_rate."""
    weight_decay: NonNegative = 0.0
    """AdamW decay of matrices; vectors and embeddings are not decayed."""


class ValueOptimizerConfig(PolicyOptimizerConfig):
    learning_rate: Positive = 1e-5
    """Peak learning rate."""


class CriticConfig(Config):
    """The value function."""

    model: ModelPath | None = None
    """What it starts from, adapters folded in; unset: the reward model, or, where there is none,
    the actor's with a fresh head."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters."""
    optimizer: ValueOptimizerConfig = ValueOptimizerConfig()
    value_clip_range: Positive | None = 0.2
    """Values may move this far from their estimate at sampling time."""
    warmup_iterations: Annotated[int, Ge(0)] = 0
    """First iterations in which the critic alone learns."""


class PtxConfig(Config):
    """PPO-ptx (arXiv 2203.02155): language modelling on conversations beside the policy's loss."""

    coef: Positive = 1.0
    """Of its loss, the mean over its tokens."""
    batch_size: Count = 32
    """Rows of `data.max_length` tokens per optimizer step, over all workers."""
    data: DataConfig
    """Conversations, as for fine-tuning."""


class PPOReportConfig(Config):
    every: Count = 10
    """Iterations between samples in the report."""
    samples: Annotated[int, Ge(0)] = 4
    """Rollouts in it each time, never of a sensitive source."""


class PPOStageConfig(Config):
    """configs/ppo.toml"""

    run: RunConfig
    model: ModelConfig
    """What the actor and the reference start from."""
    data: DataConfig
    """Conversations, whose last answers are left out: prompts of at most `max_length` tokens."""
    ppo: PPOConfig = PPOConfig()
    optimizer: PolicyOptimizerConfig = PolicyOptimizerConfig()
    critic: CriticConfig = CriticConfig()
    reward: PPORewardConfig = PPORewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    ptx: PtxConfig | None = None
    judge: JudgeConfig = JudgeConfig()
    diagnosis: DiagnosisConfig = DiagnosisConfig()
    pools: PoolsConfig = PoolsConfig()
    cluster: ClusterConfig = ClusterConfig()
    report: PPOReportConfig = PPOReportConfig()

    sample_kind: ClassVar[SampleKind] = "prompts"

    @property
    def passes(self) -> Passes:
        limit, size = self.ppo.max_iterations, self.ppo.rollout_batch_size
        return Passes(self.ppo.prompt_epochs, None if limit is None else limit * size)

    @property
    def tokenizer(self) -> TokenizerConfig:
        """Token ids go from pool to pool: all speak the actor's."""
        return TokenizerConfig()

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        if self.model.name is None:
            raise ValueError("model.name is unset; name the model that medgpt sft wrote")
        if self.reward.score_weight and self.reward.model is None:
            raise ValueError(
                "reward.model is unset; name the model that medgpt reward wrote, or set "
                "reward.score_weight=0 to do without"
            )
        if self.model.lora.dropout or self.critic.lora.dropout:
            raise ValueError(
                "lora.dropout must be 0 here: the old and the new probability of a token would "
                "differ by chance"
            )
        if self.pools.reference_in_actor and not self.model.lora.rank:
            raise ValueError(
                "pools.reference_in_actor=true needs adapters that can be switched off; set "
                "model.lora.rank, or leave the reference its pool"
            )
        return self

    @model_validator(mode="after")
    def _check_rollout_offload(self) -> Self:
        if self.pools.rollout.offload and self.rollout.engine == "vllm":
            raise ValueError(
                "pools.rollout.offload=true: vLLM keeps weights, keys and values on its GPU; set "
                "false and give the rollout pool GPUs of its own, or set rollout.engine=hf"
            )
        return self

    @model_validator(mode="after")
    def _check_batch_sizes(self) -> Self:
        ppo = self.ppo
        for role in ROLES:
            workers = self.pools.role(role).num_workers
            learns = role in ("actor", "critic")
            key = "global_batch_size" if learns else "rollout_batch_size"
            size = ppo.global_batch_size if learns else ppo.rollout_batch_size
            if size < workers:
                raise ValueError(
                    f"ppo.{key}={size} leaves some of pools.{role}.num_workers={workers} without "
                    "work; raise the first or lower the second"
                )
        return self
