"""Configuration of medgpt: one frozen pydantic model per section, one root model per stage.

`medgpt.config.loading.load` reads a TOML file, applies `section.key=value` overrides and rejects
unknown keys and wrong values, so that a typing error stops a job on the laptop and not on a
cluster. Neither torch nor Ray is imported here.
"""
