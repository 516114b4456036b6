"""The process that runs the jobs: claims, launches, watches, cancels, settles. It never imports torch.

It keeps nothing that the store does not: each look begins with the store's jobs in progress, so a supervisor that
takes over from a dead one does with its children what it does with its own. Run as

    python -m llama_stack_provider_moe.jobs.supervisor [FD]   with a ProviderConfig as JSON on standard input

where FD, if given, is a file descriptor to close once it is known whether this process is the store's supervisor.
"""

import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from llama_stack_provider_moe.config import ProviderConfig
from llama_stack_provider_moe.errors import Conflict
from llama_stack_provider_moe.jobs import disk
from llama_stack_provider_moe.jobs.devices import given_out
from llama_stack_provider_moe.jobs.executors import Child, Executor, Exit
from llama_stack_provider_moe.jobs.executors.named import Executors
from llama_stack_provider_moe.jobs.folder import JobFolder
from llama_stack_provider_moe.jobs.handover import prepare_export
from llama_stack_provider_moe.jobs.outcome import REASON_LIMIT, Outcome, outcome
from llama_stack_provider_moe.jobs.output import bound
from llama_stack_provider_moe.jobs.processes import Place, ProcessName
from llama_stack_provider_moe.jobs.removal import remove_older
from llama_stack_provider_moe.jobs.state import JobState
from llama_stack_provider_moe.jobs.store import CANCELLED_WAITING, Job, JobStore, LiveSupervisor
from llama_stack_provider_moe.jobs.watchdog import WallClock, Watchdog

# A job on another machine, whose processes can't be seen from here, is taken for dead after this silence.
SILENCE_S = 600.0
# A store that answers with errors for so long is given up; the children go on, for the next supervisor to adopt.
GIVE_UP_S = 600.0
# Between two looks for jobs that ended long ago.
RETENTION_LOOK_S = 3600.0
# A clock that was set by more, nobody knows which way, tells no ages to delete by.
CLOCK_TOLERANCE_S = 3600.0
LOG_LIMIT_BYTES = 5 << 20
_RECORD_LIMIT = 8000  # characters

log = logging.getLogger("llama_stack_provider_moe.supervisor")


