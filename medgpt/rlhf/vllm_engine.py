"""vLLM as a rollout engine, inside the rollout worker's process. Needs the package `vllm`.

Weights enter through vLLM's weight-transfer interface (which handles its fused and repacked
layers), passed in memory. The prefix cache is reset after every sync: it holds keys and values of
the old weights.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from medgpt.config.ppo import RolloutConfig
from medgpt.models.decode import GeneratedResponse

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # run the model in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB of KV cache on a CPU

from vllm import LLM, SamplingParams, TokensPrompt  # pyright: ignore
from vllm.distributed.weight_transfer.base import (  # pyright: ignore
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import (  # pyright: ignore
    WeightTransferEngineFactory,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (  # pyright: ignore
    ParallelLMHead,
)
from vllm.model_executor.model_loader.reload import (  # pyright: ignore
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

IN_MEMORY = "medgpt"


@dataclass
class EmptyInitInfo(WeightTransferInitInfo):
    """Empty: there is no connection to set up."""


@dataclass
class WeightBucket(WeightTransferUpdateInfo):
    """A bucket of weights under their Hugging Face names."""

    weights: list[tuple[str, Tensor]] = field(default_factory=list)


class InMemoryTransferEngine(WeightTransferEngine):
    """Loads weights that the same process passes in."""

    init_info_cls = EmptyInitInfo
    update_info_cls = WeightBucket

    def init_transfer_engine(self, init_info: EmptyInitInfo) -> None:
        """Required by vLLM; there is no connection to set up."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(WeightBucket(**update_info))

    def receive_weights(self, update_info: WeightBucket) -> None:
        self.model.load_weights(update_info.weights)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.model_config.hf_config.tie_word_embeddings:
            for layer in self.model.modules():
                if isinstance(
                    layer, ParallelLMHead
                ):  # no weight of its own was sent: packed copies
                    layer.quant_method.process_weights_after_loading(layer)

    def shutdown(self) -> None:
        """Required by vLLM; there is nothing to close."""


WeightTransferEngineFactory.register_engine(IN_MEMORY, InMemoryTransferEngine)


class VllmEngine:
    """Samples with the model in `folder`, then with the weights loaded last."""

    def __init__(
        self,
        folder: str,
        *,
        dtype: torch.dtype,
        config: RolloutConfig,
        trust_remote_code: bool = False,
    ) -> None:
        self.llm: Any = LLM(
            model=folder,
            dtype=str(dtype).removeprefix("torch."),
            trust_remote_code=trust_remote_code,
            skip_tokenizer_init=True,  # ids in, ids out
            generation_config="vllm",  # not generation_config.json
            logprobs_mode="processed_logprobs",  # after the temperature
            weight_transfer_config={"backend": IN_MEMORY},
            gpu_memory_utilization=config.gpu_memory_share,
            enforce_eager=not torch.cuda.is_available(),
            disable_log_stats=True,
        )
        self.llm.collective_rpc("init_weight_transfer_engine", args=({},))
        self.weight_names = set[str]()
        for file in Path(folder).glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                self.weight_names.update(tensors.keys())
        self.received: set[str] | None = None
        """Names of the weights received by a sync in progress."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        stop_token_ids: Sequence[int],
    ) -> list[GeneratedResponse]:
        """As `TokenGenerator.generate`; the noise is vLLM's, also a function of a row's seed."""
        options: dict[str, Any] = {
            "temperature": temperature,
            "max_tokens": max_new_tokens,
            "stop_token_ids": list(stop_token_ids),
            "ignore_eos": True,  # the ids above are all there are
            "logprobs": 0,  # of the sampled token only
            "detokenize": False,
        }
        outputs = self.llm.generate(
            [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts],
            [SamplingParams(seed=seed, **options) for seed in seeds],
            use_tqdm=False,
        )
        return [_to_generated(output.outputs[0]) for output in outputs]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        if self.received is None:
            self.llm.collective_rpc("start_weight_update")
            self.received = set()
        bucket = list(weights)
        self.llm.collective_rpc("update_weights", args=({"weights": bucket},))
        self.received.update(name for name, _ in bucket)

    def weights_loaded(self) -> None:
        missing = sorted(self.weight_names - (self.received or set()))
        self.received = None
        self.llm.collective_rpc("finish_weight_update")
        self.llm.reset_prefix_cache()
        if missing:
            raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")


def _to_generated(completion: Any) -> GeneratedResponse:
    ids = list(completion.token_ids)
    logprobs = [step[token].logprob for token, step in zip(ids, completion.logprobs, strict=True)]
    return GeneratedResponse(ids, logprobs, completion.finish_reason == "stop")
