"""`SweepWatch`: reads the held-out figures of the jobs of sweeps, and ends jobs that do worse than others.

A job's events are the source, and the store keeps the figures: a supervisor that takes over reads the events from the
beginning, and passes over the figures that the store has.
"""

import json
import logging
import math
from pathlib import Path

from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.control.store.sweep_rows import Prune, SweepRow
from llama_stack_provider_moe.control.supervisor.pruner import EXTRA, Pruner, is_installed
from llama_stack_provider_moe.jobdir.events import Evaluation
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.reading import read_as
from llama_stack_provider_moe.jobdir.scan import evaluations_from
from llama_stack_provider_moe.spec.sweeps import Halving

log = logging.getLogger("llama_stack_provider_moe.supervisor")


class SweepWatch:
    """The sweeps of one store. Only the supervisor that holds the lease may call it.

    Args:
        store: The store.
        supervisor_id: Id of the supervisor.
    """

    def __init__(self, store: JobStore, supervisor_id: str) -> None:
        self._store = store
        self._id = supervisor_id
        self._cursors: dict[str, int] = {}  # attempt of a job -> bytes of its events that were read
        self._pruners: dict[str, Prune | None] = {}  # by sweep

    def look(self) -> None:
        """Read new figures of every job of a sweep that has started, and decide about the job."""
        unread = self._store.sweeps.unread()
        for job, sweep in unread:
            self._read(job, sweep)
        waiting = {job.id for job, _ in unread}
        self._cursors = {job_id: cursor for job_id, cursor in self._cursors.items() if job_id in waiting}

    def _read(self, job: Job, sweep: SweepRow) -> None:
        start = self._cursors.get(job.id, 0)
        found, cursor = _new_evaluations(job, start)
        if cursor == start and not job.state.ended:
            return
        # Step 0 is before training, and the same for every job.
        figures = [(each.step, _figure(each, sweep.plan["metric"])) for each in found if each.step > 0]
        if figures or job.state.ended:
            pruned_at = self._store.sweeps.record(self._id, job, figures, job.state.ended, self._prune_of(sweep))
            if pruned_at is not None:
                log.info("job %s: sweep %s ends it after evaluation %d", job.id, sweep.id, pruned_at)
        self._cursors[job.id] = cursor

    def _prune_of(self, sweep: SweepRow) -> Prune | None:
        if sweep.plan.get("halving") is None:
            return None
        if sweep.id not in self._pruners:
            self._pruners[sweep.id] = None
            if is_installed():
                halving = read_as(Halving, json.dumps(sweep.plan["halving"]))
                self._pruners[sweep.id] = Pruner(sweep, halving, sweep.plan["evaluations"]).decide
            else:  # the server had it when it accepted the sweep
                log.error("sweep %s: no job ends early, because Optuna is not installed here; %s", sweep.id, EXTRA)
        return self._pruners[sweep.id]


def _figure(event: Evaluation, metric: str) -> float | None:
    value = event.metrics.get(metric.removeprefix("eval_"))
    return None if value is None or not math.isfinite(value) else value


def _new_evaluations(job: Job, cursor: int) -> tuple[list[Evaluation], int]:
    """Return the evaluations of a job from a byte of its events on, and where they end; none if they can't be read."""
    events = JobFolder(Path(job.folder)).events
    found: list[Evaluation] = []
    try:
        if events.is_symlink() or (not job.state.ended and events.stat().st_size <= cursor):
            return found, cursor
        while True:
            more, end = evaluations_from(events, cursor)
            found += more
            if end == cursor:
                return found, cursor
            cursor = end
    except OSError:  # one job's folder must not stop the supervisor
        return found, cursor
