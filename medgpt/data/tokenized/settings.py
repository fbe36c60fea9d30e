"""The settings under [data] that decide what the shards contain, as manifests record them."""

from typing import Any

from pydantic import ValidationError

from medgpt.config.data import DataConfig

IGNORED_SETTINGS = {"max_malformed_share": True, "sources": {"__all__": {"weight"}}}


def tokenization_settings(config: DataConfig) -> dict[str, Any]:
    """Return the settings that affect the content of the shards."""
    settings = config.model_dump(mode="json", exclude=IGNORED_SETTINGS)
    for source in settings["sources"]:
        source["licence"] = source.pop("license")  # as manifests of earlier versions spell it
    return settings


def with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in a manifest with the defaults of keys that are newer than it."""
    sources = [{**source, "license": source["licence"]} for source in settings["sources"]]
    for source in sources:
        del source["licence"]
    try:
        config = DataConfig.model_validate({**settings, "sources": sources})
    except ValidationError:  # a newer version wrote the manifest
        return settings
    return tokenization_settings(config)
