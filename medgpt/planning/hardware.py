"""The cluster to plan for: a Ray cluster definition and a file with prices and devices."""

import math
import tomllib
from collections.abc import Mapping
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
    price_per_hour: float | None
    """None: unknown."""

    @property
    def num_gpus(self) -> float:
        return self.resources.get("GPU", 0)

    @property
    def num_cpus(self) -> float:
        return self.resources.get("CPU", 0)

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
            f"{key}: has no section {NODE_TYPES_KEY}; name a Ray cluster "
            "definition, as clusters/aws.yaml"
        )
    head = tree.get("head_node_type")
    if head not in node_types:
        raise ConfigError(
            f"{key}: head_node_type={head} is none of {NODE_TYPES_KEY}: {', '.join(node_types)}"
        )
    hardware_file = _read_hardware(hardware, path)
    devices = load_known_devices() | hardware_file.devices
    prices = (tree.get("metadata") or {}).get(PRICES_KEY) or {}
    for where, names in (
        ("--hardware: nodes", hardware_file.nodes),
        (f"{key}: metadata.{PRICES_KEY}", prices),
    ):
        for name in names:
            if name not in node_types:
                raise ConfigError(
                    f"{where}.{name} is no node type of the cluster; known: {', '.join(node_types)}"
                )
    max_workers = tree.get("max_workers", math.inf)
    types = {
        name: _node_type(
            name,
            section,
            key,
            max_workers=max_workers,
            hardware=hardware_file.nodes.get(name, NodeHardware()),
            price=prices.get(name),
            devices=devices,
        )
        for name, section in node_types.items()
    }
    return PlannedCluster(
        file=str(path),
        head=types[head],
        workers=tuple(node for name, node in types.items() if name != head and node.max_nodes),
        max_workers=max_workers,
        currency=hardware_file.currency,
    )


def _read_yaml(path: Path, key: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{key}: cannot be read ({error.strerror}); see clusters/") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: is not YAML: {str(error).splitlines()[0]}") from None
    return tree if isinstance(tree, dict) else {}


def _read_hardware(path: Path | None, cluster: Path) -> HardwareFile:
    chosen = cluster.with_suffix(".toml") if path is None else path
    if path is None and not chosen.exists():
        return HardwareFile()
    key = f"--hardware={chosen}"
    try:
        return validate(HardwareFile, tomllib.loads(chosen.read_text("utf-8")))
    except OSError as error:
        raise ConfigError(f"{key}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: is not TOML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def load_known_devices() -> dict[str, Device]:
    """Return the devices that ship with medgpt, by name."""
    text = files("medgpt.planning").joinpath("devices.toml").read_text("utf-8")
    return validate(HardwareFile, tomllib.loads(text)).devices


def _node_type(
    name: str,
    section: Any,
    key: str,
    *,
    max_workers: float,
    hardware: NodeHardware,
    price: float | None,
    devices: Mapping[str, Device],
) -> NodeType:
    resources = section.get("resources") if isinstance(section, dict) else None
    if not resources or "CPU" not in resources:
        raise ConfigError(
            f"{key}: {NODE_TYPES_KEY}.{name} has no resources; write them, as "
            "resources: {CPU: 8, GPU: 1}"
        )
    labels = section.get("labels") or {}
    device = hardware.device or _device_name(resources, labels)
    if device not in devices:
        raise ConfigError(
            f"{NODE_TYPES_KEY}.{name}: device {device} is unknown; describe it as "
            f"[devices.{device}] in the hardware file, or set nodes.{name}.device to one "
            f"of {', '.join(devices)}"
        )
    return NodeType(
        name=name,
        resources={key: float(amount) for key, amount in resources.items()},
        labels=labels,
        min_nodes=section.get("min_workers", 0),
        max_nodes=section.get("max_workers", max_workers),
        device=devices[device],
        device_name=device,
        hardware=hardware,
        price_per_hour=price if hardware.price_per_hour is None else hardware.price_per_hour,
    )


def _device_name(resources: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """Return the GPU named by Ray's label or resource, else GPU; CPU for a node without GPUs."""
    if not resources.get("GPU"):
        return CPU_DEVICE
    names = [key.removeprefix(ACCELERATOR_RESOURCE) for key in resources]
    names = [name for key, name in zip(resources, names, strict=True) if name != key]
    return labels.get(ACCELERATOR_LABEL) or (names[0] if names else "GPU")
