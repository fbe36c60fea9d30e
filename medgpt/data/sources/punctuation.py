"""Chinese and ASCII punctuation, one for the other."""

# by code point: comma, question mark, semicolon, exclamation mark, colon, parentheses
FULL_WIDTH = {ord(c): chr(ord(c) + 0xFEE0) for c in ",?;!:()"}
HALF_WIDTH = {ord(full): chr(half) for half, full in FULL_WIDTH.items()}


def full_width(text: str) -> str:
    return text.translate(FULL_WIDTH)


def half_width(text: str) -> str:
    return text.translate(HALF_WIDTH)
