"""The cluster to plan for: a Ray cluster definition and a file with prices and devices."""

import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import yaml
from annotated_types import Ge, Gt
from pydantic import Field

from medgpt.cluster.capacity import NodeGroup
from medgpt.config.base import Config, ConfigError
from medgpt.config.loading import validate

Positive = Annotated[float, Gt(0)]
CPU_DEVICE = "CPU"  # the device of a node without GPUs is one CPU core
ACCELERATOR_LABEL = "ray.io/accelerator-type"
ACCELERATOR_RESOURCE = "accelerator_type:"
NODE_TYPES_KEY, PRICES_KEY = "available_node_types", "usd_per_hour"


class Device(Config):
    """A GPU, or one CPU core."""

    memory_gb: Positive | None = None
    """GiB available to a program; unset for a CPU, which uses the memory of its node."""
    tflops: Positive
    """Peak of dense products in 1e12 FLOP/s, in bf16 for a GPU and fp32 for a CPU."""
    memory_gb_per_s: Positive
    """Memory bandwidth in 1e9 bytes/s."""
    link_gb_per_s: Positive
    """Bandwidth to another device of its node in 1e9 bytes/s."""
    source: str
    """Source of the numbers."""


class NodeHardware(Config):
    """Facts about a node type that Ray does not know."""

    device: str | None = None
    """Name of the device; default: the GPU in Ray's label or resource, else CPU."""
    price_per_hour: Annotated[float, Ge(0)] | None = None
    """Price of one node; default: metadata.usd_per_hour of the cluster definition."""
    memory_gb: Positive | None = None
    """Host memory in GiB; default: Ray's resource `memory`."""
    network_gb_per_s: Positive | None = None
    """Network bandwidth of the node in 1e9 bytes/s; default: 1.25 (10 Gbit/s)."""


class HardwareFile(Config):
    """Contents of a hardware file."""

    currency: str = "USD"
    """Currency of the prices."""
    nodes: dict[str, NodeHardware] = Field(default={})
    """Facts by node type of the cluster definition."""
    devices: dict[str, Device] = Field(default={})
    """Devices that extend or replace those in devices.toml."""


DEFAULT_NETWORK_GB_PER_S = 1.25


