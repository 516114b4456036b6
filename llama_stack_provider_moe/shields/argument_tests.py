"""Rules on single arguments: what JSON Schema can't say, or not for one principal alone."""

import posixpath
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Annotated, Any, NamedTuple, Self
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.shields.closed_schema import pointer_of
from llama_stack_provider_moe.shields.verdict import Level
from llama_stack_provider_moe.spec.blocks import Block
from llama_stack_provider_moe.spec.linear_patterns import matcher

_POINTER = re.compile(r"(/([^~/*]|~[01])+|/\*)+")
_HOST = re.compile(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_CONTROL = {chr(code) for code in (*range(32), 127)}


def _pattern(given: str) -> str:
    try:
        matcher(given, "pattern")
    except InvalidInput as error:
        raise ValueError(f"{error.value!r} is not valid; expected {error.expected}") from None
    return given


Pattern = Annotated[str, AfterValidator(_pattern)]
type Scalar = str | int | float | bool | None


class ArgumentRule(Block):
    """A rule on one argument of a tool; it holds if every one of its tests does."""

    argument: str = Field(
        max_length=200,
        description="JSON Pointer to the argument, such as /path; /to/* for each item of a list or value of an object.",
    )
    principals: list[str] = Field(
        default=["*"], min_length=1, max_length=1000, description="Callers for whom the rule holds; * as a wildcard."
    )
    required: bool = Field(default=False, description="Whether the argument must be there for these callers.")
    one_of: list[str | int | float | bool | None] | None = Field(
        default=None, min_length=1, max_length=10_000, description="The only values that are allowed."
    )
    none_of: list[str | int | float | bool | None] | None = Field(
        default=None, min_length=1, max_length=10_000, description="Values that are not allowed."
    )
    matches: Pattern | None = Field(
        default=None, description="Pattern that the whole text must match, in the syntax of Rust's regex crate."
    )
    does_not_match: Pattern | None = Field(
        default=None, description="Pattern that may be nowhere in the text, in the syntax of Rust's regex crate."
    )
    inside: str | None = Field(
        default=None,
        max_length=500,
        description="Folder in which the path must be; `..` and percent signs in paths are refused. Links are the "
        "tool's to check.",
    )
    hosts: list[str] | None = Field(
        default=None,
        min_length=1,
        max_length=1000,
        description="Hosts of the URL, which must be https or http, without user and port; *.example.org: any below.",
    )
    at_least: float | None = Field(default=None, description="Smallest number.")
    at_most: float | None = Field(default=None, description="Largest number.")
    max_length: int | None = Field(
        default=None, ge=0, le=1_000_000, description="Most characters of a text, or items of a list."
    )
    level: Level | None = Field(default=None, description="Level of a violation; left out: the tool's.")
    message: str | None = Field(default=None, max_length=500, description="Message for the user; left out: the tool's.")

    @field_validator("argument", mode="after")
    @classmethod
    def _pointer(cls, given: str) -> str:
        if not is_pointer(given):
            raise ValueError(f"{given!r} is not valid; expected a JSON Pointer such as /path, with * for each item")
        return given

    @field_validator("inside", mode="after")
    @classmethod
    def _absolute(cls, given: str | None) -> str | None:
        if given is not None and not (given.startswith("/") and posixpath.normpath(given) == given):
            raise ValueError(f"{given!r} is not valid; expected an absolute folder such as /srv/docs")
        return given

    @field_validator("hosts", mode="after")
    @classmethod
    def _are_hosts(cls, given: list[str] | None) -> list[str] | None:
        for each in given or ():
            if not _HOST.fullmatch(each):
                raise ValueError(f"{each!r} is not valid; expected a host such as docs.example.org or *.example.org, "
                                 "without scheme, port and path")  # fmt: skip
        return given

    @model_validator(mode="after")
    def _has_a_test(self) -> Self:
        if not self.required and not self._given():
            tests = ", ".join(name for name, _, _ in self._tests())
            raise ValueError(f"argument {self.argument!r} has no test; expected one of {tests}, or required")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least: {self.at_least} is not valid; expected at most at_most, which is "
                             f"{self.at_most}; no value could pass")  # fmt: skip
        return self

    def broken(self, arguments: dict[str, object]) -> Iterator[tuple[str, str]]:
        """Yield pointer and test for each test that a value breaks.

        Args:
            arguments: of the tool call.
        """
        found = list(_at(arguments, self.argument))
        if self.required and not found:
            yield self.argument, "required"
        for pointer, value in found:
            for name, wanted, holds in self._given():
                if not holds(value, wanted):
                    yield pointer, name

    def _given(self) -> list["_Test"]:
        return [each for each in self._tests() if each.wanted is not None]

    def _tests(self) -> list["_Test"]:
        return [
            _Test("one_of", self.one_of, _is_one),
            _Test("none_of", self.none_of, lambda value, none: not _is_one(value, none)),
            _Test("matches", self.matches, lambda value, pattern: _matches(value, pattern, whole=True) is True),
            _Test("does_not_match", self.does_not_match, lambda value, pattern: _matches(value, pattern) is False),
            _Test("inside", self.inside, _is_inside),
            _Test("hosts", self.hosts, _is_at),
            _Test("at_least", self.at_least, lambda value, least: _is_number(value) and value >= least),
            _Test("at_most", self.at_most, lambda value, most: _is_number(value) and value <= most),
            _Test(
                "max_length", self.max_length, lambda value, most: isinstance(value, str | list) and len(value) <= most
            ),
        ]


