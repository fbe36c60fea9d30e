"""Add, load and merge low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685)."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from medgpt.config.base import ConfigError
from medgpt.config.model import LoraConfig
from medgpt.models import quantize
from medgpt.models.fetch import local_copy
from medgpt.models.model_files import (
    ADAPTER_CONFIG_NAME,
    AdapterBase,
    adapter_base,
    has_adapters,
    read_hf_config,
    resolve_model_folder,
)
from medgpt.models.packed import SequenceDropout
from medgpt.models.rope import scale_rope
from medgpt.models.stops import set_stops
from medgpt.models.tokenizer import load_tokenizer
from medgpt.models.vocabulary_change import replace_vocabulary
from medgpt.models.weight_layout import ModuleWeight

_ADAPTER = "default"  # peft's default name
_EXPERT_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
_ROUTERS = ("gate", "router")  # choose experts; adapted only if config.targets names them


def apply_lora(
    model: PreTrainedModel,
    config: LoraConfig,
    *,
    new_token_ids: Sequence[int] = (),
    head: str | None = None,
) -> peft.PeftModel:
    """Freeze `model` and add adapters; the module `head` and the new tokens' embeddings train too.

    Raises ConfigError if no linear layer has a name in config.targets.
    """
    settings = peft_config(model, config, new_token_ids=new_token_ids, head=head)
    adapted = peft.PeftModel(model, settings)
    if config.dropout:
        layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
        for number, layer in enumerate(layers):
            layer.lora_dropout["default"] = SequenceDropout(config.dropout, number)
    return adapted


def peft_config(
    model: PreTrainedModel,
    config: LoraConfig,
    *,
    new_token_ids: Sequence[int] = (),
    head: str | None = None,
) -> peft.LoraConfig:
    """Return peft's config of the same adapters, without dropout; raises the same error."""
    modules, parameters = _targets(model, config, head)
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  # any number works
        target_modules=modules,
        target_parameters=parameters,
        use_rslora=config.rslora,
        use_dora=config.dora,
        trainable_token_indices=_embedding_rows(model, list(new_token_ids)),
        modules_to_save=None if head is None else [head],
        task_type=None if head is None else peft.TaskType.SEQ_CLS,  # all-linear then skips the head
    )


