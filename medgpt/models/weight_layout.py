"""Convert weights between the layout of files and that of modules, as transformers does.

transformers holds a layer's experts in one tensor where files hold one tensor per expert and
projection, and renames modules while files keep their names. Weights of one layout that together
make weights of the other are a group. Groups are converted one by one, so that no more than one is
in memory.
"""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)


@dataclass(frozen=True)
class ModuleWeight:
    """A weight of a module by its Hugging Face name, with adapters merged if there are any."""

    name: str
    sources: list[Tensor]
    """Parameters or buffers from which it is computed."""
    compute: Callable[[], Tensor]
    """Return the weight. The sources must be gathered; the result may be one of them."""


@dataclass
class WeightGroup:
    """Weights that are converted together."""

    key: str
    """Name of a weight in the other layout."""
    converter: WeightConverter | None
    """None: the group is one weight, which only gets the name `key`."""
    renamings: Sequence[WeightRenaming] = ()
    """Applied to the names that the converter returns."""
    sources: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    """Patterns of the converter that the sources match."""

    def convert(self, tensors: Sequence[Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Return the weights of the other layout; they may share memory with `tensors`.

        Args:
            tensors: one per source, on the same device, which may be "meta".

        Raises ValueError or RuntimeError if the tensors do not fit together.
        """
        if self.converter is None:
            return {self.key: tensors[0]}
        converter: Any = deepcopy(self.converter)  # it collects the tensors
        for source, pattern, tensor in zip(self.sources, self.patterns, tensors, strict=True):
            converter.add_tensor(self.key, source, pattern, tensor)
        converted = converter.convert(self.key, model=model, config=model.config)
        return {
            apply_renamings(name, list(self.renamings)): value[0]
            if isinstance(value, list)
            else value
            for name, value in converted.items()
        }


def groups_in_files(
    model: nn.Module, names: Iterable[str], targets: dict[str, Tensor]
) -> tuple[list[WeightGroup], list[str]]:
    """Group weights of files; also return the names that the model does not need.

    Stores in `model` which conversions the files need, as transformers does: an export undoes them.

    Args:
        names: of the weights in the files.
        targets: weights of the module by name.
    """
    transforms, prefix = [], None
    if isinstance(model, PreTrainedModel):
        transforms, prefix = get_model_conversion_mapping(model), model.base_model_prefix
    renamings, converters = _split(transforms)
    groups: dict[str, WeightGroup] = {}
    unexpected: list[str] = []
    for name in sorted(names, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, targets)
        if key not in targets and name in targets:
            key, pattern = name, None
        if key in targets:
            _add(groups, key, name, pattern, converters)
        else:
            unexpected.append(name)
    if transforms:
        used = [transform for transform in transforms if transform.was_used()]
        vars(model)["_weight_conversions"] = used
    return list(groups.values()), unexpected


def groups_in_module(model: nn.Module, names: Iterable[str]) -> list[WeightGroup]:
    """Group weights of the module for an export.

    The other layout is that of the files from which the model was loaded; if they needed no
    conversion, that of the hub's files.
    """
    transforms = [transform.reverse_transform() for transform in reversed(_conversions(model))]
    renamings, converters = _split(transforms)
    groups: dict[str, WeightGroup] = {}
    for name in sorted(names, key=dot_natural_key):
        key, pattern = apply_converters(name, converters)
        if pattern is None:
            key = apply_renamings(name, renamings)
        _add(groups, key, name, pattern, converters, renamings)
    return list(groups.values())


def prefer_hub_layout(model: PreTrainedModel) -> None:
    """Make save_pretrained write the layout of the hub's files, not that of modules, even if the
    files of `model` have the latter."""
    if not vars(model).get("_weight_conversions"):
        vars(model).pop("_weight_conversions", None)


def _conversions(model: nn.Module) -> list[WeightTransform]:
    """Return the conversions from the layout of files that an export undoes."""
    if not isinstance(model, PreTrainedModel):
        return []
    if used := vars(model).get("_weight_conversions"):
        return used
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    # a prefix that files may have or lack: without files to go by, they lack it
    return [transform for transform in transforms if not isinstance(transform, PrefixChange)]


def _split(
    transforms: Sequence[WeightTransform],
) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    return renamings, [entry for entry in transforms if isinstance(entry, WeightConverter)]


def _add(
    groups: dict[str, WeightGroup],
    key: str,
    name: str,
    pattern: str | None,
    converters: Sequence[WeightConverter],
    renamings: Sequence[WeightRenaming] = (),
) -> None:
    """Add the weight `name`, which matches the converter with `pattern` or none, to its group."""
    converter = next((c for c in converters if pattern in c.source_patterns), None)
    group = groups.setdefault(key, WeightGroup(key, converter, renamings))
    group.sources.append(name)
    group.patterns.append(pattern or name)
