"""Which job of a sweep is better: by its last held-out figure, or by the one that it was ended for."""

from collections.abc import Mapping, Sequence

from llama_stack_provider_moe.control.store.trial_rows import Trial, TrialFigure
from llama_stack_provider_moe.jobdir.state import JobState


def in_order(trials: Sequence[Trial], states: Mapping[str, JobState], direction: str) -> list[Trial]:
    """Return the trials whose jobs exist, the best first.

    Completed jobs come before jobs that were ended early, failed, or still run: those are ranked by the evaluation that
    they reached, then by its figure. Jobs without a figure come last, in the order of their combinations.

    Args:
        trials: of one sweep.
        states: of its jobs, by id.
        direction: `minimize` or `maximize`.
    """
    sign = -1.0 if direction == "maximize" else 1.0

    def place(trial: Trial) -> tuple[bool, bool, int, float, int]:
        is_completed = states[trial.job] is JobState.COMPLETED
        last = ranking(trial, is_completed)
        figure = None if last is None else last.value
        reached = 0 if last is None or is_completed else -last.number
        return (figure is None, not is_completed, reached, sign * (figure or 0.0), trial.number)

    return sorted((trial for trial in trials if trial.job in states), key=place)


def best(trials: Sequence[Trial], states: Mapping[str, JobState], direction: str) -> tuple[Trial, float] | None:
    """Return the best completed trial with its figure; None: no completed job has one."""
    for trial in in_order(trials, states, direction):
        figure = ranking(trial, is_completed=True)
        if states[trial.job] is JobState.COMPLETED and figure is not None and figure.value is not None:
            return trial, figure.value
    return None


def ranking(trial: Trial, is_completed: bool) -> TrialFigure | None:
    """The figure that ranks a job: its last one; of a job that was ended early, the one that it was ended for.

    Until it stops, such a job may go on to the next evaluation, which says nothing about the others.
    """
    if trial.pruned_at and not is_completed:
        return next((each for each in trial.figures if each.number == trial.pruned_at), None)
    return trial.figures[-1] if trial.figures else None
