"""The tool calls in an answer, read strictly: a call whose arguments are no strict JSON object is no right call.

A model writes calls as JSON between `<tool_call>` tags, or its whole answer is a call or a list of calls. A caller that
has the calls apart from the text, in OpenAI's form, gives them.
"""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llama_stack_provider_moe.shields import strict_json

OPENING, CLOSING = "<tool_call>", "</tool_call>"
MAX_CALLS = 128


class Call(NamedTuple):
    """A tool call.

    Attributes:
        name: of the tool; "" where there is none.
        arguments: None where they are no strict JSON object.
    """

    name: str
    arguments: Mapping[str, object] | None


def calls_in(text: str, given: Sequence[object] | None = None) -> tuple[Call, ...]:
    """Return the calls of an answer, at most MAX_CALLS + 1.

    Args:
        text: of the answer.
        given: the calls where they are apart from the text.
    """
    if given is not None:
        return tuple(call_of(each) for each in given[: MAX_CALLS + 1])
    if OPENING in text:
        pieces = text.split(OPENING, MAX_CALLS + 1)[1:]
        return tuple(_read(piece.partition(CLOSING)[0]) for piece in pieces)
    stripped = text.strip()
    if not stripped.startswith(("{", "[")):
        return ()
    try:
        found = strict_json.parsed(f'{{"calls": {stripped}}}')["calls"]
    except strict_json.NotStrict:
        return ()
    calls = found if isinstance(found, list) else [found]
    named = [each for each in calls if isinstance(each, dict) and "name" in (each.get("function") or each)]
    return tuple(call_of(each) for each in calls[: MAX_CALLS + 1]) if named else ()


def call_of(value: object) -> Call:
    """Return the call that an object describes, `{name, arguments}` or OpenAI's `{type, function: ...}`."""
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return Call("", None)
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, Mapping):
        try:
            arguments = json.dumps(arguments)
        except (ValueError, TypeError, RecursionError):
            return Call(function["name"], None)
    if not isinstance(arguments, str):
        return Call(function["name"], None)
    try:
        return Call(function["name"], strict_json.parsed(arguments))
    except strict_json.NotStrict:
        return Call(function["name"], None)


def _read(text: str) -> Call:
    try:
        return call_of(strict_json.parsed(text.strip()))
    except strict_json.NotStrict:
        return Call("", None)
