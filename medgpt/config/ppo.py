"""Configuration of `medgpt ppo`: the sections of the algorithm and the root of its stage."""

from typing import Annotated, ClassVar, Literal, Self

from annotated_types import Ge, Gt, Le
from pydantic import model_validator

from medgpt.config.base import Config, Count, ModelPath, multiples_near
from medgpt.config.data import DataConfig
from medgpt.config.model import LoraConfig, ModelConfig, Thinking, TokenizerConfig
from medgpt.config.pools import ROLES, PoolsConfig
from medgpt.config.ppo_rewards import DiagnosisConfig, JudgeConfig, PPORewardConfig
from medgpt.config.stages import Passes, RunConfig, SampleKind
from medgpt.config.train import ClusterConfig, OptimizerConfig, Schedule

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]


class PPOConfig(Config):
    """Each iteration samples a rollout batch, scores it and trains on it for `epochs` passes."""

    prompt_epochs: Count = 1
    """Passes over the prompts."""
    max_iterations: Count | None = None
    """Stop after this many iterations; the learning rate schedules are fitted to it."""
    rollout_batch_size: Count = 512
    """Prompts per iteration over all workers; each gets one response."""
    global_batch_size: Count = 128
    """Sequences per optimizer step over all workers."""
    epochs: Count = 1
    """Passes over each rollout batch, each in another order."""
    micro_batch_tokens: Count = 8192
    """Maximum tokens of a forward pass on each worker. A longer sequence gets a pass of its own."""
    async_rollouts: bool = False
    """Sample the next batch during training, with weights that are one iteration old."""
    checkpoint_every: Count = 10
    """Iterations between checkpoints; the last iteration always writes one."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep."""
    log_every: Count = 1
    """Iterations between lines on the console."""
    audit: bool = False
    """Write to audit/ which prompt was trained on in which iteration."""

    kl_coef: NonNegative = 0.05
    """Reward subtracted per nat of divergence from the reference; the initial value if adaptive."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """KL estimator of a token (http://joschu.net/blog/kl-approx.html). As a reward, only k1 has the
    gradient of the reverse KL in expectation; k2 and k3 have less variance but another gradient."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: steer kl_coef towards kl_target (arXiv 1909.08593, section 2.2)."""
    kl_target: Positive = 6.0
    """adaptive: target KL of a whole response, in nats."""
    kl_horizon: Positive = 10000.0
    """adaptive: number of sequences in which the coefficient may change by about a fifth."""
    score_clip: Positive | None = None
    """Clip scores to [-score_clip, score_clip]; unset: no clipping."""
    normalize_scores: bool = False
    """Normalize scores by the running mean and standard deviation of all scores so far."""
    length_penalty: float = 0.0
    """Subtracted from the score for each token of the response."""
    missing_end_penalty: NonNegative = 0.0
    """Subtracted from the score of a response without an end token."""
    gamma: Annotated[float, Gt(0), Le(1)] = 1.0
    """Discount per token."""
    gae_lambda: Annotated[float, Ge(0), Le(1)] = 0.95
    """Trade-off between bias and variance of the advantages; 1 is Monte Carlo."""
    bootstrap_truncated: bool = False
    """Continue truncated responses with the critic's value; false: they end with the last token."""
    whiten_advantages: bool = True
    """Normalize the advantages of a rollout batch to mean 0 and variance 1."""

    clip_range: Annotated[float, Gt(0), Le(1)] = 0.2
    """The policy ratio is clipped to [1 - clip_range, 1 + clip_range]."""
    clip_range_high: Positive | None = None
    """Clip range above 1 (arXiv 2503.14476); unset: clip_range."""
    dual_clip: Annotated[float, Gt(1)] | None = None
    """Maximum loss of a token, in multiples of a negative advantage (arXiv 1912.09729); unset:
    off."""
    target_kl: Positive | None = None
    """End the updates of an iteration above this KL from the old policy, in nats per token."""
    entropy_coef: NonNegative = 0.0
    """Coefficient of the entropy bonus in the policy loss."""
    max_logprob_gap: Positive = 0.01
    """Mean difference of log-probabilities between rollout engine and training, in nats per token,
    above which tokens get truncated importance weights. Async rollouts always use them."""
    max_importance_weight: Annotated[float, Ge(1)] = 2.0
    """Maximum importance weight (arXiv 2505.24034 and others)."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps of a full iteration."""
        return self.epochs * (self.rollout_batch_size // self.global_batch_size)

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        rollout, batch = self.rollout_batch_size, self.global_batch_size
        if rollout % batch:
            raise ValueError(
                f"rollout_batch_size={rollout} must be a multiple of global_batch_size={batch}; "
                f"{multiples_near(rollout, batch)} would do"
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
    """hf: medgpt's decoding loop over the Hugging Face model. vllm: the package of that name."""
    max_new_tokens: Count = 256
    """Maximum tokens of a response."""
    temperature: Positive = 1.0
    """Sampling temperature. Policy, old policy and reference are compared at it, too."""
    thinking: Thinking = "auto"
    """Whether the policy thinks before it answers, where its chat template has a switch. Rewards
    that read text get the text after the thought; a thought that does not end is no answer."""
    thinking_tokens: Count | None = None
    """A thought of more tokens is no answer, either; unset: any thought that ends is accepted."""
    batch_tokens: Count = 65536
    """hf: maximum tokens of a batch, including room for the responses; bounds the KV cache."""
    gpu_memory_share: Annotated[float, Gt(0), Le(1)] = 0.85
    """vllm: share of the memory of a GPU for weights and KV cache."""


class PolicyOptimizerConfig(OptimizerConfig):
    learning_rate: Positive = 1e-6
    """Peak learning rate."""
    schedule: Schedule = "linear"
    """After warm-up: cosine or linear decay to min_lr_ratio; wsd is constant until its final
    decay."""
    min_lr_ratio: Annotated[float, Ge(0), Le(1)] = 0.0
    """Final learning rate, as a share of learning_rate."""
    weight_decay: NonNegative = 0.0
    """AdamW weight decay of matrices; vectors and embeddings are not decayed."""


class ValueOptimizerConfig(PolicyOptimizerConfig):
    learning_rate: Positive = 1e-5
    """Peak learning rate."""


class CriticConfig(Config):
    """The value function."""

    model: ModelPath | None = None
    """Model to start from, with its adapters merged; unset: the reward model, or without one the
    actor's model with a fresh head."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters."""
    optimizer: ValueOptimizerConfig = ValueOptimizerConfig()
    value_clip_range: Positive | None = 0.2
    """Maximum distance of values from their estimates at sampling time; unset: no clipping."""
    warmup_iterations: Annotated[int, Ge(0)] = 0
    """Number of first iterations in which only the critic is trained."""


class PtxConfig(Config):
    """PPO-ptx (arXiv 2203.02155): adds a language modeling loss on conversations to the loss."""

    coef: Positive = 1.0
    """Coefficient of the loss, which is the mean over its tokens."""
    batch_size: Count = 32
    """Rows of `data.max_length` tokens per optimizer step over all workers."""
    data: DataConfig
    """Conversations, as in fine-tuning."""


class PPOReportConfig(Config):
    every: Count = 10
    """Iterations between samples in the report."""
    samples: Annotated[int, Ge(0)] = 4
    """Number of rollouts shown each time, never of a sensitive source."""


class PPOStageConfig(Config):
    """Root config of the PPO stage, as in configs/ppo.toml."""

    run: RunConfig
    model: ModelConfig
    """Model that the actor and the reference start from."""
    data: DataConfig
    """Conversations whose last answers are removed: prompts of at most `max_length` tokens."""
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
        """The actor's own tokenizer, because all pools exchange token ids."""
        return TokenizerConfig()

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        if self.model.name is None:
            raise ValueError("model.name is unset; set it to the model that medgpt sft wrote")
        if self.reward.score_weight and self.reward.model is None:
            raise ValueError(
                "reward.model is unset; set it to the model that medgpt reward wrote, or set "
                "reward.score_weight=0 to train without one"
            )
        if self.model.lora.dropout or self.critic.lora.dropout:
            raise ValueError(
                "lora.dropout must be 0: with dropout the old and the new probability of a "
                "token differ by chance"
            )
        if self.pools.reference_in_actor and not self.model.lora.rank:
            raise ValueError(
                "pools.reference_in_actor=true needs adapters that can be disabled; set "
                "model.lora.rank, or set it to false"
            )
        return self

    @model_validator(mode="after")
    def _check_adapters(self) -> Self:
        remedy = "leave it out, or name the merged result of a fine-tuning that had it"
        if self.model.rope_scaling is not None:
            raise ValueError(
                f"model.rope_scaling: not in PPO, it is a change for all pools; {remedy}"
            )
        for key, lora, role in (
            ("model", self.model.lora, self.pools.actor),
            ("critic", self.critic.lora, self.pools.critic),
        ):
            if lora.quantize:
                raise ValueError(
                    f"{key}.lora.quantize={lora.quantize}: not in PPO, whose pools exchange whole "
                    f"weights; {remedy}"
                )
            if lora.dora and role.engine.zero_stage == 3:
                raise ValueError(
                    f"{key}.lora.dora=true cannot compute with weights that zero_stage=3 "
                    "partitions; set zero_stage=2 in the engine of its pool, or dora to false"
                )
        return self

    @model_validator(mode="after")
    def _check_rollout_offload(self) -> Self:
        if self.pools.rollout.offload and self.rollout.engine == "vllm":
            raise ValueError(
                "pools.rollout.offload=true: vLLM keeps its weights and KV cache on the GPU; set "
                "false and give the rollout pool its own GPUs, or set rollout.engine=hf"
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
                    f"ppo.{key}={size} is less than pools.{role}.num_workers={workers}; raise the "
                    "first or lower the second"
                )
        return self
