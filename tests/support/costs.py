"""What each file of tests costs: `MOE_TEST_COSTS=FILE python -m pytest -p tests.support.costs ...`.

A line of JSON for each test is added to FILE as it ends, so that a run that is stopped has told what it can: the
seconds of processor time that it and its fixtures took in this process and in the children that it waited for, the
seconds by the clock, and one for the test. Imports and collection have a line of their own. A process that outlives its
parent, such as a server's supervisor, is missing.
`python -m tests.support.costs FILE` adds the lines of each file of tests up and prints them, the dearest first; with
`tests` after FILE, it prints the tests.
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


def _now() -> tuple[float, float]:
    times = os.times()
    return sum(times[:4]), time.monotonic()


_began = _now()


def _add(name: str, since: tuple[float, float], tests: int) -> None:
    """One line at once, so that those of several processes mix but don't break."""
    if path := os.environ.get("MOE_TEST_COSTS"):
        values = (*(round(now - before, 3) for now, before in zip(_now(), since, strict=True)), tests)
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, *values]) + "\n")


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
        _add(item.nodeid, since, 1)


def table(lines: Iterable[str], *, by_test: bool = False) -> str:
    """The sums of all lines, the dearest file (or test) first, and their total."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0])
    for name, *values in map(json.loads, lines):
        part = name if by_test else name.split("::")[0]
        for place, value in enumerate(values):
            sums[part][place] += value
            sums["all"][place] += value
    rows = sorted(sums.items(), key=lambda row: -row[1][0])
    return "\n".join(f"{cpu:8.1f} {clock:8.1f} {tests:6.0f}  {name}" for name, (cpu, clock, tests) in rows)


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    print("  cpu s  clock s  tests\n" + table(lines, by_test=sys.argv[2:] == ["tests"]))
