"""Every knob of medgpt: one frozen model per concern, one root per stage.

`load` reads a TOML file, applies `section.key=value` overrides and rejects what it does not
understand, so a mistyped key stops a job on the laptop instead of wasting a cluster. Neither torch
nor ray is imported here.
"""

from medgpt.config.base import (
    Config,
    ConfigError,
    Name,
    absolute,
    absolute_model,
    stable_run_dir,
)
from medgpt.config.data import (
    AnswersMapping,
    DataConfig,
    MappingConfig,
    SourceConfig,
    TurnsMapping,
)
from medgpt.config.dpo import DPOConfig, OfflineConfig
from medgpt.config.evaluation import (
    EvalConfig,
    EvalModelConfig,
    McqConfig,
    NllConfig,
    PoolConfig,
)
from medgpt.config.loading import StageConfig, load, read_tree, validate
from medgpt.config.model import (
    ArchitectureConfig,
    LoraConfig,
    ModelConfig,
    TokenizerConfig,
)
from medgpt.config.pools import PoolsConfig, RoleConfig, RoleName, SyncConfig
from medgpt.config.ppo import (
    CriticConfig,
    PPOConfig,
    PPOStageConfig,
    PtxConfig,
    RolloutConfig,
)
from medgpt.config.ppo_rewards import (
    DiagnosisConfig,
    JudgeConfig,
    RewardFunctionConfig,
    RewardsConfig,
)
from medgpt.config.replies import (
    GenerationConfig,
    KeyPointsConfig,
    SafetyConfig,
    TaskConfig,
    TriageConfig,
)
from medgpt.config.reward_model import PreferenceStageConfig, RewardConfig, RewardObjectiveConfig
from medgpt.config.stages import (
    CorpusConfig,
    Passes,
    PipelineConfig,
    PipelineStage,
    PretrainConfig,
    RunConfig,
    Samples,
    SFTConfig,
    TrainStageConfig,
)
from medgpt.config.train import (
    ClusterConfig,
    EngineConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ReportConfig,
    TrainConfig,
)
from medgpt.config.tune import CheckConfig, Params, Space, TuneConfig, TuneStageConfig

__all__ = [
    "AnswersMapping",
    "ArchitectureConfig",
    "CheckConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "CorpusConfig",
    "CriticConfig",
    "DPOConfig",
    "DataConfig",
    "DiagnosisConfig",
    "EngineConfig",
    "EvalConfig",
    "EvalModelConfig",
    "GenerationConfig",
    "JudgeConfig",
    "KeyPointsConfig",
    "LoraConfig",
    "MappingConfig",
    "McqConfig",
    "ModelConfig",
    "Name",
    "NllConfig",
    "ObjectiveConfig",
    "OfflineConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PPOStageConfig",
    "Params",
    "Passes",
    "PipelineConfig",
    "PipelineStage",
    "PoolConfig",
    "PoolsConfig",
    "PreferenceStageConfig",
    "PretrainConfig",
    "PtxConfig",
    "ReportConfig",
    "RewardConfig",
    "RewardFunctionConfig",
    "RewardObjectiveConfig",
    "RewardsConfig",
    "RoleConfig",
    "RoleName",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "SafetyConfig",
    "Samples",
    "SourceConfig",
    "Space",
    "StageConfig",
    "SyncConfig",
    "TaskConfig",
    "TokenizerConfig",
    "TrainConfig",
    "TrainStageConfig",
    "TriageConfig",
    "TuneConfig",
    "TuneStageConfig",
    "TurnsMapping",
    "absolute",
    "absolute_model",
    "load",
    "read_tree",
    "stable_run_dir",
    "validate",
]
