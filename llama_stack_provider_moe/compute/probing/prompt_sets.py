"""The sets of a job: read, each different row once, and divided into the parts that fit, choose and report."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llama_stack_provider_moe.compute.analysis.routing_report import Prompt
from llama_stack_provider_moe.compute.probing.texts import Reader, Unscorable, as_conversation
from llama_stack_provider_moe.errors import DataError
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.spec.ablation import BASELINE, TARGET
from llama_stack_provider_moe.spec.probe import LEAST_TARGETS, PARTS, REQUIRED, TESTS, least_negatives

_SHOWN = 8
_UNLIKE = 0.5  # difference of two shares that deserves a warning


@dataclass(frozen=True)
class Conversations:
    """The different conversations of one set.

    Attributes:
        views: of each conversation, the whole first.
        answered: how many end with the assistant's turn.
        repeated: how many more rows were equal to one of these.
    """

    views: list[list[Prompt]]
    answered: int
    repeated: int

    def key(self, at: int) -> tuple[int, ...]:
        """What makes two conversations equal: the tokens of the whole."""
        return tuple(self.views[at][0].ids)


@dataclass(frozen=True)
class Split:
    """Numbers of a set's conversations by what they are for."""

    fit: list[int]
    choose: list[int]
    report: list[int]


def read_set(path: Path, source: str, reader: Reader) -> Conversations:
    """The conversations of the canonical rows in `path`.

    Args:
        path: the rows.
        source: name of their data set, for messages.
        reader: makes their tokens.

    Raises:
        DataError: rows have no score.
    """
    seen: dict[tuple[int, ...], list[Prompt]] = {}
    answered, rows, problems = 0, 0, list[str]()
    with path.open(encoding="utf-8") as file, liveness.stage(f"tokenising {source}", unit="rows") as counter:
        for rows, line in enumerate(file, start=1):
            counter.advance()
            conversation = as_conversation(json.loads(line))
            try:
                views = reader.prompts(conversation)
            except Unscorable as problem:
                problems.append(f"row {rows}: {problem}")
                continue
            key = tuple(views[0].ids)
            if key not in seen:
                seen[key] = views
                answered += conversation["messages"][-1]["role"] == "assistant"
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError(
            f"dataset {source!r}: {len(problems)} row(s) can't be scored: {'; '.join(problems[:_SHOWN])}{more}"
        )
    return Conversations(list(seen.values()), answered, rows - len(seen))


def check_sets(sets: Mapping[str, Conversations], false_positive_rate: float, say: Callable[[str], None]) -> None:
    """Check that what is left of the sets can fit a probe, and say what the probe may learn besides the concept.

    Args:
        sets: by name.
        false_positive_rate: that the threshold is set for.
        say: called with lines for a person.

    Raises:
        DataError: too few different rows, or the same row in two sets.
    """
    least = {TARGET: LEAST_TARGETS, BASELINE: PARTS * least_negatives(false_positive_rate)}
    owners: dict[tuple[int, ...], str] = {}
    for name, found in sets.items():
        if found.repeated:
            say(f"{name}: {found.repeated} rows are equal to others and count once; {len(found.views)} are left")
        if len(found.views) < least.get(name, 1):
            raise DataError(f"data.sets.{name}: has {len(found.views)} different rows; expected at least {least[name]}"
                            + (f", a third of which sets the threshold for probe.false_positive_rate "
                               f"{false_positive_rate:g}" if name == BASELINE else ""))  # fmt: skip
        shared = [owner for at in range(len(found.views)) if (owner := owners.get(found.key(at))) is not None]
        if shared:
            raise DataError(f"data.sets.{name}: {len(shared)} of its rows are also in {shared[0]}; a row must be in "
                            "one set")  # fmt: skip
        owners |= {found.key(at): name for at in range(len(found.views))}
    for target, baseline in (REQUIRED, TESTS):
        if target in sets:
            shares = [sets[name].answered / len(sets[name].views) for name in (target, baseline)]
            if abs(shares[0] - shares[1]) > _UNLIKE:
                say(f"warning: {shares[0]:.0%} of {target} and {shares[1]:.0%} of {baseline} end with an answer, which "
                    "a probe may learn instead of the concept")  # fmt: skip


def split(found: Conversations, how: Literal["shuffled", "in_order"], seed: int) -> Split:
    """Divide a set into thirds.

    Args:
        found: the set.
        how: shuffled: by a hash of each conversation, so that the order of the rows does not matter; in_order: as they
            stand.
        seed: of the hash; another one gives another division.
    """
    order = list(range(len(found.views)))
    if how == "shuffled":
        order.sort(key=lambda at: _hash(found.key(at), seed))
    third = len(order) // PARTS
    return Split(fit=order[2 * third :], choose=order[:third], report=order[third : 2 * third])


def _hash(ids: tuple[int, ...], seed: int) -> str:
    return hashlib.sha256(f"{seed} {ids}".encode()).hexdigest()