@dataclass(frozen=True, kw_only=True)
class NodeType:
    """A node type that the autoscaler may launch."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    min_nodes: int
    max_nodes: float
    device: Device
    device_name: str
    hardware: NodeHardware

    @property
    def price_per_hour(self) -> float | None:
        return self.hardware.price_per_hour

    @property
    def host_gb(self) -> float | None:
        """Memory of the node in GiB; None if unknown."""
        known = self.resources.get("memory")
        return self.hardware.memory_gb or (known / 2**30 if known else None)

    @property
    def network_gb_per_s(self) -> float:
        return self.hardware.network_gb_per_s or DEFAULT_NETWORK_GB_PER_S

    def to_node_group(self) -> NodeGroup:
        resources = {name: n for name, n in self.resources.items() if "memory" not in name}
        return NodeGroup(resources, self.labels, self.max_nodes)


@dataclass(frozen=True, kw_only=True)
class PlannedCluster:
    """The nodes that a plan may use."""

    file: str
    head: NodeType
    workers: tuple[NodeType, ...]
    max_workers: float
    """Maximum number of nodes of all types together, without the head."""
    currency: str


def read_cluster(path: Path, hardware: Path | None) -> PlannedCluster:
    """Read a Ray cluster definition.

    Args:
        hardware: the hardware file; None: the file beside `path` with the suffix .toml, if it
            exists.

    Raises:
        ConfigError: a file is missing or invalid.
    """
    key = f"--cluster={path}"
    tree = _read_yaml(path, key)
    node_types = tree.get(NODE_TYPES_KEY)
    if not isinstance(node_types, dict) or not node_types:
        raise ConfigError(
            f"{key} has no section {NODE_TYPES_KEY}; name a Ray cluster "
            "definition, as clusters/aws.yaml"
        )
    head = tree.get("head_node_type")
    if head not in node_types:
        raise ConfigError(
            f"{key}: head_node_type={head} is none of {NODE_TYPES_KEY}: {', '.join(node_types)}"
        )
    hardware_file = _read_hardware(hardware, path)
    prices = (tree.get("metadata") or {}).get(PRICES_KEY) or {}
    for place, names in (
        ("--hardware: nodes", hardware_file.nodes),
        (f"{key}: metadata.{PRICES_KEY}", prices),
    ):
        if unknown := [name for name in names if name not in node_types]:
            raise ConfigError(
                f"{place}.{unknown[0]} is no node type of the cluster; known: "
                f"{', '.join(node_types)}"
            )
    max_workers = tree.get("max_workers", math.inf)
    devices = load_known_devices() | hardware_file.devices
    types = {}
    for name, section in node_types.items():
        facts = hardware_file.nodes.get(name, NodeHardware())
        if facts.price_per_hour is None:
            facts = facts.model_copy(update={"price_per_hour": prices.get(name)})
        key_of_type = f"{key}: {NODE_TYPES_KEY}.{name}"
        types[name] = _node_type(name, section, key_of_type, facts, devices, max_workers)
    return PlannedCluster(
        file=str(path),
        head=types[head],
        workers=tuple(node for name, node in types.items() if name != head and node.max_nodes),
        max_workers=max_workers,
        currency=hardware_file.currency,
    )


def _read_yaml(path: Path, key: str) -> dict[str, Any]:
    tree = _parse_file(path, key, yaml.safe_load, "YAML")
    return tree if isinstance(tree, dict) else {}


def _read_hardware(path: Path | None, cluster: Path) -> HardwareFile:
    chosen = cluster.with_suffix(".toml") if path is None else path
    if path is None and not chosen.exists():
        return HardwareFile()
    key = f"--hardware={chosen}"
    tree = _parse_file(chosen, key, tomllib.loads, "TOML")
    try:
        return validate(HardwareFile, tree)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def _parse_file(path: Path, key: str, parse: Callable[[str], Any], file_format: str) -> Any:
    try:
        return parse(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{key} cannot be read ({error.strerror}); see clusters/") from None
    except (yaml.YAMLError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{key} is not {file_format}: {reason}") from None


def load_known_devices() -> dict[str, Device]:
    """Return the devices that ship with medgpt, by name."""
    text = files("medgpt.planning").joinpath("devices.toml").read_text("utf-8")
    return validate(HardwareFile, tomllib.loads(text)).devices


def _node_type(
    name: str,
    section: Any,
    key: str,
    hardware: NodeHardware,
    devices: Mapping[str, Device],
    max_workers: float,
) -> NodeType:
    """Raise ConfigError if the section has no resources or its device is unknown."""
    resources = section.get("resources") if isinstance(section, dict) else None
    if not resources or "CPU" not in resources:
        raise ConfigError(f"{key} has no resources; write them, as resources: {{CPU: 8, GPU: 1}}")
    labels = section.get("labels") or {}
    device = hardware.device or _device_name(resources, labels)
    if device not in devices:
        raise ConfigError(
            f"{key}: device {device} is unknown; describe it as [devices.{device}] in the hardware "
            f"file, or set nodes.{name}.device to one of {', '.join(devices)}"
        )
    return NodeType(
        name=name,
        resources={resource: float(amount) for resource, amount in resources.items()},
        labels=labels,
        min_nodes=section.get("min_workers", 0),
        max_nodes=section.get("max_workers", max_workers),
        device=devices[device],
        device_name=device,
        hardware=hardware,
    )


def _device_name(resources: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """Return the GPU named by Ray's label or resource, else GPU; CPU for a node without GPUs."""
    if not resources.get("GPU"):
        return CPU_DEVICE
    prefix = ACCELERATOR_RESOURCE
    names = (key.removeprefix(prefix) for key in resources if key.startswith(prefix))
    return labels.get(ACCELERATOR_LABEL) or next(names, "GPU")
