"""Patterns in Rust's regex engine, whose time is linear in the text: for patterns or texts that a stranger writes."""

from collections.abc import Callable
from functools import cache

from pydantic_core import SchemaError, SchemaValidator, core_schema

from llama_stack_provider_moe.errors import InvalidInput

MAX_PATTERN = 500  # characters


def matcher(pattern: object, field: str, whole: bool = False) -> Callable[[str], bool]:
    """Return a test of a text in linear time.

    Args:
        pattern: in the syntax of Rust's regex crate: that of Python without look-around and back-references.
        field: the caller's name for it.
        whole: whether all of the text must match, rather than some part.

    Raises:
        InvalidInput: the pattern is not valid, or too long.
    """
    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN:
        raise InvalidInput(field, pattern, f"a pattern of at most {MAX_PATTERN} characters")
    try:
        found = _compiled(rf"\A(?:{pattern})\z" if whole else pattern)
    except SchemaError as error:
        raise InvalidInput(field, pattern, f"a pattern without look-around and back-references ({_why(error)})") \
            from None  # fmt: skip
    return found.isinstance_python


def _why(error: SchemaError) -> str:
    """What the regex engine says; the rest of the message is about pydantic, and the pattern again."""
    said = str(error)
    if "exceeds size limit" in said:
        return "it is too large once compiled: repeat less"
    return said.rpartition("error: ")[2].replace("\n", " ")[:80]


@cache
def _compiled(pattern: str) -> SchemaValidator:
    return SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex", strict=True))
