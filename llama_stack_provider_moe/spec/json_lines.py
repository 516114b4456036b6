"""One line of JSON Lines <-> one row, strictly: no key twice, no NaN, no text without a UTF-8 form."""

import json
from collections import Counter
from collections.abc import Mapping

from llama_stack_provider_moe.errors import shorten


def parsed(line: bytes) -> dict[str, object] | str:
    """The object on a line of JSON Lines, or what is wrong with the line."""
    try:
        found: object = _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        return not_text(error)
    except json.JSONDecodeError as error:
        return f"is not JSON ({error.msg.removesuffix(' at')} at character {error.pos + 1})"
    except RecursionError:
        return "is nested too deep"
    except _NotJson as error:
        return f"is not JSON ({error})"
    except ValueError:  # an integer with more digits than Python reads
        return "has a number that is too large"
    if not isinstance(found, dict):
        hint = "; write each item on its own line" if isinstance(found, list) else ""
        return f"holds {shorten(found, 40)}; expected a JSON object on each line{hint}"
    return found or "has no columns"


def encoded_row(row: Mapping[str, object]) -> bytes | str:
    """Return a row as a line of JSON with its newline, or what is wrong with it. Equal rows give equal lines."""
    try:
        return _ENCODER.encode(row).encode() + b"\n"
    except UnicodeEncodeError:
        # JSON allows half a surrogate pair ("\ud83d"); no tokenizer accepts it.
        return "contains half of a surrogate pair, which is not valid text"
    except RecursionError:
        return "is nested too deep"
    except ValueError:  # 1e999
        return "has a number that is too large"


class _NotJson(ValueError):
    """A key that is there twice, or NaN."""


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise _NotJson(f"key {shorten(twice)} is there twice")
    return made


def _no_constant(name: str) -> object:
    raise _NotJson(f"{name} is not JSON; expected null or a number")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def not_text(error: UnicodeDecodeError) -> str:
    """Return the problem of a line that is not text."""
    return f"is not UTF-8 (byte {error.start + 1} of the line)"
