"""Rows of three domains for `demo_domains`: sums and code are generated, cooking is in `data/`."""

import random
from collections.abc import Callable

from demo_jobs import rows_of

HELD_OUT = 16  # rows of each domain
_THINGS = ("apples", "books", "chairs", "coins", "cups", "maps", "pens", "stones")
_VERBS = {"add": "+", "subtract": "-", "multiply": "*"}
_NAMES = ("a", "b", "count", "left", "right", "total", "value", "width")

Row = dict[str, str]


def _sum(rng: random.Random) -> Row:
    first, second, thing = rng.randint(10, 99), rng.randint(10, 99), rng.choice(_THINGS)
    asked = f"I have {first} {thing} and get {second} more. How many {thing} do I have?"
    return {"prompt": asked, "completion": f"{first} + {second} = {first + second}. You have {first + second} {thing}."}


def _code(rng: random.Random) -> Row:
    verb, (one, other) = rng.choice(sorted(_VERBS)), rng.sample(_NAMES, 2)
    number = rng.randint(2, 99)
    asked = f"Write a Python function that can {verb} {one} and {other}, and then adds {number}."
    answer = f"def {verb}_{one}({one}: int, {other}: int) -> int:\n    return {one} {_VERBS[verb]} {other} + {number}"
    return {"prompt": asked, "completion": answer}


_MADE: dict[str, Callable[[random.Random], Row]] = {"sums": _sum, "code": _code}
DOMAINS = ("sums", "cooking", "code")


def _distinct(name: str, count: int, seed: int) -> list[Row]:
    """Return this number of rows with different questions."""
    rng, found = random.Random(seed), dict[str, Row]()
    while len(found) < count:
        row = _MADE[name](rng)
        found.setdefault(row["prompt"], row)
    return [*found.values()]


def rows(name: str, count: int) -> list[Row]:
    """Return training rows of a domain, at most `count`; none is among the held-out ones."""
    if name not in _MADE:
        return [_plain(row) for row in rows_of(name)[:count]]
    return _distinct(name, count + HELD_OUT, seed=1)[HELD_OUT:]


def held_out(name: str) -> list[Row]:
    """Return held-out rows of a domain."""
    if name not in _MADE:
        return [_plain(row) for row in rows_of(f"{name}_heldout")[:HELD_OUT]]
    return _distinct(name, HELD_OUT, seed=1)


def _plain(row: Row) -> Row:
    return {"prompt": row["prompt"], "completion": row["completion"]}
