"""A subset of Go's text/template that can run what `compute.export.go_template` writes."""

import json
import re
from collections.abc import Iterator
from typing import Any

_ACTION = re.compile(r'\{\{ ("(?:[^"\\]|\\.)*"|.*?) \}\}')
_VALUE = re.compile(r'"(?:[^"\\]|\\.)*"|\S+')
Node = tuple[Any, ...]


def render(template: str, messages: list[dict[str, str]]) -> str:
    """The prompt that Ollama would send for `messages`."""
    tokens = iter(_ACTION.findall(template))
    assert not _ACTION.sub("", template), "text outside of quotes"
    nodes, stopped = _parse(tokens)
    assert stopped is None
    return "".join(_run(nodes, messages, {}, None))


def _parse(tokens: Iterator[str]) -> tuple[list[Node], str | None]:
    nodes: list[Node] = []
    for token in tokens:
        word = token.split(" ")[0]
        if word in ("end", "else"):
            return nodes, token
        if word == "range":
            assert token == "range .Messages"
            body, stopped = _parse(tokens)
            assert stopped == "end"
            nodes.append(("range", body))
        elif word == "if":
            nodes.append(_if(token.removeprefix("if "), tokens))
        else:
            nodes.append(("do", token))
    return nodes, None


def _if(condition: str, tokens: Iterator[str]) -> Node:
    body, stopped = _parse(tokens)
    assert stopped is not None
    if stopped == "end":
        return ("if", condition, body, [])
    if stopped == "else":
        other, end = _parse(tokens)
        assert end == "end"
        return ("if", condition, body, other)
    return ("if", condition, body, [_if(stopped.removeprefix("else if "), tokens)])


def _run(nodes: list[Node], messages: list[dict[str, str]], names: dict[str, str], here: Any) -> Iterator[str]:
    for node in nodes:
        if node[0] == "range":
            for message in messages:
                yield from _run(node[1], messages, names, message)
        elif node[0] == "if":
            function, one, other = _VALUE.findall(node[1])
            equal = _value(one, names, here) == _value(other, names, here)
            yield from _run(node[2] if equal == (function == "eq") else node[3], messages, names, here)
        elif assigned := re.fullmatch(r"(\$\w+) :?= (\S+)", node[1]):
            names[assigned[1]] = _value(assigned[2], names, here)
        else:
            yield _value(node[1], names, here)


def _value(text: str, names: dict[str, str], here: Any) -> str:
    if text.startswith('"'):
        found: str = json.loads(text)
        return found
    return names[text] if text.startswith("$") else str(here[text.removeprefix(".").lower()])