class _Test(NamedTuple):
    """One test of a rule: what it wants (None: nothing), and whether a value holds it."""

    name: str
    wanted: Any
    holds: Callable[[Any, Any], bool]


def is_pointer(argument: str) -> bool:
    """Return whether this is how rules name an argument."""
    return _POINTER.fullmatch(argument) is not None


def is_for(principals: list[str], principal: str) -> bool:
    """Return whether a list of names and wildcards names a caller."""
    return any(fnmatchcase(principal, each) for each in principals)


def _at(content: object, pointer: str) -> Iterator[tuple[str, object]]:
    """Yield the values at a pointer, each with its own pointer."""
    found: list[tuple[tuple[str, ...], object]] = [((), content)]
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        below: list[tuple[tuple[str, ...], object]] = []
        for path, value in found:
            if isinstance(value, dict):
                keys = list(value) if part == "*" else [name] if name in value else []
                below += [((*path, key), value[key]) for key in keys]
            elif isinstance(value, list):
                numbers = range(len(value)) if part == "*" else [int(name)] if name.isdecimal() else []
                below += [((*path, str(number)), value[number]) for number in numbers if number < len(value)]
        found = below
    return ((pointer_of(path), value) for path, value in found)


def _is_one(value: object, of: list[Scalar]) -> bool:
    # 1 == True in Python, and not in JSON.
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in of)


def _is_inside(value: object, folder: str) -> bool:
    if not isinstance(value, str) or not value.startswith("/") or value.startswith("//"):
        return False
    # A tool may decode what is encoded, and some systems read a backslash as a slash.
    if "%" in value or "\\" in value or ".." in value.split("/") or _CONTROL & set(value):
        return False
    root = posixpath.normpath(folder)
    path = posixpath.normpath(value)
    return root == "/" or path == root or path.startswith(root + "/")


def _is_at(value: object, hosts: list[str]) -> bool:
    """Whether a value is a URL at one of the hosts, without anything that URL parsers read differently."""
    if not isinstance(value, str) or "\\" in value or any(each.isspace() or each in _CONTROL for each in value):
        return False
    if not value.isascii():
        return False
    try:
        parts = urlsplit(value)
        host = parts.hostname or ""
        has_more = parts.username is not None or parts.password is not None or parts.port is not None
    except ValueError:
        return False
    if parts.scheme not in ("https", "http") or has_more or parts.netloc.lower() != host or unquote(host) != host:
        return False
    return any(host.endswith(each[1:]) if each.startswith("*.") else host == each for each in map(str.lower, hosts))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _matches(value: object, pattern: str, whole: bool = False) -> bool | None:
    """Whether a text matches; None for what is no text, which then holds neither test."""
    return matcher(pattern, "pattern", whole)(value) if isinstance(value, str) else None
