"""References inside a JSON schema: where they lead, and how much work they make of one value.

A few definitions that name each other twice take time exponential in their number. What a schema asks at one value is
counted before any value is seen, each definition once. What a nested value multiplies is counted while it is validated.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple
from urllib.parse import unquote

from llama_stack_provider_moe.errors import InvalidInput

MOST_WORK = 10_000  # schemas tried at one value
MOST_IN_LINE = 100  # of them inside one another: Python's stack ends
MOST_REFERENCES = 20_000  # followed for one value where nothing else ends it: some seconds
_LISTS = ("allOf", "anyOf", "oneOf")
_ONE = ("if", "then", "else", "not")
_UNEVALUATED = ("unevaluatedProperties", "unevaluatedItems")
_LEFT: ContextVar[list[int] | None] = ContextVar("references_left", default=None)


class TooMuchWork(Exception):
    """A value takes more references than may be followed."""


class _Work(NamedTuple):
    """How many schemas a validator tries at one value.

    Attributes:
        check: to validate it.
        look: to learn which of its keys a schema has looked at, for `unevaluatedProperties`.
        line: schemas inside one another.
    """

    check: int
    look: int
    line: int


class References:
    """The references of a schema.

    Args:
        schema: the whole.
        schemas: all in it, each with its field, which need not be unique.
    """

    def __init__(self, schema: object, schemas: Sequence[tuple[str, Mapping[str, object]]]) -> None:
        self._schema, self._schemas = schema, schemas
        self._known = {id(each) for _, each in schemas}
        self._targets: dict[int, object] = {}
        self._work: dict[int, _Work | None] = {}

    def follow(self, schema: Mapping[str, object], field: str) -> None:
        """Find where a reference leads.

        Raises:
            InvalidInput: there is no schema.
        """
        ref, here = schema["$ref"], self._schema
        assert isinstance(ref, str)
        for part in unquote(ref.removeprefix("#")).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(here, list) and name.isdecimal() and len(name) < 9 and int(name) < len(here):
                here = here[int(name)]
            elif isinstance(here, dict) and name in here:
                here = here[name]
            else:
                raise InvalidInput(field, ref, "a reference to a schema that is there")
        if not isinstance(here, bool) and id(here) not in self._known:
            raise InvalidInput(field, ref, "a reference to a schema that is there; this is another part of it")
        self._targets[id(schema)] = here

    def check_work(self) -> None:
        """Check that no reference leads to itself at the same value, and that trying a value is bounded.

        Raises:
            InvalidInput: it is not.
        """
        for at, schema in self._schemas:
            try:
                work = self._of(schema, at)
            except RecursionError:
                work = _Work(0, 0, MOST_IN_LINE + 1)
            if work.line > MOST_IN_LINE:
                raise InvalidInput(at, f"more than {MOST_IN_LINE}", f"at most {MOST_IN_LINE} schemas inside one "
                                   "another for one value, references followed")  # fmt: skip
            if work.check > MOST_WORK:
                raise InvalidInput(at, f"more than {MOST_WORK}", f"at most {MOST_WORK:,} schemas to try at one value, "
                                   "references followed; definitions that name others twice multiply")  # fmt: skip

    def _of(self, schema: object, field: str) -> _Work:
        if not isinstance(schema, dict):
            return _Work(1, 1, 1)
        key = id(schema)
        if key in self._work:
            known = self._work[key]
            if known is None:
                raise InvalidInput(field, "$ref", "references that do not lead in a circle")
            return known
        self._work[key] = None
        inside = [self._of(each, field) for each in _in_place(schema)]
        look = 1 + sum(each.check + each.look for each in inside)
        line = 1 + max((each.line for each in inside), default=0)
        check = 1 + sum(each.check for each in inside)
        if key in self._targets:
            there = self._of(self._targets[key], field)
            look, check, line = look + there.look, check + there.check, max(line, 1 + there.line)
        check += look * sum(name in schema for name in _UNEVALUATED)
        found = self._work[key] = _Work(check, look, line)
        return found


def _in_place(schema: Mapping[str, object]) -> Iterator[object]:
    """The schemas in a schema that are about the same value."""
    for name in _LISTS:
        listed = schema.get(name)
        yield from listed if isinstance(listed, list) else ()
    for name in _ONE:
        if name in schema:
            yield schema[name]
    dependent = schema.get("dependentSchemas")
    yield from dependent.values() if isinstance(dependent, dict) else ()


@contextmanager
def within(most: int | None) -> Iterator[None]:
    """Follow at most so many references inside; None: any number."""
    token = _LEFT.set(None if most is None else [most])
    try:
        yield
    finally:
        _LEFT.reset(token)


def counted(follow: Callable[..., Any]) -> Callable[..., Any]:
    """Return what follows a reference, counted."""

    def counting(*given: object) -> Any:
        left = _LEFT.get()
        if left is not None:
            left[0] -= 1
            if left[0] < 0:
                raise TooMuchWork
        return follow(*given)

    return counting
