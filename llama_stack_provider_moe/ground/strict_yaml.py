"""YAML -> the values that JSON has. Plain text follows YAML 1.2: `on` and `no` are text, `2e-4` is a number.

Each key may be given once. Tags and aliases are refused: a job file holds only data, and must stay small.
"""

import re
from collections.abc import Sequence

import yaml

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_PLAIN, _OTHER = "plain", "other"


class WrongLine(ValueError):
    """A mistake at a line; the text says what is wrong."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")


class KeyTwice(WrongLine):
    """A key is given twice in one object."""


class _Loader(yaml.SafeLoader):
    """Tells plain scalars from everything else, and resolves nothing."""

    def resolve(self, kind: type[yaml.Node], value: object, implicit: Sequence[bool]) -> str:
        """Return the tag of a node that has none."""
        return _PLAIN if kind is yaml.ScalarNode and implicit[0] else _OTHER

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse an alias: the composed node would be the anchor's, and nothing would tell where it is used."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            anchor = self.anchors.get(event.anchor)
            of = "" if anchor is None else f" of line {anchor.start_mark.line + 1}"
            reason = f"alias *{event.anchor}{of} is not supported; write the value again"
            raise WrongLine(event.start_mark.line + 1, reason)
        return super().compose_node(parent, index)


def parse(data: bytes) -> object:
    """Return the only document in `data`.

    Raises:
        WrongLine: `data` is not YAML, or holds more than JSON can.
        ValueError: `data` is not text.
    """
    try:
        root = yaml.compose(data.decode("utf-8-sig"), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise WrongLine(mark.line + 1 if mark else 1, str(error.problem or error.context)) from None
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    return None if root is None else _value(root)


def _value(node: yaml.Node) -> object:
    line = node.start_mark.line + 1
    if node.tag not in (_PLAIN, _OTHER):
        raise WrongLine(line, f"tag {node.tag} is not supported")
    if isinstance(node, yaml.MappingNode):
        return _object(node)
    if isinstance(node, yaml.SequenceNode):
        return [_value(each) for each in node.value]
    return _scalar(node.value) if node.tag == _PLAIN else node.value


def _object(node: yaml.MappingNode) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise WrongLine(line, "a key must be text")
        if key.value in found:
            raise KeyTwice(line, f"key {key.value!r} is given twice in one object")
        found[key.value] = _value(value)
    return found


def _scalar(text: str) -> str | float | bool | None:
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) and re.search(r"[.eE]", text) else text
