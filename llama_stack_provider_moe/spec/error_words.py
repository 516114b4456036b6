"""Our words for what pydantic found wrong with a value. Its own name Python's types, which a user did not write."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llama_stack_provider_moe.errors import shorten
from llama_stack_provider_moe.ground.counting import number_of

_TYPES = {
    "int": "an integer", "float": "a number", "bool": "true or false", "string": "text", "list": "a list",
    "dict": "an object", "model": "an object", "finite_number": "a finite number", "tuple": "a list", "set": "a list",
    "frozen_set": "a list", "mapping": "an object", "none_required": "null", "path": "a path", "json": "JSON",
    "invalid_key": "text as a key", "date": "a date, such as 2026-01-31", "iterable": "a list",
    "datetime": "a date and time, such as 2026-01-31T12:00:00Z", "url": "a URL, such as https://example.org",
    "bytes": "text", "decimal": "a number", "uuid": "a UUID", "dataclass": "an object",
    "recursion_loop": "a value that does not hold itself",
}  # fmt: skip
_BOUNDS = {
    "greater_than": ("gt", "> "), "greater_than_equal": ("ge", ">= "),
    "less_than": ("lt", "< "), "less_than_equal": ("le", "<= "), "multiple_of": ("multiple_of", "a multiple of "),
}  # fmt: skip


def expected(error: ErrorDetails, patterns: Mapping[str, str] | None = None) -> str:
    """Return what was expected in place of a value, to follow the word `expected`.

    Args:
        error: as pydantic gives it; not of a missing or an unknown key, and not of a validator of ours.
        patterns: words for the patterns of texts.
    """
    kind, context = error["type"], error.get("ctx", {})
    if kind in _BOUNDS:
        key, sign = _BOUNDS[kind]
        return f"{sign}{context[key]:.15g}"
    if kind in ("literal_error", "enum"):
        return str(context["expected"])
    if kind == "string_pattern_mismatch" and patterns is not None and context["pattern"] in patterns:
        return patterns[context["pattern"]]
    if kind == "union_tag_not_found":
        return f"an object with {context['discriminator']}"
    if kind == "union_tag_invalid":
        return f"{context['discriminator']} to be one of {context['expected_tags']}"
    if kind.endswith(("too_short", "too_long")):
        return _length(kind, context)
    family = kind if kind in _TYPES else kind.removesuffix("_type").removesuffix("_parsing")
    return _TYPES.get(family) or _TYPES.get(kind.partition("_")[0], str(error["msg"]))


def _length(kind: str, context: Mapping[str, Any]) -> str:
    if kind.startswith(("string", "bytes")):
        words: tuple[str, ...] = ("character",)
    else:
        words = ("entry", "entries") if context["field_type"] in ("Dictionary", "Mapping") else ("item",)
    least, most = context.get("min_length"), context.get("max_length")
    is_short = kind.endswith("too_short")
    return f"{'at least' if is_short else 'at most'} {number_of(int((least if is_short else most) or 0), *words)}"


def reason(error: ErrorDetails) -> str:
    """Return what is wrong with a value, to follow its field and a colon."""
    match error["type"]:
        case "missing":
            return "is missing"
        case "extra_forbidden":
            return "unknown key"
        case "value_error" | "assertion_error":
            return str(error["ctx"]["error"])
        case _:
            return f"expected {expected(error)}"


def problems_of(error: ValidationError) -> list[str]:
    """Return each problem of a block as `field: reason`, with the value where that is what is wrong."""
    return [
        f"{'.'.join(map(str, each['loc']))}: {_value(each)}{reason(each)}".removeprefix(": ")
        for each in error.errors(include_url=False)
    ]


def _value(error: ErrorDetails) -> str:
    is_said = error["type"] in ("missing", "extra_forbidden", "value_error", "assertion_error")
    return "" if is_said else f"{shorten(error['input'])} is not valid; "
