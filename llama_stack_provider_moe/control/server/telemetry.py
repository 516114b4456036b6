"""OpenTelemetry metrics about jobs, sent through the host's exporter (0.6.1: OTEL_EXPORTER_OTLP_ENDPOINT).

    moe.jobs.submitted      counter          {job}      recipe
    moe.jobs.ended          counter          {job}      recipe, state
    moe.jobs.queue.wait     histogram        s          recipe          from entering the queue to the start
    moe.jobs.run.duration   histogram        s          recipe, state   from the last start to the end
    moe.jobs.active         up-down counter  {job}      recipe, state   waiting (`scheduled`) or running (`in_progress`)
    moe.requests.refused    counter          {request}  method, route, status

Jobs start and end in other processes, so this module reads the store, but only when the exporter collects; without an
exporter it does nothing. If several servers share a state folder, the one that holds a lock reports the jobs. No server
reports jobs that end while none runs; `prometheus` has the figures of all time.
"""

import fcntl
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from llama_stack_provider_moe.control.store.job_counts import JobCounts
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.ground.clock import now
from llama_stack_provider_moe.ground.private import Privacy
from llama_stack_provider_moe.jobdir.state import JobState

METER = "llama_stack_provider_moe"
ACTIVE = (JobState.SCHEDULED, JobState.IN_PROGRESS)
# Jobs take seconds to days; the SDK's default boundaries are meant for milliseconds.
BOUNDARIES_S = (1, 5, 15, 60, 300, 900, 1800, 3600, 7200, 14400, 28800, 86400, 259200)
# A supervisor's clock may be behind ours, and it commits a change some time after the time that it records.
OVERLAP = timedelta(minutes=5)


class Telemetry:
    """The instruments of one server process.

    Args:
        meter: a meter of the host's OpenTelemetry provider.
        store: the store to read when the exporter collects.
        lock: a file in the state folder; the server that holds it reports the jobs.
    """

    def __init__(self, meter: Meter, store: JobStore, lock: Path) -> None:
        self._store = store
        self._lock = lock
        self._held: IO[bytes] | None = None
        self._closed = False
        self._from = self._last_read = now()  # another server reports earlier starts and ends
        self._started: set[tuple[str, datetime | None]] = set()
        self._ended: set[tuple[str, datetime | None]] = set()
        self._jobs_submitted = meter.create_counter("moe.jobs.submitted", "{job}", "Accepted jobs.")
        self._jobs_ended = meter.create_counter("moe.jobs.ended", "{job}", "Ended jobs, by final state.")
        self._queue_wait = meter.create_histogram(
            "moe.jobs.queue.wait", "s", "Time that a job waited before its start.",
            explicit_bucket_boundaries_advisory=BOUNDARIES_S,
        )  # fmt: skip
        self._run_duration = meter.create_histogram(
            "moe.jobs.run.duration", "s", "Time from a job's last start to its end.",
            explicit_bucket_boundaries_advisory=BOUNDARIES_S,
        )  # fmt: skip
        self._refused = meter.create_counter("moe.requests.refused", "{request}", "Requests answered with an error.")
        meter.create_observable_up_down_counter("moe.jobs.active", [self._active], "{job}", "Waiting or running jobs.")

    def close(self) -> None:
        """Stop reporting, so that another server can."""
        self._closed = True
        if self._held is not None:
            self._held.close()

    def submitted(self, job: Job) -> None:
        """Count an accepted job."""
        self._jobs_submitted.add(1, {"moe.job.recipe": job.recipe})

    def refused(self, method: str, route: str, status: int) -> None:
        """Count a request answered with an error; `route` is the path's template, which keeps the series few."""
        self._refused.add(
            1, {"http.request.method": method, "http.route": route, "http.response.status_code": int(status)}
        )

    def _active(self, _: CallbackOptions) -> Iterable[Observation]:
        """Collect the figures; the exporter's thread calls this."""
        moment = now()
        if self._closed or not self._leads():
            self._from = self._last_read = moment
            return []
        job_counts = self._store.job_counts(self._last_read - OVERLAP)
        self._record(job_counts)
        self._last_read = moment
        from llama_stack_provider_moe.spec.recipes import RECIPES  # not at a start: it loads every model of a job

        known = {*RECIPES, *(recipe for recipe, _ in job_counts.groups)}
        return [
            Observation(group.jobs if group else 0, _about(recipe, state))
            for recipe in sorted(known)
            for state in ACTIVE
            for group in [job_counts.groups.get((recipe, state))]
        ]

    def _leads(self) -> bool:
        if self._held is None:
            file = Privacy().appended(self._lock)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                return False
            self._held = file
        return True

    def _record(self, job_counts: JobCounts) -> None:
        """Record the starts and ends that were not recorded yet."""
        started = {
            (job.id, job.started_at): job
            for job in (*job_counts.running, *job_counts.ended)
            if job.started_at is not None and job.started_at >= self._from
        }
        ended = {
            (job.id, job.ended_at): job
            for job in job_counts.ended
            if job.ended_at is not None and job.ended_at >= self._from
        }
        for key in started.keys() - self._started:
            self._record_start(started[key])
        for key in ended.keys() - self._ended:
            self._record_end(ended[key])
        # A start or end that is missing from this job_counts is missing from all later ones.
        self._started, self._ended = set(started), set(ended)

    def _record_start(self, job: Job) -> None:
        if _began(job) and job.started_at is not None:
            waited_s = (job.started_at - job.queued_at).total_seconds()
            self._queue_wait.record(waited_s, {"moe.job.recipe": job.recipe})

    def _record_end(self, job: Job) -> None:
        about = _about(job.recipe, job.state)
        self._jobs_ended.add(1, about)
        if _began(job) and job.started_at is not None and job.ended_at is not None:
            # The two times may come from the clocks of two machines, and a histogram accepts nothing below 0.
            self._run_duration.record(max(0.0, (job.ended_at - job.started_at).total_seconds()), about)


def _about(recipe: str, state: JobState) -> dict[str, str]:
    return {"moe.job.recipe": recipe, "moe.job.state": state.value}


def _began(job: Job) -> bool:
    """False where the job was cancelled while it waited, for the first time or after a resumption."""
    return job.started_at is not None and job.started_at >= job.queued_at
