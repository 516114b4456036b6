"""The process that runs the jobs: it claims, launches, watches and cancels them, and records their ends, without torch.

All state is in the store: each step begins with the store's jobs in progress. So a supervisor that takes over from a
dead one treats that one's processes like its own. Run it as

    python -m llama_stack_provider_moe.control.supervisor.supervisor [FD]

with a ProviderConfig as JSON on standard input. FD is an optional file descriptor to close once it is known whether
this process is the store's supervisor.
"""

import logging
import os
import signal
import sys
import time
from pathlib import Path

from llama_stack_provider_moe.control.store import disk
from llama_stack_provider_moe.control.store.state_folder import claim_state_folder, require_same_store
from llama_stack_provider_moe.control.store.store import CANCELLED_WAITING, Job, JobStore, NewJob
from llama_stack_provider_moe.control.store.transitions import Fence, First
from llama_stack_provider_moe.control.supervisor.devices import given_out
from llama_stack_provider_moe.control.supervisor.executors import Child, Executor, Exit
from llama_stack_provider_moe.control.supervisor.executors.registry import Executors
from llama_stack_provider_moe.control.supervisor.export_handover import prepare_export
from llama_stack_provider_moe.control.supervisor.failure_log import BoundedFormatter, FailureLog
from llama_stack_provider_moe.control.supervisor.late_resolution import LateResolution
from llama_stack_provider_moe.control.supervisor.launching import launch
from llama_stack_provider_moe.control.supervisor.outcome import REASON_LIMIT, Outcome, outcome
from llama_stack_provider_moe.control.supervisor.playground_room import PlaygroundRoom
from llama_stack_provider_moe.control.supervisor.processes import PidScope, ProcessName
from llama_stack_provider_moe.control.supervisor.removal import Retention
from llama_stack_provider_moe.control.supervisor.starting import has_ended
from llama_stack_provider_moe.control.supervisor.sweep_watch import SweepWatch
from llama_stack_provider_moe.control.supervisor.watchdog import Watchdog
from llama_stack_provider_moe.control.supervisor.webhooks import WebhookSender
from llama_stack_provider_moe.errors import Conflict, InvalidInput, LeaseLost, NotFound, StoreReplaced
from llama_stack_provider_moe.ground.redaction import known_secrets, scrubbed
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.output import bound
from llama_stack_provider_moe.jobdir.reading import read_as
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.server_config import ProviderConfig

# A job on another machine, whose processes can't be seen from here, counts as dead after this silence.
SILENCE_S = 600.0
# After this time of store errors the supervisor exits. Its child processes continue, and the next one adopts them.
GIVE_UP_S = 600.0

log = logging.getLogger("llama_stack_provider_moe.supervisor")