class Supervisor:
    """One supervisor of one store.

    Args:
        store: where jobs wait.
        config: how many at a time, how long a lease, ...
        executor: what runs the jobs of this machine; left out: `LocalExecutor`.
    """

    def __init__(self, store: JobStore, config: ProviderConfig, executor: Executor | None = None) -> None:
        self._store = store
        self._config = config
        self._limits = config.supervisor
        self._executors = Executors(config, executor)
        self._place = Place.here()
        self.id = str(ProcessName.own())
        self._leaving = False
        self._idle = False
        self._devices = given_out(config, os.environ)
        self._watchdog = Watchdog()
        self._asked_to_stop: dict[str, float] = {}  # job id -> time.monotonic() of its SIGTERM
        self._given_up: dict[str, str] = {}  # job id -> why we stopped it, where nobody asked us to
        self._unsettled: dict[Child, Outcome] = {}  # how it ended is told once; the store may not take it just now
        self._clock = WallClock()
        self._retention_due = 0.0  # time.monotonic()

    def acquire(self) -> bool:
        """Become the store's supervisor; False while another one lives.

        A lease that has run out by the wall clock may be a live one's, if somebody has set the clock: its holder gets
        the time for one more beat.
        """
        holder = self._store.last_supervisor()
        if holder is not None and _has_ended(holder):
            self._store.release_lease(holder.id, only_if_idle=False)
        elif holder is not None and holder.id != self.id and self._store.live_supervisor() is None:
            until = time.monotonic() + holder.lease_s / 2  # it beats each third
            while not self._leaving and time.monotonic() < until and self._store.last_supervisor() == holder:
                self._pause(0.1)
        return self._store.acquire_lease(self.id, os.getpid(), self._limits.lease_s)

    def leave(self) -> None:
        """Make `run` return soon, from a signal handler or another thread; children go on."""
        self._leaving = True

    def run(self) -> bool:
        """Run jobs until there are none for `idle_exit_s`, the lease is lost, or `leave` is called.

        Returns False where the store failed for too long. The lease must be held.
        """
        beat_due = idle_since = last_success = time.monotonic()
        while not self._leaving:
            moment = time.monotonic()
            try:
                if moment >= beat_due:
                    if not self._store.beat(self.id, self._limits.lease_s):
                        log.warning("another supervisor has the lease; leaving")
                        return True
                    beat_due = moment + self._limits.lease_s / 3
                if moment >= self._retention_due:
                    self._forget_old()
                if self.step():
                    idle_since = time.monotonic()
                elif time.monotonic() - idle_since >= self._limits.idle_exit_s and self._store.release_lease(
                    self.id, only_if_idle=True
                ):
                    log.info("idle for %g s; leaving", self._limits.idle_exit_s)
                    return True
                last_success = time.monotonic()
            except Exception:
                log.exception("the store, or something else that jobs stand on, failed; trying again")
                # A full disk is waited out: nobody else would see to the jobs once there is room again.
                if time.monotonic() - last_success > GIVE_UP_S and disk.full(self._config.state_dir) is None:
                    log.error("giving up")
                    return False
            self._pause(self._limits.poll_s)
        self._store.release_lease(self.id, only_if_idle=False)
        log.info("asked to leave; jobs in progress go on")
        return True

    def _pause(self, seconds: float) -> None:
        # No threading.Event: its `set` in a signal handler can wait for a lock that the interrupted `wait` holds.
        until = time.monotonic() + seconds
        while not self._leaving and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.5))

    def step(self) -> bool:
        """One look at every job in progress, then claims while there is room; True where any job is in progress."""
        changed = self._store.has_changed()  # asked before the queries: what comes between is seen the next time
        if self._idle and not changed:
            return False
        self._idle = False
        running = sum([self._tend(job) for job in self._store.running()])
        if not self._leaving and running < self._limits.max_concurrent_jobs:
            self._refuse_the_impossible()
        while not self._leaving and running < self._limits.max_concurrent_jobs:
            job = self._store.claim(self.id, self._devices)
            if job is None:
                break
            log.info("job %s: claimed, attempt %d, devices %r", job.id, job.attempts, job.devices)
            running += self._launch(job)
        self._idle = running == 0 and not self._leaving
        return running > 0

    def _refuse_the_impossible(self) -> None:
        there_are = len(self._devices or ())
        for job in self._store.asking_for_more(there_are):
            reason = (
                f"it asks for {job.gpus} GPUs (`resources.gpus`), and the machine that runs the jobs gives out "
                f"{there_are or 'none'}; see `supervisor.devices`"
            )
            self._settle(job, Outcome(JobState.FAILED, reason, job.artifacts))

    def _tend(self, job: Job) -> bool:
        """True where the job is still in progress afterwards."""
        child = Child.of(job)
        if child is None:
            # Whoever claimed it died before its process was let go.
            if job.cancel_requested_at is not None:
                return self._settle(job, Outcome(JobState.CANCELLED, CANCELLED_WAITING, job.artifacts))
            return self._launch(job)
        launcher = None if job.supervisor is None or child.run is not None else ProcessName.parse(job.supervisor)
        if launcher is not None and launcher.place != self._place:
            return self._tend_elsewhere(job, child, launcher.place.host)
        end = None if child in self._unsettled else self._executors[job.executor].poll(child)
        if end is not None or child in self._unsettled:
            return self._end(job, child, end)
        self._bound(job)
        if job.cancel_requested_at is not None:
            self._stop(job, child, "cancelling")
        elif self._has_stalled(job, child):
            self._stop(job, child, self._given_up[job.id])
        return True

    def _end(self, job: Job, child: Child, end: Exit | None) -> bool:
        """Settle a job whose process is gone. `end` is told once, and kept until the store has taken it."""
        if end is not None and child not in self._unsettled:
            self._unsettled[child] = self._outcome(job, end)  # sees a full disk, before there is room again
        disk.clear_unfinished(JobFolder(child.folder))
        self._bound(job)
        self._settle(job, self._unsettled[child])
        del self._unsettled[child]
        return False

    def _bound(self, job: Job) -> None:
        if bound(JobFolder(Path(job.folder)).output, self._limits.max_log_bytes):
            log.info("job %s: the middle of its output was cut out (`supervisor.max_log_bytes`)", job.id)

    def _tend_elsewhere(self, job: Job, child: Child, host: str) -> bool:
        if host == self._place.host:  # this machine or container, before it was restarted
            return self._end(job, child, Exit(None))
        if self._watchdog.silent_s(job.id, JobFolder(child.folder)) < SILENCE_S:
            return True
        # Not tried again: nobody knows that it does not run any more, and two would write into one folder.
        self._given_up[job.id] = (
            f"no sign of life for {SILENCE_S / 60:g} minutes from its process on machine {host!r}, which can't be seen "
            "from the one that runs the jobs now; resume it once it has ended there"
        )
        return self._settle(job, self._outcome(job, Exit(None)))

    def _outcome(self, job: Job, end: Exit) -> Outcome:
        return outcome(job, end, self._limits.max_attempts, self._given_up.get(job.id))

    def _launch(self, job: Job) -> bool:
        def record(child: Child) -> None:
            if child.run is not None:
                self._store.launched(job.id, None, None, child.run)
            else:
                self._store.launched(job.id, child.pid, child.birth)

        folder = Path(job.folder)
        try:
            if job.attempts > 1:  # an earlier start, of a job that was resumed, may have left one that did not count
                JobFolder(folder).manifest.unlink(missing_ok=True)
            if not self._executors[job.executor].submit(folder, record, job.devices):
                return True
        except Conflict as conflict:
            log.warning("%s", conflict)
            return True
        except OSError as error:
            reason = f"the training process could not be started: {error}"[:REASON_LIMIT]
            return self._settle(job, Outcome(JobState.FAILED, reason, job.artifacts))
        log.info("job %s: launched", job.id)
        return True

    def _has_stalled(self, job: Job, child: Child) -> bool:
        limit_s = self._limits.stall_s
        if job.id not in self._given_up:
            if limit_s == 0 or self._watchdog.silent_s(job.id, JobFolder(child.folder)) < limit_s:
                return False
            self._given_up[job.id] = (
                f"no sign of life for {limit_s / 60:.3g} minutes (`supervisor.stall_s`); stalled, and was stopped"
            )
        return True

    def _stop(self, job: Job, child: Child, why: str) -> None:
        asked = self._asked_to_stop.get(job.id)
        if asked is None:
            log.info("job %s: %s", job.id, why)
            self._asked_to_stop[job.id] = time.monotonic()
            self._executors[job.executor].stop(child, signal.SIGTERM)
        elif time.monotonic() - asked >= self._limits.cancel_grace_s:
            self._executors[job.executor].stop(child, signal.SIGKILL)

    def _settle(self, job: Job, end: Outcome) -> bool:
        self._asked_to_stop.pop(job.id, None)
        self._given_up.pop(job.id, None)
        self._watchdog.forget(job.id)
        try:
            if end.state is JobState.SCHEDULED:
                self._store.requeue(job.id, end.reason or "", end.artifacts)
            elif end.state is JobState.COMPLETED:
                self._complete(job, end)
            else:
                self._store.move(job.id, end.state, end.reason, end.artifacts, end.stopped_by)
        except Conflict as conflict:  # cancelled just now; or a supervisor that had lost the lease was quicker
            log.warning("%s", conflict)
            return False
        log.info("job %s: %s%s", job.id, end.state.value, f" ({end.reason})" if end.reason else "")
        return False

    def _complete(self, job: Job, end: Outcome) -> None:
        export, reason = None, end.reason
        try:
            export = prepare_export(self._store, job)
        except ValueError as error:
            reason = f"completed, but not exported: {error}"[:REASON_LIMIT]
        self._store.move(job.id, end.state, reason, end.artifacts, end.stopped_by, export)
        if export is not None:
            log.info("job %s: its export is job %s", job.id, export.id)

    def _forget_old(self) -> None:
        moved_s = self._clock.moved_s()
        if self._limits.retention_days is not None and abs(moved_s) > CLOCK_TOLERANCE_S:
            log.warning("the clock was set by %+.0f s: this supervisor deletes nothing for its age any more", moved_s)
            self._retention_due = time.monotonic() + RETENTION_LOOK_S
            return
        removed = remove_older(self._store, self._config)
        if removed:
            log.info("deleted after %g days: %s", self._limits.retention_days, " ".join(removed))
        else:
            self._retention_due = time.monotonic() + RETENTION_LOOK_S


