"""What each file of tests costs: `MOE_TEST_COSTS=FILE python -m pytest -p tests.support.costs ...`.

A line of JSON for each file of tests is added to FILE: the seconds of processor time that its tests and their fixtures
took in this process and in the children that it waited for, the seconds by the clock, and the number of tests. Imports
and collection have a line of their own. A process that outlives its parent, such as a server's supervisor, is missing.
`python -m tests.support.costs FILE` adds the lines up and prints them, the dearest first.
"""

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Generator, Iterable
from pathlib import Path

import pytest

COLLECTION = "(imports and collection)"
# File of tests -> processor seconds, clock seconds, tests.
spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0])


def _now() -> tuple[float, float]:
    times = os.times()
    return sum(times[:4]), time.monotonic()


_began = _now()


def _add(name: str, since: tuple[float, float], tests: int) -> None:
    for place, value in enumerate((*(now - before for now, before in zip(_now(), since, strict=True)), tests)):
        spent[name][place] += value


def pytest_collection_finish(session: pytest.Session) -> None:
    """The imports are done."""
    _add(COLLECTION, _began, 0)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Around a test, its set-up and what is put away after it."""
    since = _now()
    try:
        return (yield)
    finally:
        _add(item.location[0], since, 1)


def pytest_sessionfinish() -> None:
    """In each of several processes, whose lines may mix but not break."""
    if spent and (path := os.environ.get("MOE_TEST_COSTS")):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps([name, *values]) + "\n" for name, values in spent.items()))


def table(lines: Iterable[str]) -> str:
    """The sums of all lines, the dearest file first, and their total."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0])
    for name, *values in map(json.loads, lines):
        for place, value in enumerate(values):
            sums[name][place] += value
            sums["all"][place] += value
    rows = sorted(sums.items(), key=lambda row: -row[1][0])
    return "\n".join(f"{cpu:8.1f} {clock:8.1f} {tests:6.0f}  {name}" for name, (cpu, clock, tests) in rows)


if __name__ == "__main__":
    print("  cpu s  clock s  tests\n" + table(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()))
