"""Converts between Chinese (full-width) and ASCII (half-width) punctuation."""

# full-width forms are 0xFEE0 code points above ASCII
FULL_WIDTH = {ord(c): chr(ord(c) + 0xFEE0) for c in ",?;!:()"}
HALF_WIDTH = {ord(full): chr(half) for half, full in FULL_WIDTH.items()}


def full_width(text: str) -> str:
    return text.translate(FULL_WIDTH)


def half_width(text: str) -> str:
    return text.translate(HALF_WIDTH)
