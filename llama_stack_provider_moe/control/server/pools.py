"""Thread pools for work that may block, one for each kind of work, with bounded queues.

asyncio's default pool does not fit: the host and its other providers share it, and eight calls that never return (a
dead network mount, a stopped database) would block all of them. Neither does `ThreadPoolExecutor`: Python waits for its
threads at exit, so one hanging thread would keep the server from ending.
"""

import asyncio
import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from llama_stack_provider_moe.errors import Unavailable


class Pool:
    """Runs at most `threads` calls at a time; at most `waiting` more calls queue up.

    Args:
        name: the name of its threads.
        threads: most threads; they start on demand.
        waiting: most calls in the queue; further calls are refused.
        what: the kind of work, for the error text: "requests", "folders of models".
        stuck_s: seconds after which a call counts as stuck; while all threads are stuck, new calls are refused at once.
    """

    def __init__(self, name: str, threads: int, waiting: int, what: str, stuck_s: float | None = None) -> None:
        self._name = name
        self._threads = threads
        self._waiting = waiting
        self._what = what
        self._stuck_s = stuck_s
        self._changed = threading.Condition()
        self._queue: deque[Callable[[], None]] = deque()
        self._started: dict[int, float] = {}  # thread number -> start of its call
        self._count = 0
        self._closed = False

    def submit[T](self, call: Callable[[], T]) -> "Future[T]":
        """Run `call` in a thread, in the caller's context.

        Raises:
            Unavailable: too many calls wait, or all threads are stuck.
        """
        future: Future[T] = Future()
        run = partial(contextvars.copy_context().run, call)
        with self._changed:
            if self._closed or len(self._queue) >= self._waiting or self._are_stuck():
                raise Unavailable(f"the server is too busy with {self._what}; try again")
            self._queue.append(partial(_complete, future, run))
            if self._count < self._threads and self._count - len(self._started) < len(self._queue):
                self._count += 1
                threading.Thread(
                    target=self._work, args=(self._count,), name=f"{self._name}-{self._count}", daemon=True
                ).start()
            self._changed.notify()
        return future

    async def run[*Args, T](self, call: Callable[[*Args], T], *args: *Args) -> T:
        """Return `call(*args)`, run in a thread."""
        return await asyncio.wrap_future(self.submit(partial(call, *args)))

    async def within[*Args, T](self, limit_s: float, why_not: str, call: Callable[[*Args], T], *args: *Args) -> T:
        """Return `call(*args)`, run in a thread; wait at most `limit_s` seconds.

        Args:
            limit_s: the time limit in seconds; the thread continues a call that takes longer.
            why_not: the text of the error.
            call: runs in the thread.
            args: its arguments.

        Raises:
            Unavailable: the call took too long; its text is `why_not`.
        """
        future = asyncio.wrap_future(self.submit(partial(call, *args)))
        future.add_done_callback(retrieve_error)
        done, _ = await asyncio.wait({future}, timeout=limit_s)
        if not done:
            future.cancel()
            raise Unavailable(why_not)
        return future.result()

    def close(self) -> None:
        """Accept no more calls; threads end after the calls in the queue."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _are_stuck(self) -> bool:
        if self._stuck_s is None or len(self._started) < self._threads:
            return False
        return all(time.monotonic() - began > self._stuck_s for began in self._started.values())

    def _work(self, number: int) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    if self._closed:
                        return
                    self._changed.wait()
                complete = self._queue.popleft()
                self._started[number] = time.monotonic()
            complete()
            del complete  # an idle thread must not keep a request's body alive
            with self._changed:
                del self._started[number]


def _complete[T](future: "Future[T]", run: Callable[[], T]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(run())
        except BaseException as error:  # noqa: BLE001  # raised in the caller, as in `ThreadPoolExecutor`
            future.set_exception(error)


def retrieve_error(future: "asyncio.Future[Any]") -> None:
    """Retrieve an error that nobody may wait for any more, because a client left or a time limit passed.

    Otherwise asyncio logs it, and the host's logger renders its traceback with all locals on the event loop: 3 seconds
    of processor time.
    """
    if not future.cancelled():
        future.exception()
