"""The rows of jobs that belong to sweeps (`trials`), and their held-out figures: parts of the store's transactions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, case, delete, exists, func, select, update

from llama_stack_provider_moe.control.store.schema import (
    TableRow,
    jobs_table,
    sweeps_table,
    trial_figures_table,
    trials_table,
)
from llama_stack_provider_moe.jobdir.state import JobState

_T, _J, _S, _F = trials_table.c, jobs_table.c, sweeps_table.c, trial_figures_table.c
RESUMED = 0  # `pruned_at` of a job that its sweep ended and somebody resumed


@dataclass(frozen=True)
class TrialFigure:
    """The figure of one evaluation of a trial; `value` is None for one that is not a number."""

    number: int
    step: int
    value: float | None


@dataclass(frozen=True)
class Trial:
    """A job of a sweep, as the sweep sees it."""

    job: str
    sweep: str
    number: int
    chosen: dict[str, Any]
    pruned_at: int | None  # number of the evaluation after which the sweep ended it; `RESUMED`
    pruner_state: dict[str, Any]
    figures: tuple[TrialFigure, ...]  # by number


def of_sweep(connection: Connection, sweep_id: str) -> list[Trial]:
    """Return the trials of a sweep with their figures, by number."""
    figures: dict[str, list[TrialFigure]] = {}
    of_these = select(_T.job).where(_T.sweep == sweep_id)
    query = select(trial_figures_table).where(_F.job.in_(of_these)).order_by(_F.job, _F.number)
    for row in connection.execute(query):
        figures.setdefault(row.job, []).append(TrialFigure(row.number, row.step, row.value))
    rows = connection.execute(select(trials_table).where(_T.sweep == sweep_id).order_by(_T.number))
    return [_as_trial(row, tuple(figures.get(row.job, ()))) for row in rows]


def _as_trial(row: TableRow, figures: tuple[TrialFigure, ...]) -> Trial:
    chosen, state = _object(row.chosen), _object(row.pruner_state)
    return Trial(row.job, row.sweep, row.number, chosen, row.pruned_at, state, figures)


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, TypeError):  # a damaged row
        return {}
    return found if isinstance(found, dict) else {}


def forget(connection: Connection, job_ids: Sequence[str]) -> None:
    """Delete what the store knows of deleted jobs as trials, and sweeps that have no job any more."""
    connection.execute(delete(trial_figures_table).where(_F.job.in_(job_ids)))
    of_these = select(_T.sweep).where(_T.job.in_(job_ids)).distinct()
    sweeps = list(connection.execute(of_these).scalars())
    if sweeps:
        connection.execute(delete(trials_table).where(_T.job.in_(job_ids)))
        left = exists().where(_T.sweep == _S.id)
        connection.execute(delete(sweeps_table).where(_S.id.in_(sweeps), ~left))


def may_change(connection: Connection, job_id: str) -> None:
    """Note that a job will run again: its figures are read again, and its sweep does not end it a second time."""
    resumed = case((_T.pruned_at.is_not(None), RESUMED))
    connection.execute(update(trials_table).where(_T.job == job_id).values(is_read=False, pruned_at=resumed))


def are_unread(connection: Connection) -> bool:
    """Return whether a job of a sweep has ended and its figures are not all in the store."""
    ended = [state.value for state in JobState if state.ended]
    query = select(_T.job).join(jobs_table, _J.id == _T.job).where(_T.is_read.is_(False), _J.state.in_(ended))
    return connection.execute(query.limit(1)).first() is not None


def full_sweeps(connection: Connection) -> list[str]:
    """Return the sweeps of which as many jobs run as may."""
    query = (
        select(_J.sweep)
        .join(sweeps_table, _S.id == _J.sweep)
        .where(_J.state == JobState.IN_PROGRESS.value)
        .group_by(_J.sweep, _S.max_parallel)
        .having(func.count() >= _S.max_parallel)
    )
    return list(connection.execute(query).scalars())


def not_in(sweeps: Sequence[str]) -> ColumnElement[bool]:
    """Condition on `jobs_table`: the job belongs to none of these sweeps."""
    return _J.sweep.is_(None) | _J.sweep.not_in(sweeps)


def why_cancelled(connection: Connection, row: TableRow, reason: str | None) -> str | None:
    """Return the reason of a cancelled job; if its sweep ended it, the text says so."""
    if row.sweep is None:
        return reason
    found = connection.execute(select(_T.pruned_at).where(_T.job == row.id)).scalar_one_or_none()
    if not found:  # or it was resumed afterwards
        return reason
    why = f"its sweep {row.sweep} ended it after evaluation {found}, because other jobs did better"
    return why if reason is None else f"{why}; {reason}"
