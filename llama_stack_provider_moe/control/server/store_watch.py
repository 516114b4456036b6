"""Watches whether the job store answers. While it does not, requests fail at once instead of waiting for it.

A call to a stopped database never returns. Therefore, when a call takes long, a separate thread sends a probe that any
working store answers at once.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from llama_stack_provider_moe.control.server.pools import Pool, retrieve_error
from llama_stack_provider_moe.control.store.store_errors import is_store_lost
from llama_stack_provider_moe.errors import Unavailable

LONG_S = 1.0  # a call that takes longer triggers a probe
ANSWER_S = 2.0  # time limit of a probe
FRESH_S = 1.0  # a result that is not older still counts
THREADS = 16  # the engine has connections for these, the probe and the other pools (`opening.MORE_CONNECTIONS`)
WAITING = 512
LOST = "the job store does not answer; nothing is lost and jobs continue; try again"
UNSURE = (
    "the job store does not answer; the request may still take effect, so check before you repeat it; jobs continue"
)


class StoreWatch:
    """Runs calls that need the store in threads, as long as the store answers.

    Args:
        check: raises, or returns False, where the store does not answer.
    """

    def __init__(self, check: Callable[[], bool]) -> None:
        self._check = check
        self._calls = Pool("moe-request", THREADS, WAITING, "requests")
        self._probes = Pool("moe-probe", 1, 1, "a check of the store")
        self._lock = threading.Lock()
        self._running: Future[bool] | None = None  # the current probe
        self._started_at = 0.0  # start of the current probe
        self._last: tuple[float, bool] | None = None  # end and result of the last probe

    async def run[*Args, T](self, call: Callable[[*Args], T], *args: *Args) -> T:
        """Return `call(*args)`, run in a thread in the caller's context.

        Raises:
            Unavailable: the store does not answer; if `call` has begun, it may still take effect, and the text says so.
            Exception: the error of `call`; if it means that the store is lost, the next calls are refused.
        """
        if self._was_lost() and not await self.answers():
            raise Unavailable(LOST)
        begun = self._calls.submit(partial(call, *args))
        waited = asyncio.wrap_future(begun)
        waited.add_done_callback(retrieve_error)  # nobody waits once the client has left, but the call goes on
        while not (await asyncio.wait({waited}, timeout=LONG_S))[0]:
            if not await self.answers() and not waited.done():
                never = begun.cancel()
                waited.cancel()  # nothing needs its result any more
                raise Unavailable(LOST if never else UNSURE)
        try:
            return waited.result()
        except Exception as error:
            if is_store_lost(error):
                self._record(False)
            raise

    async def answers(self) -> bool:
        """Return whether the store answers within `ANSWER_S` seconds; concurrent callers share one probe."""
        with self._lock:
            if self._last is not None and time.monotonic() - self._last[0] < FRESH_S:
                return self._last[1]
        running, started_at = self._start_probe()
        if await self._ends(running, started_at + ANSWER_S - time.monotonic()):
            return running.result()
        self._record(False, running)
        return False

    async def probe(self, limit_s: float) -> bool:
        """Probe the store now; False where it does not answer within `limit_s` seconds."""
        running, _ = self._start_probe()
        return await self._ends(running, limit_s) and running.result()

    def _start_probe(self) -> "tuple[Future[bool], float]":
        with self._lock:
            if self._running is None:
                self._running, self._started_at = self._probes.submit(self._run_probe), time.monotonic()
            return self._running, self._started_at

    async def _ends(self, running: "Future[bool]", limit_s: float) -> bool:
        if limit_s > 0:
            waited = asyncio.wrap_future(running)
            waited.add_done_callback(retrieve_error)
            await asyncio.wait({waited}, timeout=limit_s)
        return running.done()

    def close(self) -> None:
        """Accept no more calls."""
        self._calls.close()
        self._probes.close()

    def _was_lost(self) -> bool:
        with self._lock:
            return self._last is not None and not self._last[1]

    def _run_probe(self) -> bool:
        found = False
        try:
            found = self._check()
        finally:
            with self._lock:
                self._running = None
                self._last = (time.monotonic(), found)
        return found

    def _record(self, found: bool, during: "Future[bool] | None" = None) -> None:
        with self._lock:
            if during is None or self._running is during:  # otherwise that probe has ended and recorded its result
                self._last = (time.monotonic(), found)
