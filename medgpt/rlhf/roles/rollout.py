"""The rollout role: samples responses with the weights that the actor sent last."""

import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from medgpt.config.base import ConfigError
from medgpt.config.ppo import PPOStageConfig
from medgpt.data.tokenized.chat_template import stop_token_ids
from medgpt.models.decode import GeneratedResponse, TokenGenerator
from medgpt.models.generate import load_for_generation
from medgpt.models.load import compute_dtype
from medgpt.models.model_files import resolve_model_folder
from medgpt.models.tokenizer import load_tokenizer
from medgpt.rlhf.batching import split_by_length
from medgpt.rlhf.roles.common import FrozenRole, initial_device, role_device
from medgpt.rlhf.rollout_batch import NO_VERSION, Prompts, Ragged, Sequences, sample_seeds
from medgpt.rlhf.weight_sync.process_group import SyncState


class StaleWeights(RuntimeError):
    """A rollout worker does not hold the requested weight version."""


class RolloutEngine(Protocol):
    """Interface of a sampling engine: token ids in; token ids and log-probabilities out."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        stop_token_ids: Sequence[int],
    ) -> list[GeneratedResponse]: ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load some of the weights, by Hugging Face name."""
        ...

    def weights_loaded(self) -> None:
        """Called after the last weights; drops caches of the old ones. Raises ValueError if some
        are missing."""
        ...


class Rollout(FrozenRole):
    """One rank of the rollout pool; every rank holds the full model."""

    def __init__(self, config: PPOStageConfig) -> None:
        assert config.model.name is not None
        self.config = config
        self.folder = str(resolve_model_folder(config.model.name))
        tokenizer = load_tokenizer(self.folder, config.model.trust_remote_code)
        self.stop_ids = stop_token_ids(tokenizer)
        self.engine: RolloutEngine = build_engine(config, self.folder)
        self.weight_version, self.sync = NO_VERSION, SyncState()

    def generate(
        self, prompts: Prompts, iteration: int, weight_version: int | None = None
    ) -> Sequences:
        """Sample this rank's share of the responses. The noise is a function of seed, iteration,
        sample id and the number of earlier repeats of the sample in the batch.

        Args:
            weight_version: version to sample with; None accepts any.

        Raises:
            StaleWeights: this worker holds another version.
        """
        if weight_version not in (None, self.weight_version):
            own_version = self.weight_version
            raise StaleWeights(
                f"rollout rank {dist.get_rank()} has "
                f"{'no full version' if own_version == NO_VERSION else f'version {own_version}'} "
                f"of the weights, not version {weight_version}; sync weights before "
                "rollouts"
            )
        seeds = sample_seeds(self.config.run.seed, iteration, prompts.sample_ids)
        config = self.config.rollout
        return self._generate(
            prompts.ids, prompts.sample_ids, seeds, config.max_new_tokens, config.temperature
        )

    def generate_greedy(self, prompts: Ragged, max_new_tokens: int) -> Sequences:
        """Decode this rank's share greedily; sample ids are the row numbers."""
        ids = [str(i) for i in range(len(prompts))]
        return self._generate(prompts, ids, [0] * len(prompts), max_new_tokens, 0.0)

    def _generate(
        self,
        prompts: Ragged,
        sample_ids: Sequence[str],
        seeds: Sequence[int],
        max_new_tokens: int,
        temperature: float,
    ) -> Sequences:
        lengths = prompts.lengths + max_new_tokens  # the cost of a row includes its response
        local_rows = split_by_length(lengths, dist.get_world_size())[dist.get_rank()]
        generated = self.engine.generate(
            [prompts.row(i).tolist() for i in local_rows],
            [seeds[i] for i in local_rows],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop_token_ids=self.stop_ids,
        )
        return Sequences(
            index=local_rows,
            sample_ids=[sample_ids[int(i)] for i in local_rows],
            prompts=prompts.take(local_rows),
            responses=Ragged.from_rows([row.ids for row in generated], np.int32),
            logprobs=Ragged.from_rows([row.logprobs for row in generated], np.float32).values,
            finished=np.array([row.finished for row in generated], np.bool_),
            weight_version=self.weight_version,
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load some of the actor's weights, by Hugging Face name."""
        self.weight_version = NO_VERSION  # a mixture until all weights are loaded
        self.engine.load_weights(weights)

    def weights_loaded(self, version: int) -> None:
        """Called after the last weights of `version`."""
        self.engine.weights_loaded()
        self.weight_version = version

    def modules(self) -> list[Any]:
        assert isinstance(self.engine, HuggingFaceEngine)  # the config allows no other engine here
        return [self.engine.model]


class HuggingFaceEngine:
    """medgpt's decode loop with the Hugging Face model in `folder`."""

    def __init__(
        self,
        folder: str,
        device: torch.device,
        *,
        dtype: torch.dtype,
        batch_tokens: int,
        trust_remote_code: bool = False,
    ) -> None:
        self.model: Any = load_for_generation(
            folder, device, dtype=dtype, trust_remote_code=trust_remote_code
        )[0].requires_grad_(False)
        self.generate = TokenGenerator(self.model, batch_tokens=batch_tokens).generate
        self.received: set[int] = set()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        parameters = self.model.state_dict(keep_vars=True)  # tied weights under both names
        for name, weight in weights:
            parameters[name].copy_(weight)
            self.received.add(id(parameters[name]))

    def weights_loaded(self) -> None:
        missing = [name for name, p in self.model.named_parameters() if id(p) not in self.received]
        self.received.clear()
        if missing:
            raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")


def build_engine(config: PPOStageConfig, folder: str) -> RolloutEngine:
    """Return the engine that the config names."""
    dtype = compute_dtype(config.pools.rollout.precision, role_device().type)
    if config.rollout.engine == "hf":
        return HuggingFaceEngine(
            folder,
            initial_device(config.pools.rollout),
            dtype=dtype,
            batch_tokens=config.rollout.batch_tokens,
            trust_remote_code=config.model.trust_remote_code,
        )
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollout.engine=vllm needs the package vllm where the rollout pool runs; install "
            "medgpt[vllm] there, or set hf"
        )
    from medgpt.rlhf.vllm_engine import VllmEngine  # optional dependency

    return VllmEngine(
        folder,
        dtype=dtype,
        config=config.rollout,
        trust_remote_code=config.model.trust_remote_code,
    )
