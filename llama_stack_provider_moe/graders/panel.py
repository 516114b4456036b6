"""All rewards of a job: the values of each answer by grader, their weighted sum, and how many rows may have none.

with panel_of(rewards, grading, judges) as panel:
    for graded in panel.grade(samples):
        graded.values      name -> value; None: the grader is for another class of prompts, or it failed
        graded.failures    name -> why it failed
        graded.total       the weighted sum; None: a grader that is for this prompt failed
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from llama_stack_provider_moe.errors import GraderFailed, InvalidInput
from llama_stack_provider_moe.graders.bench import Bench, Limits
from llama_stack_provider_moe.graders.judges import Judges
from llama_stack_provider_moe.graders.opening import OpenTorch, open_grader
from llama_stack_provider_moe.graders.samples import Failure, Grades, Outcome, Sample
from llama_stack_provider_moe.spec.rewards import PROMPT_CLASSES, Grading, Reward, are_by_class

LEAST_SEEN = 8  # rows of a grader before its share of failures counts


class Graded(NamedTuple):
    """The rewards of one answer.

    Attributes:
        values: by grader; None where it is for another class of prompts, or failed.
        failures: by grader, why it failed.
        total: sum of values times weights; None: a grader of this prompt failed.
        outcomes: by grader that was asked, all that it said.
    """

    values: Mapping[str, float | None]
    failures: Mapping[str, Failure]
    total: float | None
    outcomes: Mapping[str, Outcome]


class FailedShare:
    """Counts the rows that a grader failed on, among the last ones.

    Args:
        name: of the grader.
        limit: largest share.
        window: number of last rows.
    """

    def __init__(self, name: str, limit: float, window: int) -> None:
        self._name, self._limit = name, limit
        self._failed: deque[bool] = deque(maxlen=window)

    def note(self, failures: Sequence[Failure | None]) -> None:
        """Count rows.

        Raises:
            GraderFailed: too many rows failed.
        """
        self._failed.extend(failure is not None for failure in failures)
        share = sum(self._failed) / max(1, len(self._failed))
        told = [failure for failure in failures if failure is not None]
        if told and share > self._limit and len(self._failed) >= min(LEAST_SEEN, self._failed.maxlen or LEAST_SEEN):
            last = told[-1]
            raise GraderFailed(
                f"grader {self._name!r} gave no value for {sum(self._failed)} of the last {len(self._failed)} answers, "
                f"more than grading.max_failed_share {self._limit:g}; the last time: {last.code}: {last.message}"
            )


class Panel:
    """Rewards that are ready; see the module.

    Args:
        rewards: their specs.
        graders: the same, opened.
        grading: limits of failures, and the column of a prompt's class.
    """

    def __init__(self, rewards: Sequence[Reward], graders: Sequence[Grades], grading: Grading) -> None:
        self.rewards = list(rewards)
        self._graders, self._grading = list(graders), grading
        self._shares = [
            FailedShare(each.grader.name, grading.max_failed_share, grading.failed_window) for each in rewards
        ]

    @property
    def names(self) -> list[str]:
        """The graders' names, in order."""
        return [each.grader.name for each in self.rewards]

    @property
    def weights(self) -> list[float]:
        """The graders' weights, in order."""
        return [each.weight for each in self.rewards]

    def grade(self, samples: Sequence[Sample], limits_failures: bool = True) -> list[Graded]:
        """Return the rewards of each answer.

        Args:
            samples: the answers.
            limits_failures: whether too many failures are an error.

        Raises:
            GraderFailed: a grader failed on too many rows.
        """
        found: list[dict[str, Outcome]] = [{} for _ in samples]
        for reward, grader, share in zip(self.rewards, self._graders, self._shares, strict=True):
            mine = [at for at, sample in enumerate(samples) if reward.prompts in (None, self.class_of(sample))]
            outcomes = [sound(each, reward) for each in grader.grade([samples[at] for at in mine])]
            for at, outcome in zip(mine, outcomes, strict=True):
                found[at][reward.grader.name] = outcome
            if limits_failures:
                share.note([outcome.failure for outcome in outcomes])
        return [self._summed(outcomes) for outcomes in found]

    def failures(self, graded: Sequence[Graded]) -> list[list[Failure | None]]:
        """Whether each grader failed on the answers that it was asked about, for `limit_failures`."""
        return [
            [each.outcomes[name].failure for each in graded if name in each.outcomes] for name in self.names
        ]  # fmt: skip

    def limit_failures(self, failures: Sequence[Sequence[Failure | None]]) -> None:
        """Count answers that were graded without a limit, such as those of several processes.

        Args:
            failures: by grader, see `failures`.

        Raises:
            GraderFailed: a grader failed on too many rows.
        """
        for share, each in zip(self._shares, failures, strict=True):
            share.note(each)

    def class_of(self, sample: Sample) -> str | None:
        """Return the class of a row's prompt; None if no reward is by class.

        Raises:
            InvalidInput: the row has none.
        """
        if not are_by_class(self.rewards):
            return None
        given = sample.item.get(self._grading.class_column)
        if given not in PROMPT_CLASSES:
            raise InvalidInput(self._grading.class_column, given, "refuse or help in each row, because rewards are for "
                               "classes of prompts")  # fmt: skip
        return str(given)

    def close(self) -> None:
        """End what graders started."""
        for grader in self._graders:
            grader.close()

    def _summed(self, outcomes: Mapping[str, Outcome]) -> Graded:
        values = {name: outcomes[name].value if name in outcomes else None for name in self.names}
        failures = {name: each.failure for name, each in outcomes.items() if each.failure is not None}
        total = None
        if outcomes and not failures:
            total = math.fsum(
                weight * value for weight, value in zip(self.weights, values.values(), strict=True) if value is not None
            )
        return Graded(values, failures, total, outcomes)


def sound(outcome: Outcome, reward: Reward) -> Outcome:
    """Return an outcome, which is a failure if its value is no number in the grader's range."""
    if outcome.value is None:
        return outcome
    low, high = reward.grader.limits()
    if not math.isfinite(outcome.value):
        return outcome._replace(value=None, failure=Failure("not_finite", f"it gave {outcome.value}"))
    if not low <= outcome.value <= high:
        why = f"it gave {outcome.value:g}; expected {low:g} to {high:g}"
        return outcome._replace(value=None, failure=Failure("out_of_range", why))
    return outcome


@contextmanager
def panel_of(
    rewards: Sequence[Reward], grading: Grading, judges: Judges, open_torch: OpenTorch | None = None
) -> Iterator[Panel]:
    """The rewards, ready inside the `with`.

    Args:
        rewards: their specs.
        grading: how they run.
        judges: that the operator names.
        open_torch: opens graders that need torch; None: they are refused.

    Raises:
        InvalidInput: see `open_grader`.
    """
    bench = Bench(Limits(grading.deadline_s, grading.memory_mb, grading.processes, grading.retries))
    graders: list[Grades] = []
    try:
        for each in rewards:
            graders.append(open_grader(each.grader, bench, judges, open_torch))
        yield Panel(rewards, graders, grading)
    finally:
        for grader in graders:
            grader.close()
        bench.close()