def load_merged(
    folder: Path, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load an adapter folder; return its base model with the adapters merged, and the tokenizer.

    The weights of a base that was quantized are dequantized to fp32.

    Raises ConfigError if the base model does not exist any more.
    """
    key = f"{folder / ADAPTER_CONFIG_NAME}: base_model_name_or_path"
    base = local_copy(adapter_base(folder), key)
    if Path(base).is_absolute() and not Path(base).exists():
        raise ConfigError(
            f"{key}={base} does not exist; restore the base model or set the key to its new path"
        )
    model, base_tokenizer = _load_base_model(base, AdapterBase.read(folder), trust_remote_code)
    tokenizer = load_tokenizer(str(folder), trust_remote_code)
    if tokenizer.get_vocab() != base_tokenizer.get_vocab():
        replace_vocabulary(model, base_tokenizer, tokenizer)
    adapted = peft.PeftModel.from_pretrained(model, str(folder))
    merged = adapted.merge_and_unload()  # pyright: ignore[reportCallIssue]
    set_stops(merged, tokenizer)
    return merged, tokenizer


def merged_weights(model: PreTrainedModel | peft.PeftModel) -> Iterator[ModuleWeight]:
    """Yield the weights of `model` with adapters merged, under their Hugging Face names.

    Includes persistent buffers. Tied weights come once, under their first name.
    """
    base = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    seen: set[int] = set()
    for key, tensor in base.state_dict(keep_vars=True).items():
        adapters = _adapters_above(base, key)
        name = key.replace(".base_layer", "").replace(".token_adapter", "")
        leaf = key.rpartition(".")[2]
        if id(tensor) in seen or any(f"{path}.base_layer." not in key for path in adapters):
            continue
        seen.add(id(tensor))
        for layer in adapters.values():
            if isinstance(layer, TrainableTokensLayer):
                sources = [tensor, layer.trainable_tokens_delta[_ADAPTER]]
                yield ModuleWeight(name, sources, partial(layer.get_merged_weights, [_ADAPTER]))
                break
            if leaf == (layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"):
                assert isinstance(layer, LoraLinear | ParamWrapper), type(layer)
                sources = [tensor, layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight]
                if layer.use_dora.get(_ADAPTER):
                    sources.append(layer.lora_magnitude_vector[_ADAPTER].weight)
                yield ModuleWeight(name, sources, partial(_merged_weight, layer, leaf))
                break
        else:
            yield ModuleWeight(name, [tensor], tensor.detach)


def _merged_weight(layer: LoraLinear | ParamWrapper, name: str) -> Tensor:
    """Return the merged weight as peft computes it, without changing the layer."""
    weight = layer.get_base_layer().get_parameter(name)
    delta = layer.get_delta_weight(_ADAPTER).to(weight.dtype)
    if not layer.use_dora.get(_ADAPTER):
        return weight + delta
    lengths: Any = layer.lora_magnitude_vector[_ADAPTER]  # of the rows
    norms = lengths.get_weight_norm(weight, delta, scaling=1)
    return (lengths.weight / norms).to(weight.dtype)[:, None] * (weight + delta)


def _adapters_above(model: nn.Module, key: str) -> dict[str, nn.Module]:
    """Return the adapters that contain the weight `key` by path, outermost first."""
    adapters, path = {}, ""
    for name in key.split(".")[:-1]:
        path = f"{path}.{name}".removeprefix(".")
        module = model.get_submodule(path)
        if isinstance(module, LoraLayer | TrainableTokensLayer):
            adapters[path] = module
    return adapters


def _load_base_model(
    name: str, changes: AdapterBase, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    if has_adapters(name):  # adapters trained on top of adapters
        return load_merged(Path(name), trust_remote_code=trust_remote_code)
    folder = resolve_model_folder(name)
    hf_config = read_hf_config(folder, name, trust_remote_code)
    if changes.rope_scaling is not None:
        scale_rope(hf_config, changes.rope_scaling, name)
    architectures = hf_config.architectures or []
    masked = any(architecture.endswith("ForMaskedLM") for architecture in architectures)
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    options: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": trust_remote_code}
    dtype = "auto" if changes.quantize is None else torch.float32
    model = auto.from_pretrained(folder, config=deepcopy(hf_config), dtype=dtype, **options)
    if changes.quantize is not None:
        compute_dtype = getattr(torch, changes.dtype)
        options |= quantize.loading_options(changes.quantize, compute_dtype)
        quantized = auto.from_pretrained(folder, config=hf_config, dtype=compute_dtype, **options)
        quantize.copy_dequantized(quantized, model)
    return model, load_tokenizer(name, trust_remote_code)


def _targets(
    model: PreTrainedModel, config: LoraConfig, head: str | None
) -> tuple[list[str] | str, list[str] | None]:
    """Return the names of linear layers and of parameters that get adapters, as peft takes them.

    A layer's experts are one parameter, `gate_up_proj` or `down_proj`, in a module `experts`.
    """
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    ]
    experts = [
        name
        for name, _ in model.named_parameters()
        if name.split(".")[-2:-1] == ["experts"] and name.endswith(_EXPERT_PROJECTIONS)
    ]
    names = {name.rpartition(".")[2] for name in (*linear, *experts)} - {head}
    if unknown := set(config.targets) - names:
        raise ConfigError(
            f"model.lora.targets={sorted(unknown)}: the model has no such linear layer; choose "
            f"from {', '.join(sorted(names))}"
        )
    if not experts:
        return list(config.targets) or "all-linear", None
    wanted = set(config.targets) or names - set(_ROUTERS)
    # peft would take these linear layers for experts, so they are named by their parameter
    likes = {name for name in linear if name.endswith((*_EXPERT_PROJECTIONS, "gate_proj"))}
    parameters = {
        f"{'.'.join(name.split('.')[-2:])}{'.weight' if name in likes else ''}"
        for name in (*likes, *experts)
        if name.rpartition(".")[2] in wanted
    }
    if parameters and config.dora:
        raise ConfigError(
            "model.lora.dora=true cannot reach the experts of this model; set false, or set "
            "model.lora.targets to layers of its attention"
        )
    if parameters and config.dropout:
        raise ConfigError(
            f"model.lora.dropout={config.dropout} cannot reach the experts of this model; set 0, "
            "or set model.lora.targets to layers of its attention"
        )
    modules = {name.rpartition(".")[2] for name in linear if name not in likes} & wanted
    return sorted(modules), sorted(parameters) or None


def _embedding_rows(model: PreTrainedModel, ids: list[int]) -> dict[str, list[int]] | None:
    """Map the input embedding and, unless tied, the output embedding to the same rows."""
    if not ids:
        return None
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = outputs is None or outputs.weight is inputs.weight
    wanted = [inputs] if tied else [inputs, outputs]
    return {
        name: ids
        for name, module in model.named_modules()
        if any(module is embedding for embedding in wanted)
    }
