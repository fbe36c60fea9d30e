"""Every knob of medgpt: one frozen model per concern, one root per stage.

`load` reads a TOML file, applies `section.key=value` overrides and rejects what it does not
understand, so a mistyped key stops a job on the laptop instead of wasting a cluster. Neither torch
nor ray is imported here.
"""
