"""Which of a module's cases a run has chosen, for fixtures that prepare all of them together."""

from collections.abc import Iterable
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
