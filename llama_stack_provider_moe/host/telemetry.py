"""What jobs do, in OpenTelemetry's terms, through the exporter of the host (0.6.1: OTEL_EXPORTER_OTLP_ENDPOINT).

    moe.jobs.submitted      counter          {job}      recipe
    moe.jobs.ended          counter          {job}      recipe, state
    moe.jobs.queue.wait     histogram        s          recipe          from the queue's end to its head
    moe.jobs.run.duration   histogram        s          recipe, state   from the last start to the end
    moe.jobs.active         up-down counter  {job}      recipe, state   that wait (`scheduled`) or run (`in_progress`)
    moe.requests.refused    counter          {request}  method, route, status

Jobs start and end in other processes, so the store is asked, when the exporter collects and never otherwise; without
an exporter nothing happens here. Of several servers that share a state folder one tells of the jobs: whoever holds a
lock. What ends while no server runs is told by none; `exposition` has the figures of all time.
"""

import fcntl
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, get_args

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from llama_stack_provider_moe.jobs.census import Census
from llama_stack_provider_moe.jobs.events import now
from llama_stack_provider_moe.jobs.state import JobState
from llama_stack_provider_moe.jobs.store import Job, JobStore
from llama_stack_provider_moe.spec import Recipe

METER = "llama_stack_provider_moe"
RECIPES: tuple[str, ...] = get_args(Recipe)
ACTIVE = (JobState.SCHEDULED, JobState.IN_PROGRESS)
# Jobs take seconds to days; the SDK's own boundaries are made for milliseconds.
BOUNDARIES_S = (1, 5, 15, 60, 300, 900, 1800, 3600, 7200, 14400, 28800, 86400, 259200)
# A supervisor's clock may be behind ours, and what it commits now bears the time of a moment ago.
OVERLAP = timedelta(minutes=5)


class Telemetry:
    """The instruments of one server process.

    Args:
        meter: of the host's provider.
        store: which is asked when figures are collected.
        lock: a file of the state folder; who holds it tells of the jobs of all its servers.
    """

    def __init__(self, meter: Meter, store: JobStore, lock: Path) -> None:
        self._store = store
        self._lock = lock
        self._held: IO[bytes] | None = None
        self._closed = False
        self._from = self._looked = now()  # what was before is another server's to tell
        self._started: set[tuple[str, datetime | None]] = set()
        self._ended: set[tuple[str, datetime | None]] = set()
        self._jobs_submitted = meter.create_counter("moe.jobs.submitted", "{job}", "Jobs that were taken.")
        self._jobs_ended = meter.create_counter("moe.jobs.ended", "{job}", "Jobs that ended, by how they did.")
        self._queue_wait = meter.create_histogram(
            "moe.jobs.queue.wait", "s", "Time that a job waited before it was started.",
            explicit_bucket_boundaries_advisory=BOUNDARIES_S,
        )  # fmt: skip
        self._run_duration = meter.create_histogram(
            "moe.jobs.run.duration", "s", "Time from a job's last start to its end.",
            explicit_bucket_boundaries_advisory=BOUNDARIES_S,
        )  # fmt: skip
        self._refused = meter.create_counter("moe.requests.refused", "{request}", "Requests answered with an error.")
        meter.create_observable_up_down_counter("moe.jobs.active", [self._active], "{job}", "Jobs that wait or run.")

    def close(self) -> None:
        """Tell nothing more, and let another server tell."""
        self._closed = True
        if self._held is not None:
            self._held.close()

    def submitted(self, job: Job) -> None:
        """A job was taken."""
        self._jobs_submitted.add(1, {"moe.job.recipe": job.recipe})

    def refused(self, method: str, route: str, status: int) -> None:
        """A request was answered with an error; `route` is the path's template, of which there are few."""
        self._refused.add(
            1, {"http.request.method": method, "http.route": route, "http.response.status_code": int(status)}
        )

    def _active(self, _: CallbackOptions) -> Iterable[Observation]:
        """Called by the exporter's thread whenever it collects."""
        moment = now()
        if self._closed or not self._leads():
            self._from = self._looked = moment
            return []
        census = self._store.census(self._looked - OVERLAP)
        self._tell(census)
        self._looked = moment
        known = {*RECIPES, *(recipe for recipe, _ in census.groups)}
        return [
            Observation(group.jobs if group else 0, _about(recipe, state))
            for recipe in sorted(known)
            for state in ACTIVE
            for group in [census.groups.get((recipe, state))]
        ]

    def _leads(self) -> bool:
        if self._held is None:
            file = self._lock.open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                return False
            self._held = file
        return True

    def _tell(self, census: Census) -> None:
        """Starts and ends that were not told yet."""
        started = {
            (job.id, job.started_at): job
            for job in (*census.running, *census.ended)
            if job.started_at is not None and job.started_at >= self._from
        }
        ended = {
            (job.id, job.ended_at): job
            for job in census.ended
            if job.ended_at is not None and job.ended_at >= self._from
        }
        for key in started.keys() - self._started:
            self._tell_start(started[key])
        for key in ended.keys() - self._ended:
            self._tell_end(ended[key])
        # A start or end that is not in this census is in no later one.
        self._started, self._ended = set(started), set(ended)

    def _tell_start(self, job: Job) -> None:
        if _began(job) and job.started_at is not None:
            waited_s = (job.started_at - job.queued_at).total_seconds()
            self._queue_wait.record(waited_s, {"moe.job.recipe": job.recipe})

    def _tell_end(self, job: Job) -> None:
        about = _about(job.recipe, job.state)
        self._jobs_ended.add(1, about)
        if _began(job) and job.started_at is not None and job.ended_at is not None:
            # Two machines' clocks may stand behind the two times, and a histogram takes nothing below 0.
            self._run_duration.record(max(0.0, (job.ended_at - job.started_at).total_seconds()), about)


def _about(recipe: str, state: JobState) -> dict[str, str]:
    return {"moe.job.recipe": recipe, "moe.job.state": state.value}


def _began(job: Job) -> bool:
    """False where it was cancelled while it waited, for the first time or again."""
    return job.started_at is not None and job.started_at >= job.queued_at