def _has_ended(holder: LiveSupervisor) -> bool:
    name = ProcessName.parse(holder.id)
    return name is not None and name.has_ended()


def ensure_supervisor(config: ProviderConfig, store: JobStore) -> bool:
    """Start a supervisor unless one lives or starts already; to be called after a job is inserted.

    Safe in any number of servers and threads at once: one lock file allows one start at a time, and of two supervisors
    that start all the same, the one that does not get the lease ends. The new process is detached: it outlives the
    server, and its output goes to `supervisor.log` in the state folder.

    Returns:
        True where one was started.
    """
    holder = store.live_supervisor()
    if not config.supervisor.start or (holder is not None and not _has_ended(holder)):
        return False
    config.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (config.state_dir / "supervisor.starting").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # It will have the lease before it lets go of the lock, and then see the job that we were called for.
            return False
        _start(config, lock.fileno())
    return True


def _start(config: ProviderConfig, lock: int) -> None:
    path = config.state_dir / "supervisor.log"
    if path.exists() and path.stat().st_size > LOG_LIMIT_BYTES:
        path.replace(path.with_suffix(".log.1"))
    with path.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, str(lock)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),  # the lock is let go when this server and the supervisor have both closed it
        )
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin:  # it has died, and supervisor.log says of what
        process.stdin.write(config.model_dump_json().encode())
    # Reaped by a thread that sleeps until then: a server lives long, and would collect zombies.
    threading.Thread(target=process.wait, name="moe-supervisor", daemon=True).start()


class _BoundedFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return super().format(record)[:_RECORD_LIMIT]


def supervise(config: ProviderConfig, lock: int | None = None) -> int:
    """Be a supervisor until it is time to leave, logging to standard error; the process's exit code.

    Args:
        config: the provider's.
        lock: file descriptor to close once the lease is held, or held by another.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_BoundedFormatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    store = JobStore(config.url)
    try:
        supervisor = Supervisor(store, config)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: supervisor.leave())
        acquired = supervisor.acquire()
        if lock is not None:
            os.close(lock)
        if not acquired:
            log.info("another supervisor is alive; leaving")
            return 0
        log.info("supervisor of %s", config.state_dir)
        return 0 if supervisor.run() else 1
    finally:
        store.close()


def main() -> int:
    """Read the configuration from standard input, then supervise."""
    config = ProviderConfig.model_validate_json(sys.stdin.buffer.read())
    return supervise(config, int(sys.argv[1]) if len(sys.argv) > 1 else None)


if __name__ == "__main__":
    sys.exit(main())
