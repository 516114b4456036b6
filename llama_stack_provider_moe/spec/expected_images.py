"""The images that a plan counts on in rows that nobody has read."""

import re

from llama_stack_provider_moe.errors import InvalidInput

IMAGE_SIZE = "1024x1024"
MOST_IMAGES, MOST_SIDE = 100, 20_000
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


def sides_of(text: str) -> tuple[int, int]:
    """Return width and height of a size such as `1024x768`.

    Raises:
        InvalidInput: it is not a size, or no image has it.

    >>> sides_of("1024x768")
    (1024, 768)
    """
    found = _SIZE.fullmatch(text.strip().lower())
    sides = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= min(sides) <= max(sides) <= MOST_SIDE:
        raise InvalidInput("--image-size", text, f"width x height in pixels, each 1 to {MOST_SIDE:,}, such as 1024x768")
    return sides
