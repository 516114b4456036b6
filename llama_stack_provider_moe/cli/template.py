"""FILE and `--set` -> the body of a job. What a job may hold is the server's to say; this only reads and edits JSON."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from llama_stack_provider_moe.errors import InvalidInput


def read_template(file: str, changes: Iterable[str]) -> dict[str, Any]:
    """The job in `file` (`-`: standard input) with `changes` laid over it, one after the other.

    Raises:
        InvalidInput: not a readable JSON object, or a change that has no place in it.
    """
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except (OSError, ValueError) as error:
        raise InvalidInput("FILE", file, f"a job template that can be read ({error})") from None
    try:
        body = json.loads(data, object_pairs_hook=_object, parse_constant=_not_json)
    except (ValueError, RecursionError) as error:  # of wrong JSON, of bytes that are no text, of depth
        raise InvalidInput("FILE", file, f"a job template in JSON ({error})") from None
    if not isinstance(body, dict):
        raise InvalidInput("FILE", file, f"a job template, which is a JSON object; this is {_kind(body)}")
    for change in changes:
        _change(body, change)
    return body


def _change(body: dict[str, Any], change: str) -> None:
    """`block.field=value`, in place. Blocks on the way are made where they are left out or null."""
    path, equals, text = change.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise InvalidInput("--set", change, "block.field=value, such as training.n_epochs=3")
    block = body
    for depth, key in enumerate(keys[:-1], start=1):
        if block.get(key) is None:
            block[key] = {}
        if not isinstance(block[key], dict):
            where = ".".join(keys[:depth])
            raise InvalidInput("--set", change, f"a path through blocks; {where} is {_kind(block[key])}")
        block = block[key]
    block[keys[-1]] = _value(text)


def _value(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_not_json)
    except (ValueError, RecursionError):
        return text


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:  # json would keep the last one and say nothing
            raise ValueError(f"key {key!r} stands twice in one object")
        found[key] = value
    return found


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "text", bool: "true or false", type(None): "null", dict: "an object"}
    return kinds.get(type(value), "a number")
