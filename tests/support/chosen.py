"""Few cases of many: which a run has chosen, which `make test` leaves out, and results that are made when asked for."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def chosen(request: pytest.FixtureRequest, *names: str) -> set[tuple[Any, ...]]:
    """The values of these parameters of all tests of the module that will run and have them."""
    found = set()
    for item in request.session.items:
        given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if item.path == request.path and set(names) <= given.keys():
            found.add(tuple(given[name] for name in names))
    return found


def few(cases: Iterable[Any], count: int) -> list[Any]:
    """Cases for `pytest.mark.parametrize`; all but the first `count` are `wide`: `make test` leaves them out."""
    return [
        case if at < count else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.wide)
        for at, case in enumerate(cases)
    ]


class OnDemand[Value](dict[str, Value]):
    """Results by name, each made when it is first asked for.

    Args:
        make: makes the one of a name.
    """

    def __init__(self, make: Callable[[str], Value]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, name: str) -> Value:
        self[name] = made = self._make(name)
        return made
