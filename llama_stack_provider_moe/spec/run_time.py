"""How long a job will train: its answer, and the number of its rows, which measured and estimated times share."""

from collections.abc import Sequence
from typing import Literal, TypedDict

from llama_stack_provider_moe.spec import Data, Domain, GRPOSpec, TrainingSpec
from llama_stack_provider_moe.spec.data import epoch_counts


class RunTime(TypedDict):
    """The time that a job will take to train, without loading, evaluation and export.

    Keys:
        seconds: null if the speed or the number of rows is not known.
        tokens_per_s: of all its processes; null if it is not known.
        source: `measured` on jobs like it, or `estimated` from operations and a device's peak; null without a speed.
        basis: what the figures come from, or why there are none, for people.
    """

    seconds: float | None
    tokens_per_s: float | None
    source: Literal["measured", "estimated"] | None
    basis: str


def rows_a_step(spec: TrainingSpec) -> int:
    """Return the rows (or pairs) of one optimiser step of all processes."""
    return spec.training.batch_size * spec.training.gradient_accumulation_steps * spec.resources.ranks


def rows_in_epoch(spec: TrainingSpec, rows: Sequence[int | None]) -> int | None:
    """Return the training rows of a whole epoch, without those that are held out; None if nothing tells.

    Args:
        spec: the job.
        rows: of each training data set (`Data.training_ids`); None if unknown.
    """
    sets: Sequence[Data | Domain] = spec.data.domains or [spec.data]
    known: list[int] = []
    for each, count in zip(sets, rows, strict=True):
        if count is None:
            return None
        share = spec.options.validation_split if each.validation_dataset_id is None else 0.0
        known.append(max(1, round(count * (1 - share))))
    if spec.data.domain_ratios is not None:  # how many rows each value has is known once they are read
        return None
    if spec.data.domains is None:
        return known[0]
    return sum(epoch_counts(known, [domain.ratio for domain in spec.data.domains], spec.data.exhausted))


def rows_in_run(spec: TrainingSpec, rows: int | None) -> int | None:
    """Return the rows that all epochs learn from (GRPO: answers, each as often as it is); None if nothing tells.

    Args:
        spec: the job.
        rows: of a whole epoch (`rows_in_epoch`); None if unknown.
    """
    training = spec.training
    limit = training.max_steps_per_epoch * rows_a_step(spec) or None
    if rows is not None and isinstance(spec, GRPOSpec):
        rows *= spec.rl.n_generations * spec.rl.n_iterations
    known = [each for each in (rows, limit) if each is not None]
    return min(known) * training.n_epochs if known else None


def run_time(
    speed: float, rows: int | None, tokens_a_row: float, source: Literal["measured", "estimated"], basis: str
) -> RunTime:
    """Return the time at a speed.

    Args:
        speed: tokens a second of all processes.
        rows: of all epochs (`rows_in_run`).
        tokens_a_row: mean number of tokens in a row.
        source: where the speed comes from.
        basis: the same in words.
    """
    if rows is None:
        basis += "; the number of rows is not known (it is for data sets of this server, and with max_steps_per_epoch)"
    seconds = None if rows is None else rows * tokens_a_row / speed
    return {"seconds": seconds, "tokens_per_s": speed, "source": source, "basis": basis}


def unknown_time(why: str) -> RunTime:
    """Return that nothing tells how long a job will take."""
    return {"seconds": None, "tokens_per_s": None, "source": None, "basis": why}