class Supervisor:
    """One supervisor of one store.

    Args:
        store: The store with the jobs.
        config: The provider's configuration.
        executor: What runs the jobs of this machine; by default a `LocalExecutor`.
    """

    def __init__(self, store: JobStore, config: ProviderConfig, executor: Executor | None = None) -> None:
        self._store = store
        self._config = config
        self._limits = config.supervisor
        self._executors = Executors(config, executor)
        self._place = PidScope.here()
        self.id = str(ProcessName.current())
        self._leaving = False
        self._idle = False
        self._devices = given_out(config, os.environ)
        self._watchdog = Watchdog()
        self._asked_to_stop: dict[str, float] = {}  # job id -> time.monotonic() of its SIGTERM
        self._given_up: dict[str, str] = {}  # job id -> why the supervisor stopped it without a request
        self._unsettled: dict[Child, Outcome] = {}  # ends not recorded yet: executors report each end only once
        self._retention = Retention(store, config)
        self._sweeps = SweepWatch(store, self.id)
        self._waiting = LateResolution(store, config, self.id)
        self._playgrounds = PlaygroundRoom(store, self._devices, config.limits)
        self._failures = FailureLog(log, config.state_dir)
        self._disk_is_full = False

    def acquire(self) -> bool:
        """Become the store's supervisor; return False if another one is alive.

        If somebody set the wall clock, a lease may seem expired although its holder is alive. So the holder gets time
        for one more heartbeat.
        """
        holder = self._store.last_supervisor()
        if holder is not None and has_ended(holder):
            self._store.release_lease(holder.id, only_if_idle=False)
        elif holder is not None and holder.id != self.id and self._store.live_supervisor() is None:
            until = time.monotonic() + holder.lease_s / 2  # it renews the lease three times per lease_s
            while not self._leaving and time.monotonic() < until and self._store.last_supervisor() == holder:
                self._pause(0.1)
        return self._store.acquire_lease(self.id, os.getpid(), self._limits.lease_s)

    def leave(self) -> None:
        """Make `run` return soon; call it from a signal handler or another thread. Child processes continue."""
        self._leaving = True

    def run(self) -> bool:
        """Run jobs until there are none for `idle_exit_s`, the lease is lost, or `leave` is called.

        The lease must be held. Returns False if the store failed for too long, or its file was deleted or replaced.
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
                self._retention.look()
                if self.step():
                    idle_since = time.monotonic()
                elif time.monotonic() - idle_since >= self._limits.idle_exit_s and self._store.release_lease(
                    self.id, only_if_idle=True
                ):
                    log.info("idle for %g s; leaving", self._limits.idle_exit_s)
                    return True
                last_success = time.monotonic()
                self._failures.recovered()
            except StoreReplaced as replaced:  # writes would be lost; child processes continue
                log.error("%s", replaced)
                return False
            except LeaseLost as lost:
                log.warning("%s; leaving", lost)
                return True
            except Exception as error:  # noqa: BLE001  # it is logged, and the next step tries again
                self._failures.report(error, "ends of jobs are kept until they can be recorded; trying again")
                # On a full disk, wait: no other process would continue the jobs once there is space again.
                if time.monotonic() - last_success > GIVE_UP_S and disk.full(self._config.state_dir) is None:
                    log.error("giving up")
                    return False
            self._pause(self._limits.poll_s)
        self._store.release_lease(self.id, only_if_idle=False)
        log.info("asked to leave; jobs in progress continue")
        return True

    def _pause(self, seconds: float) -> None:
        # Not a threading.Event: its `set` in a signal handler can wait for a lock that the interrupted `wait` holds.
        until = time.monotonic() + seconds
        while not self._leaving and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.5))

    def step(self) -> bool:
        """Check every job in progress, then claim jobs while there is room; return whether any job is in progress."""
        changed = self._store.has_changed()  # asked before the queries, so a later change is seen in the next step
        if self._idle and not changed:
            return False
        self._idle = False
        seen = [job for job in self._store.running() if self._check_job(job)]
        running = len(seen)
        self._sweeps.look()
        for waiting, end in self._waiting.look() if not self._leaving else ():
            self._settle(waiting, end)
        if not self._leaving and running < self._limits.max_concurrent_jobs:
            self._fail_impossible_jobs()
        while not self._leaving and running < self._limits.max_concurrent_jobs and self._has_disk_space():
            if (job := self._store.claim(self.id, self._devices, True, self._config.limits)) is None:
                break
            log.info("job %s: claimed, attempt %d, devices %r", job.id, job.attempts, job.devices)
            running += self._launch(job)
        self._playgrounds.look(seen)
        self._idle = running == 0 and not self._leaving and not self._disk_is_full and not self._may_go_on()
        return running > 0

    def _may_go_on(self) -> bool:
        """Whether a job may start although nobody writes to the store: its names are resolved, or GPU-hours free."""
        limit = self._config.limits.gpu_hours_per_day
        return self._waiting.is_busy or (limit is not None and self._store.has_work())

    def _has_disk_space(self) -> bool:
        """Whether a job may start: on a full disk, all waiting jobs would fail one after the other."""
        problem = disk.full(self._config.state_dir)
        if problem is not None and not self._disk_is_full:
            log.warning("%s; no job is started until there is free space", problem)
        self._disk_is_full = problem is not None
        return problem is None

    def _fail_impossible_jobs(self) -> None:
        available = len(self._devices or ())
        for job in self._store.asking_for_more(available):
            reason = (
                f"the job asks for {job.gpus} GPUs (`resources.gpus`), but the machine that runs the jobs has "
                f"{available or 'none'} available; see `supervisor.devices`"
            )
            self._settle(job, Outcome(JobState.FAILED, reason, job.artifacts))

    def _check_job(self, job: Job) -> bool:
        """Check a job in progress; return whether it is still in progress afterwards."""
        child = Child.of(job)
        if child is None:
            # The supervisor that claimed it died before it released the process.
            if job.cancel_requested_at is not None:
                return self._settle(job, Outcome(JobState.CANCELLED, CANCELLED_WAITING, job.artifacts))
            return self._launch(job)
        launcher = None if job.supervisor is None or child.run is not None else ProcessName.parse(job.supervisor)
        if launcher is not None and launcher.place != self._place:
            return self._check_remote_job(job, child, launcher.place.host)
        end = None if child in self._unsettled else self._executors[job.executor].poll(child)
        if end is not None or child in self._unsettled:
            return self._end(job, child, end)
        self._trim_output(job)
        if job.cancel_requested_at is not None:
            self._stop(job, child, "cancelling")
        elif self._has_stalled(job, child):
            self._stop(job, child, self._given_up[job.id])
        return True

    def _end(self, job: Job, child: Child, end: Exit | None) -> bool:
        """Record the end of a job whose process has ended. Executors report `end` once, so it is kept until then."""
        if end is not None and child not in self._unsettled:
            self._unsettled[child] = self._outcome(job, end)  # must see a full disk before space is freed below
        unfinished = disk.Unfinished(JobFolder(child.folder))

        def tidy_up() -> None:
            unfinished.set_aside()
            self._trim_output(job)

        try:
            self._settle(job, self._unsettled[child], tidy_up)
        finally:  # also if the store had no space to record it: the deletion frees some for the next try
            unfinished.delete()
        del self._unsettled[child]
        return False

    def _trim_output(self, job: Job) -> None:
        if bound(JobFolder(Path(job.folder)).output, self._limits.max_log_bytes):
            log.info("job %s: the middle of its output was removed (`supervisor.max_log_bytes`)", job.id)

    def _check_remote_job(self, job: Job, child: Child, host: str) -> bool:
        if host == self._place.host:  # this machine or container, before it was restarted
            return self._end(job, child, Exit(None))
        if self._watchdog.silent_s(job.id, JobFolder(child.folder)) < SILENCE_S:
            return True
        # Not tried again: the process may still run, and then two processes would write to one folder.
        self._given_up[job.id] = (
            f"no sign of life for {SILENCE_S / 60:g} minutes from its process on machine {host!r}, which can't be seen "
            "from the machine that runs the jobs now; resume it once it has ended there"
        )
        return self._settle(job, self._outcome(job, Exit(None)))

    def _outcome(self, job: Job, end: Exit) -> Outcome:
        found = outcome(job, end, self._limits.max_attempts, self._given_up.get(job.id))
        # The reason may quote the last output of a process that died before it could hide secrets.
        secrets = known_secrets(os.environ, self._config.secrets)
        return found._replace(reason=None if found.reason is None else scrubbed(found.reason, secrets))

    def _launch(self, job: Job) -> bool:
        try:
            if not launch(self._store, self._executors[job.executor], job, self._fence(job)):
                return True
        except LeaseLost:
            raise
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
                f"no sign of life for {limit_s / 60:.3g} minutes (`supervisor.stall_s`); it stalled and was stopped"
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

    def _fence(self, job: Job) -> Fence:
        return Fence.of(self.id, job)

    def _settle(self, job: Job, end: Outcome, first: First | None = None) -> bool:
        """Record the outcome in the store, unless another supervisor has the job by now.

        Args:
            job: The job as this supervisor saw it.
            end: The outcome.
            first: See `JobStore.move`.

        Returns:
            False: the job is no longer in progress.
        """
        self._asked_to_stop.pop(job.id, None)
        self._given_up.pop(job.id, None)
        self._watchdog.forget(job.id)
        try:
            if end.state is JobState.SCHEDULED:
                self._store.requeue(job.id, end.reason or "", end.artifacts, self._fence(job), first, end.lost)
            elif end.state is JobState.COMPLETED:
                self._complete(job, end, first)
            else:
                self._move(job, end, first=first)
        except LeaseLost:
            raise
        except Conflict as conflict:  # just cancelled, or changed by another supervisor (`Superseded`)
            log.warning("%s", conflict)
            return False
        log.info("job %s: %s%s", job.id, end.state.value, f" ({end.reason})" if end.reason else "")
        return False

    def _move(self, job: Job, end: Outcome, export: NewJob | None = None, first: First | None = None) -> None:
        self._store.move(
            job.id, end.state, end.reason, end.artifacts, end.stopped_by, export, self._fence(job), first, end.lost
        )  # fmt: skip

    def _complete(self, job: Job, end: Outcome, first: First | None) -> None:
        try:
            handover = prepare_export(self._store, job)
        except ValueError as error:
            self._move(job, _not_exported(end, error), first=first)
            return
        if handover is None:
            self._move(job, end, first=first)
            return
        try:
            self._move(job, end, handover.new, handover.placing(first))
            log.info("job %s: its export is job %s", job.id, handover.new.id)
        except NotFound as error:  # a job that the export needs was deleted meanwhile
            self._move(job, _not_exported(end, error))
        finally:
            handover.discard()


def _not_exported(end: Outcome, error: Exception) -> Outcome:
    return end._replace(reason=f"completed, but not exported: {error}"[:REASON_LIMIT])


def supervise(config: ProviderConfig, lock: int | None = None) -> int:
    """Run a supervisor that logs to standard error; return the process's exit code.

    Args:
        config: The provider's configuration.
        lock: File descriptor to close once this process or another one holds the lease.
    """
    os.umask(config.privacy.umask)  # child processes inherit it
    handler = logging.StreamHandler()
    handler.setFormatter(BoundedFormatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        require_same_store(config)  # before a new store is created
        store = JobStore(config.url)
    except InvalidInput as unusable:
        log.error("%s", unusable)
        return 1
    try:
        try:
            claim_state_folder(config, store)
        except InvalidInput as foreign:
            log.error("%s", foreign)
            return 1
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
        with WebhookSender.of(store, config, supervisor.id):
            return 0 if supervisor.run() else 1
    finally:
        store.close()


def main() -> int:
    """Read the configuration from standard input, then run the supervisor."""
    config = read_as(ProviderConfig, sys.stdin.buffer.read())  # the server may be newer than this process
    return supervise(config, int(sys.argv[1]) if len(sys.argv) > 1 else None)


if __name__ == "__main__":
    sys.exit(main())
