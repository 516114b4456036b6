"""The arguments of a tool call -> one JSON object, read so that no two readers can differ about it.

RFC 8259 leaves open what a repeated key or a huge number means, and Python's reader accepts NaN. A tool that reads the
text with another library than the guard could then run something else than what was checked, so all of it is refused.
"""

import json
import math
from typing import NoReturn

from llama_stack_provider_moe.shields.lookalikes import skeleton

MAX_CHARACTERS = 1_000_000  # of the arguments of one call
MAX_VALUES = 2_000  # keeps the slowest check, `uniqueItems`, below a second
MAX_DEPTH = 32
MAX_DIGITS = 20  # of an integer: those of 64 bits


class NotStrict(ValueError):
    """A text is no strict JSON object.

    Args:
        code: what is wrong, in a word that programs read.
        reason: the same for a person, without the text.
    """

    def __init__(self, code: str, reason: str) -> None:
        self.code = code
        self.reason = reason
        super().__init__(reason)


def parsed(text: str) -> dict[str, object]:
    """Return the object.

    Raises:
        NotStrict: the text is no JSON object, or one that readers may read differently, or too large.
    """
    if len(text) > MAX_CHARACTERS:
        raise NotStrict("too_large", f"the arguments have more than {MAX_CHARACTERS:,} characters")
    if text.count("[") + text.count("{") + text.count(",") > 8 * MAX_VALUES:  # texts may contain some of them
        raise NotStrict("too_large", f"the arguments have more than {MAX_VALUES:,} values")
    try:
        found = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_integer
        )
    except NotStrict:
        raise
    except RecursionError:
        raise NotStrict("too_deep", f"the arguments are nested more than {MAX_DEPTH} levels deep") from None
    except ValueError:
        raise NotStrict("not_json", "the arguments are not JSON") from None
    if not isinstance(found, dict):
        raise NotStrict("not_object", "the arguments are JSON, but not an object")
    _check(found)
    return found


def count(content: object) -> int:
    """Return how many values a content has, itself and keys included."""
    if isinstance(content, dict):
        return 1 + len(content) + sum(map(count, content.values()))
    return 1 + sum(map(count, content)) if isinstance(content, list) else 1


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise NotStrict("duplicate_key", "a key is given twice in one object")
    if len({skeleton(key) for key in found}) < len(found):
        raise NotStrict("lookalike_key", "two keys of one object look alike")
    return found


def _constant(name: str) -> NoReturn:
    raise NotStrict("not_json", f"{name} is not a JSON value")


def _float(text: str) -> float:
    found = float(text)
    if not math.isfinite(found):
        raise NotStrict("huge_number", "a number is too large")
    return found


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise NotStrict("huge_number", f"an integer has more than {MAX_DIGITS} characters")
    return int(text)


def _check(content: dict[str, object]) -> None:
    level: list[object] = [content]
    seen = depth = 0
    while level:
        seen += len(level)
        if seen > MAX_VALUES:
            raise NotStrict("too_large", f"the arguments have more than {MAX_VALUES:,} values")
        if depth > MAX_DEPTH:
            raise NotStrict("too_deep", f"the arguments are nested more than {MAX_DEPTH} levels deep")
        below: list[object] = []
        for each in level:
            if isinstance(each, dict):
                below.extend(each)  # its keys, which are text as well
                below.extend(each.values())
            elif isinstance(each, list):
                below.extend(each)
            elif isinstance(each, str):
                _check_text(each)
        level, depth = below, depth + 1


def _check_text(text: str) -> None:
    if "\0" in text:
        raise NotStrict("null_byte", "a text holds a null byte, at which programs in C stop reading")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise NotStrict("not_text", "a text holds half of a surrogate pair") from None
