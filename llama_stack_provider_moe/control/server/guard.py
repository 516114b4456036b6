"""Keeps one request from blocking the others: it chooses the thread pool, the time limit and the error text."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from llama_stack_provider_moe.control.server import wire
from llama_stack_provider_moe.control.server.bodies import Bodies
from llama_stack_provider_moe.control.server.failures import Failures
from llama_stack_provider_moe.control.server.pools import Pool
from llama_stack_provider_moe.control.server.store_watch import LOST, StoreWatch
from llama_stack_provider_moe.control.store import disk
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.store.store_errors import brief, is_store_lost
from llama_stack_provider_moe.errors import MoeError, NoRoom, StoreReplaced, Unavailable
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.server_config import ProviderConfig

HEALTH_LIMIT_S = 0.3  # health checks have short timeouts
HEALTH_KEPT_S = 5.0  # a busy server repeats a health answer that is at most this old
PLACES_LIMIT_S = 10.0  # for looking at folders that a job names
LOST_HEALTH = wire.Health(status="error", store="unreachable", supervisor="none", jobs={})


class Guard:
    """The threads of one service.

    Args:
        config: the server's configuration.
        health: returns the store's health; may block, and raise.
    """

    def __init__(self, config: ProviderConfig, health: Callable[[], wire.Health]) -> None:
        self.bodies = Bodies()
        self.failures = Failures()
        self._state_dir = config.state_dir
        self._remedy = (
            "delete jobs that have ended (moe-train rm JOB), or other files on that disk; as a last resort, delete the "
            f"contents of {config.jobs_dir}/JOB/artifacts of a job that has ended"
        )
        self._health = health
        self._watch = StoreWatch(self._check_health)
        self._places = Pool("moe-places", 4, 32, "folders that jobs name", stuck_s=PLACES_LIMIT_S)
        self._files = Pool("moe-files", 4, 512, "files of jobs")
        self._last_health: tuple[float, wire.Health] | None = None
        self.run = self._watch.run

    async def in_job_paths[*Args, T](self, named: str, call: Callable[[*Args], T], *args: *Args) -> T:
        """Return `call(*args)`, which reads folders that a job names.

        Such a folder may be on a dead mount; then only the threads of this pool hang.

        Args:
            named: the folders, for the error text.
            call: runs in a thread.
            args: its arguments.

        Raises:
            Unavailable: the call took too long; the text has `named`.
        """
        why_not = f"{named}: no answer within {PLACES_LIMIT_S:g} seconds; try again"
        return await self._places.within(PLACES_LIMIT_S, why_not, call, *args)

    async def in_state_dir[*Args, T](self, call: Callable[[*Args], T], *args: *Args) -> T:
        """Return `call(*args)`, which needs the state folder but not the store.

        Raises:
            Unavailable: too many calls wait.
        """
        return await self._files.run(call, *args)

    async def health(self) -> wire.Health:
        """Return whether the server can accept and run jobs; answers soon even if the store hangs."""
        if await self._watch.probe(HEALTH_LIMIT_S) or self._last_health is None:
            return self._last_health[1] if self._last_health else LOST_HEALTH
        checked_at, found = self._last_health
        return found if time.monotonic() - checked_at < HEALTH_KEPT_S else LOST_HEALTH

    def _check_health(self) -> bool:
        found = self._health()
        self._last_health = (time.monotonic(), found)
        # A store whose file was replaced still answers: every request gets the error that says so.
        return found.store != LOST_HEALTH.store

    async def must_have_room(self, outcome: str) -> None:
        """Raise `NoRoom` on a full disk; the store needs the remaining space to record ends and deletions."""
        no_room = await self._places.within(PLACES_LIMIT_S, LOST, disk.full, self._state_dir)
        if no_room is not None:
            raise NoRoom(f"{no_room}; {outcome}: {self._remedy}")

    async def known_failure(self, error: Exception, outcome: str = "nothing was changed") -> MoeError | None:
        """Turn a foreign error into ours where its cause is a full disk or a lost store; None means a bug."""
        try:
            no_room = await self._places.within(PLACES_LIMIT_S, LOST, disk.full_by, error, self._state_dir)
        except Unavailable as unavailable:
            return unavailable
        if no_room is not None:
            return NoRoom(f"{no_room}; {outcome}: {self._remedy}")
        return Unavailable(f"{LOST} ({brief(error)})") if is_store_lost(error) else None

    def close(self) -> None:
        """Accept no more calls; idle threads end."""
        for each in (self.bodies, self._watch, self._places, self._files, self.failures):
            each.close()


def health(store: JobStore, state_dir: Path) -> wire.Health:
    """Return whether the server can accept and run jobs; waits for the store and the disk of the state folder."""
    try:
        if not store.answers():
            return LOST_HEALTH
        alive, jobs = store.live_supervisor() is not None, store.counts()
    except StoreReplaced as replaced:
        return wire.Health(status="error", store="replaced", supervisor="none", jobs={}, reason=str(replaced))
    except Exception as error:
        if is_store_lost(error):  # lost after it answered
            return LOST_HEALTH
        raise
    supervisor: Literal["alive", "none"] = "alive" if alive else "none"
    no_room = disk.full(state_dir)
    if no_room is None:
        return wire.Health(status="ok", store="ok", supervisor=supervisor, jobs=jobs)
    reason = (
        f"{no_room}; the server accepts and starts no jobs until there is room: delete jobs that have ended (moe-train "
        "rm JOB)"
    )
    if not alive and (jobs[JobState.SCHEDULED] or jobs[JobState.IN_PROGRESS]):
        reason += "; no supervisor can write to the job store, so it does not record the ends of jobs either"
    return wire.Health(status="degraded", store="ok", supervisor=supervisor, jobs=jobs, reason=reason)
