"""`SweepTable`: sweeps, whose jobs are ordinary jobs. A sweep has no state of its own: it follows from its jobs.

All jobs of a sweep are inserted in one transaction, so a sweep never starts a job twice and never lacks one. The queue
passes over the jobs of a sweep of which `max_parallel` run (`queue`).
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from llama_stack_provider_moe.control.store import (
    group_rows,
    lease,
    limits,
    outbox,
    parent_jobs,
    queue,
    sweep_ranking,
    trial_rows,
)
from llama_stack_provider_moe.control.store.job_row import Job, as_job
from llama_stack_provider_moe.control.store.parent_jobs import NewJob
from llama_stack_provider_moe.control.store.schema import (
    TableRow,
    jobs_table,
    sweeps_table,
    trial_figures_table,
    trials_table,
)
from llama_stack_provider_moe.control.store.trial_rows import Trial
from llama_stack_provider_moe.errors import Conflict
from llama_stack_provider_moe.ground.clock import now
from llama_stack_provider_moe.jobdir.reading import read_as
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.limits_config import LimitsConfig
from llama_stack_provider_moe.spec.notify import SWEEP_ENDED, SweepNotify

log = logging.getLogger(__name__)
CANCELLED_WAITING = "cancelled with its sweep before it started"
NO_PLAN: dict[str, Any] = {
    "metric": "validation_loss", "direction": "minimize", "parameters": {}, "random": None, "seed": 0, "halving": None,
    "evaluations": 0,
}  # fmt: skip
_S, _T, _J, _F = sweeps_table.c, trials_table.c, jobs_table.c, trial_figures_table.c


@dataclass(frozen=True)
class SweepRow:
    """A sweep as the store knows it."""

    id: str
    owner: str
    created_at: datetime
    cancel_requested_at: datetime | None
    max_parallel: int
    plan: dict[str, Any]  # what was asked for, without the job itself


class NewSweep(NamedTuple):
    """A sweep to be inserted.

    Attributes:
        id: Unique among the sweeps of all owners.
        owner: The only user who will see it.
        max_parallel: How many of its jobs may run at once.
        plan: What was asked for, for JSON.
        jobs: Its jobs, each with the values of its swept settings.
    """

    id: str
    owner: str
    max_parallel: int
    plan: dict[str, Any]
    jobs: Sequence[tuple[NewJob, dict[str, Any]]]


class SweepState(NamedTuple):
    """A sweep, and the states of its jobs."""

    sweep: SweepRow
    counts: dict[JobState, int]

    @property
    def state(self) -> JobState:
        """State of the sweep: completed if any of its jobs completed and none will run any more."""
        unfinished = group_rows.unfinished(self.counts)
        if unfinished is not None:
            return unfinished
        if self.sweep.cancel_requested_at is not None:
            return JobState.CANCELLED
        order = (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)
        return next((state for state in order if self.counts.get(state)), JobState.UNREADABLE)


class SweepDetail(NamedTuple):
    """A sweep, its trials by number, and their jobs by id."""

    found: SweepState
    trials: list[Trial]
    jobs: dict[str, Job]


class UnreadTrial(NamedTuple):
    """A job of a sweep that has started, whose figures are not all in the store."""

    job: Job
    sweep: SweepRow


# Decides about a trial of a sweep that has just got a figure: (trials of the sweep, the trial) -> (end it, new state).
Prune = Callable[[list[Trial], Trial], tuple[bool, dict[str, Any]]]
Jobs = list[Job]  # inside the class, `SweepTable.list` hides the built-in
Unread = list[UnreadTrial]


class SweepTable:
    """Sweeps in the store. Each method is one transaction. `owner=None` means any owner.

    Args:
        reading: Engine for transactions that only read.
        writing: Engine for transactions that write.
    """

    def __init__(self, reading: Engine, writing: Engine) -> None:
        self._reading = reading
        self._writing = writing

    def add(self, new: NewSweep, owner_limits: LimitsConfig) -> Jobs:
        """Insert a sweep and all its jobs, `scheduled` in their order.

        Raises:
            OverLimit: The jobs would exceed a limit of their owner.
            NotFound: A job that one of them needs was deleted.
            Conflict: The name of the sweep or of one of its jobs is taken.
        """
        try:
            with self._writing.begin() as connection:
                turn = queue.next_turn(connection)
                limits.must_have_left(connection, new.owner, owner_limits, len(new.jobs))
                connection.execute(insert(sweeps_table).values(
                    turn=turn, id=new.id, owner=new.owner, created_at=now(), max_parallel=new.max_parallel,
                    plan=json.dumps(new.plan),
                ))  # fmt: skip
                jobs = []
                for number, (job, chosen) in enumerate(new.jobs):
                    jobs.append(parent_jobs.insert_job(connection, job, queue.next_turn(connection)))
                    connection.execute(insert(trials_table).values(
                        job=job.id, sweep=new.id, number=number, chosen=json.dumps(chosen), is_read=False,
                        pruner_state="{}",
                    ))  # fmt: skip
                return jobs
        except IntegrityError:
            raise Conflict(
                f"sweep {new.id!r}, or a job with its name and a number, exists already; leave out sweep_uuid or "
                "choose another"
            ) from None

    def list(self, owner: str | None, limit: int, after: str | None = None) -> list[SweepState]:
        """Return a page of sweeps, newest first; `after` is the last one of the previous page.

        Raises:
            NotFound: There is no sweep `after`.
        """
        with self._reading.begin() as connection:
            rows = group_rows.page(connection, sweeps_table, owner, limit, after, "sweep")
            counts = group_rows.counts(connection, _J.sweep, [row.id for row in rows])
            return [SweepState(_as_sweep(row), counts.get(row.id, {})) for row in rows]

    def get(self, sweep_id: str, owner: str | None) -> SweepDetail:
        """Return a sweep with its jobs; raise `NotFound` if the owner has none of that name."""
        with self._reading.begin() as connection:
            sweep = _as_sweep(group_rows.find(connection, sweeps_table, sweep_id, owner, "sweep"))
            trials = trial_rows.of_sweep(connection, sweep_id)
            jobs = {row.id: as_job(row) for row in group_rows.jobs_of(connection, _J.sweep, sweep_id)}
            return SweepDetail(SweepState(sweep, group_rows.counted(jobs.values())), trials, jobs)

    def request_cancel(self, sweep_id: str, owner: str | None) -> SweepDetail:
        """Cancel every job of a sweep that waits or runs, in one transaction. You can repeat the request.

        Raises:
            NotFound: The owner has no such sweep.
            Conflict: It has ended, and was not cancelled.
        """
        with self._writing.begin() as connection:
            row = group_rows.find(connection, sweeps_table, sweep_id, owner, "sweep")
            jobs = group_rows.jobs_of(connection, _J.sweep, sweep_id, lock=True)
            state = SweepState(_as_sweep(row), group_rows.counted(jobs)).state
            group_rows.must_be_cancellable("sweep", sweep_id, state)
            group_rows.cancel(connection, sweeps_table, row, jobs, now(), CANCELLED_WAITING)
        return self.get(sweep_id, owner)

    # For the supervisor.

    def unread(self) -> Unread:
        """Return jobs that have started, and whose figures are not all in the store, of all sweeps."""
        query = (
            select(jobs_table)
            .join(trials_table, _T.job == _J.id)
            .where(_T.is_read.is_(False), _J.state != JobState.SCHEDULED.value)
            .order_by(_J.seq)
        )
        with self._reading.begin() as connection:
            jobs = [as_job(row) for row in connection.execute(query)]
            wanted = {job.sweep for job in jobs}
            rows = connection.execute(select(sweeps_table).where(_S.id.in_(wanted))) if wanted else ()
            sweeps = {row.id: _as_sweep(row) for row in rows}
            return [UnreadTrial(job, sweeps[job.sweep]) for job in jobs if job.sweep in sweeps]

    def record(
        self,
        supervisor_id: str,
        job: Job,
        evaluated: Sequence[tuple[int, float | None]],
        is_last: bool,
        prune: Prune | None,
    ) -> int | None:
        """Add figures of a job, and decide after each whether the sweep ends the job.

        Args:
            supervisor_id: Id of the supervisor.
            job: The job.
            evaluated: Step and figure of its evaluations; those that the store has are passed over.
            is_last: The job has ended and these are all its figures.
            prune: Decides; None if no job of the sweep is ended early.

        Returns:
            The number of the evaluation after which the job is ended; None if it goes on.

        Raises:
            LeaseLost: Another supervisor holds the lease.
        """
        pruned_at: int | None = None
        with self._writing.begin() as connection:
            lease.require(connection, supervisor_id)
            row = connection.execute(select(jobs_table).where(_J.id == job.id).with_for_update()).first()
            if row is None:  # deleted meanwhile
                return None
            for step, value in evaluated:
                if not _add_figure(connection, job.id, step, value) or prune is None:
                    continue
                trials = trial_rows.of_sweep(connection, row.sweep)
                mine = next(trial for trial in trials if trial.job == job.id)
                if mine.pruned_at is not None:
                    continue
                ends, state = prune(trials, mine)
                goes_on = row.state == JobState.IN_PROGRESS.value and row.cancel_requested_at is None
                pruned_at = mine.figures[-1].number if ends and goes_on else None
                values = {"pruner_state": json.dumps(state), "pruned_at": pruned_at}
                connection.execute(update(trials_table).where(_T.job == job.id).values(values))
                if pruned_at is not None:
                    end = update(jobs_table).where(_J.seq == row.seq).values(cancel_requested_at=now())
                    connection.execute(end)
                    prune = None  # its later figures are kept, and decide nothing
            if is_last and JobState(row.state).ended and row.attempts == job.attempts:
                connection.execute(update(trials_table).where(_T.job == job.id).values(is_read=True))
                _tell_of_end(connection, row)
        return pruned_at


def _tell_of_end(connection: Connection, last: TableRow) -> None:
    """Write the message about a sweep whose last job has ended, if its owner asked for one.

    Args:
        connection: Transaction in which that job's last figure was read.
        last: The job; the message is listed with it.
    """
    left = select(_T.job).where(_T.sweep == last.sweep, _T.is_read.is_(False)).limit(1)
    found = connection.execute(select(sweeps_table).where(_S.id == last.sweep).with_for_update()).first()
    if found is None or connection.execute(left).first() is not None:
        return
    sweep = _as_sweep(found)
    if sweep.plan.get("notify") is None:
        return
    try:
        asked = read_as(SweepNotify, json.dumps(sweep.plan["notify"]))
    except ValueError:  # damaged: its jobs' ends are recorded all the same
        log.warning("sweep %s: nobody is told of its end, because its `notify` can't be read", sweep.id)
        return
    counts = group_rows.counts(connection, _J.sweep, [sweep.id])[sweep.id]
    states = {job.id: JobState(job.state) for job in group_rows.jobs_of(connection, _J.sweep, sweep.id)}
    best = sweep_ranking.best(trial_rows.of_sweep(connection, sweep.id), states, sweep.plan["direction"])
    data: dict[str, object] = {
        "sweep_uuid": sweep.id,
        "status": SweepState(sweep, counts).state.value,
        "jobs": {state.value: count for state, count in counts.items()},
        "metric": sweep.plan["metric"],
        "best": None,
    }
    if best is not None:
        trial, figure = best
        data["best"] = {"job_uuid": trial.job, "chosen": trial.chosen, "figure": figure}
    outbox.add(connection, last.id, asked.url, SWEEP_ENDED, data)


def _add_figure(connection: Connection, job_id: str, step: int, value: float | None) -> bool:
    """Add the figure of a step, unless the store has one; return whether it is new."""
    known = select(func.count(), func.max(_F.step)).where(_F.job == job_id)
    count, last = connection.execute(known).one()
    if last is not None and step <= last:  # a resumed job evaluates a step again
        return False
    connection.execute(insert(trial_figures_table).values(job=job_id, number=count + 1, step=step, value=value))
    return True


def _as_sweep(row: TableRow) -> SweepRow:
    try:
        plan = NO_PLAN | json.loads(row.plan)
    except (ValueError, TypeError):  # damaged: its jobs can still be seen, cancelled and deleted
        plan = NO_PLAN
    return SweepRow(row.id, row.owner, row.created_at, row.cancel_requested_at, row.max_parallel, plan)
