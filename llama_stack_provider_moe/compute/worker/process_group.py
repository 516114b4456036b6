"""A job of several processes on one machine. One process imports the libraries, forks the others and leads them.

To the supervisor the group is one process: one pid, one exit code, one output file, one event for its end. The leader
trains nothing. It copies the output of the processes other than rank 0, line by line with the process's number in
front. When a process fails or is killed, the leader gives the others time to notice, kills those that don't, and
decides what the cause was (`Verdict`).

We don't use torchrun, because it does less than a durable job needs:

- It always ends with exit code 1. So nobody could tell a process that was killed (start again) from one that failed
  (do not) or one that was asked to stop (and saved its checkpoint); torchrun treats the last as a failure too.
- Each process imports the libraries anew.
- Its rendezvous is a port that others on the machine can reach; ours is a file that only the job's user can read.
"""

import ctypes
import json
import os
import resource
import selectors
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Literal

from llama_stack_provider_moe.compute.data.workers import end_helpers
from llama_stack_provider_moe.compute.runtime.peers import Address, Peers, is_of_a_lost_peer
from llama_stack_provider_moe.compute.runtime.threads import fork

# The time that the others have to notice that one has ended, before they are killed. With gloo they notice at once.
GRACE_S = 15.0
REPORT_BYTES = 4096  # PIPE_BUF (pipe(7)): shorter writes of several processes never mix
_REASON_LIMIT = 2000  # characters, as in a job's reason; escaped, each may take six bytes
SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)


@dataclass(frozen=True)
class End:
    """How one process ended, in its own words.

    Attributes:
        reason: why it failed, or handed over (`context.HandedOver`).
        error: name of the exception.
        trace: the failure may be the consequence of another process's end.
        step: the last one before it stopped.
    """

    rank: int
    kind: Literal["completed", "failed", "stopped", "handed_over"]
    reason: str = ""
    error: str = ""
    trace: bool = False
    step: int = 0


@dataclass(frozen=True)
class Verdict:
    """How the group ended: as one of its processes reported, or by a signal that killed one."""

    end: End | None
    signal: int | None = None


Handler = Callable[[int, FrameType | None], object] | int | None  # what `signal.signal` takes and returns
Report = Callable[[End], None]
RankMain = Callable[[Peers, Report], int]


def verdict(said: Sequence[End], killed: dict[int, int], asked_to_stop: bool, size: int) -> Verdict:
    """Decide how the group ended.

    The first reason that is a process's own counts, because later ones may be its consequence. A process that was
    killed reports nothing; in that case the failures that its end caused in others explain nothing either.

    Args:
        said: the processes' reports, in order of arrival.
        killed: rank -> signal, without those that the leader killed.
        asked_to_stop: whether a SIGTERM arrived.
        size: number of processes.
    """
    if any(end.rank == 0 and end.kind == "completed" for end in said):
        return Verdict(next(end for end in said if end.rank == 0))  # all of the job's results are on disk
    for end in said:
        if end.kind in ("stopped", "handed_over") or (end.kind == "failed" and not end.trace):
            alike = end.rank == 0 or any(e.rank == 0 and e.reason == end.reason for e in said)
            reason = end.reason if alike or end.kind == "stopped" else f"{end.reason} (process {end.rank} of {size})"
            return Verdict(End(**{**asdict(end), "reason": reason}))
    if asked_to_stop and all(number == signal.SIGTERM for number in killed.values()):
        return Verdict(End(0, "stopped"))  # before it set its handler, or because another one stopped
    if killed:
        return Verdict(None, next(iter(killed.values())))
    traces = [end for end in said if end.kind == "failed"]
    reason = f": {traces[0].reason}" if traces else ", and none gave a reason"
    return Verdict(End(0, "failed", f"the job's {size} processes lost contact with each other{reason}", "RuntimeError"))


@dataclass(frozen=True)
class Ends:
    """How the processes of one machine ended, see `verdict`. Ranks count over the whole job."""

    said: tuple[End, ...]
    killed: dict[int, int]
    asked_to_stop: bool


@dataclass(frozen=True)
class MachinePart:
    """One machine's part of a job on several machines.

    Attributes:
        node: number of this machine.
        nodes: number of machines.
        address: where all processes meet.
        wish: returns a signal to send to the processes, or None.
        wish_every_s: seconds between two calls of `wish`.
    """

    node: int = 0
    nodes: int = 1
    address: Address | None = None
    wish: Callable[[], signal.Signals | None] = lambda: None
    wish_every_s: float = 1.0


class ProcessGroup:
    """The processes of one job, or of one machine's part of it.

    Args:
        size: number of processes on this machine.
        work: what each process does; its result is the exit code.
        output: receives the lines of all processes other than rank 0.
        part: this machine's part of a job on several machines.
    """

    def __init__(self, size: int, work: RankMain, output: IO[bytes], part: MachinePart | None = None) -> None:
        self._part = part
        self._nodes, self._first = (1, 0) if part is None else (part.nodes, part.node * size)
        self._here = size
        self._size = size * self._nodes
        self._work = work
        self._output = output
        self._ranks: dict[int, int] = {}  # pid -> rank, without those that have ended
        self._lines: dict[int, bytes] = {}  # descriptor -> the beginning of an incomplete line
        self._said: list[End] = []
        self._killed: dict[int, int] = {}
        self._asked_to_stop = False
        self._deadline: float | None = None
        self._wish_at = time.monotonic()
        self._waking = -1
        self._handlers: dict[signal.Signals, Handler] = {}

    def run(self) -> Verdict:
        """Fork the processes, wait until all have ended, and decide how the group ended.

        Raises:
            ForkRefused: this process runs other threads.
            OSError: the system can't start another process.
        """
        ends = self.ends()
        return verdict(ends.said, ends.killed, ends.asked_to_stop, self._size)

    def ends(self) -> Ends:
        """Fork the processes, wait until all have ended, and return how each did. It raises what `run` raises."""
        meeting = Path(tempfile.mkdtemp(prefix="moe-train-"))  # only this user can read it
        try:
            with selectors.DefaultSelector() as selector:
                at = None if self._part is None else self._part.address
                self._begin(selector, meeting / "store" if at is None else at)
                while self._ranks:
                    self._look(selector)
                for key in list(selector.get_map().values()):  # the rest of what they wrote
                    self._drain(selector, key, whole=True)
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            if self._waking >= 0:
                os.close(self._waking)
            shutil.rmtree(meeting, ignore_errors=True)
        return Ends(tuple(self._said), self._killed, self._asked_to_stop)

    def _begin(self, selector: selectors.BaseSelector, meeting: Path | Address) -> None:
        reports, telling = os.pipe()
        woken, waking = os.pipe()
        for descriptor in (woken, waking):
            os.set_blocking(descriptor, False)
        ours = [reports, woken, waking]
        signals = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        leader = os.getpid()
        for rank in range(self._first, self._first + self._here):
            reading, writing = os.pipe() if rank else (-1, -1)
            try:
                pid = fork()
            except BaseException:
                self._abandon(signals)
                raise
            if pid == 0:
                peers = Peers(rank, self._size, self._nodes)
                _become(leader, peers, self._work, meeting, telling, writing, [*ours, reading])
            self._ranks[pid] = rank
            if rank:
                os.close(writing)
                ours.append(reading)
                selector.register(reading, selectors.EVENT_READ, f"[process {rank}] ".encode())
        os.close(telling)
        selector.register(reports, selectors.EVENT_READ, None)
        selector.register(woken, selectors.EVENT_READ, b"")
        self._waking = waking
        signal.set_wakeup_fd(waking, warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        self._handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)

    def _abandon(self, signals: set[signal.Signals]) -> None:
        """Kill the processes that were forked, because another one could not be."""
        for pid in self._ranks:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)

    def _stop(self, *_: object) -> None:
        """Pass the signal on to all processes. Some may get it twice, which changes nothing."""
        self._asked_to_stop = True
        for pid in self._ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def _look(self, selector: selectors.BaseSelector) -> None:
        self._check_wish()
        left_s = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        if self._part is not None:
            every_s = self._part.wish_every_s
            left_s = every_s if left_s is None else min(left_s, every_s)
        for key, _ in selector.select(left_s):
            self._drain(selector, key)
        while self._ranks:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            self._ended(pid, os.waitstatus_to_exitcode(status))
        if self._deadline is not None and time.monotonic() >= self._deadline:
            for pid in self._ranks:
                os.kill(pid, signal.SIGKILL)

    def _check_wish(self) -> None:
        if self._part is None or time.monotonic() < self._wish_at:
            return
        self._wish_at = time.monotonic() + self._part.wish_every_s
        wish = self._part.wish()
        if wish is signal.SIGTERM:
            if not self._asked_to_stop:
                self._stop()
        elif wish is not None:
            for pid in self._ranks:
                os.kill(pid, wish)

    def _ended(self, pid: int, code: int) -> None:
        rank = self._ranks.pop(pid, None)
        if rank is None:  # a library's helper whose parent has ended
            return
        too_late = self._deadline is not None and time.monotonic() >= self._deadline
        if code < 0 and not too_late:
            self._killed[rank] = -code
            self._print(f"process {rank} of {self._size} was killed by {signal.Signals(-code).name}")
        if (code != 0 or rank == 0) and self._deadline is None:
            self._deadline = time.monotonic() + GRACE_S

    def _drain(self, selector: selectors.BaseSelector, key: selectors.SelectorKey, whole: bool = False) -> None:
        """Read what a process has written so far; `whole`: all that is left."""
        descriptor, prefix = key.fd, key.data
        while True:
            if whole:
                os.set_blocking(descriptor, False)
            try:
                read = os.read(descriptor, 1 << 16)
            except BlockingIOError:
                read = b""
            *lines, rest = (self._lines.get(descriptor, b"") + read).split(b"\n")
            self._lines[descriptor] = rest
            if not read and rest:  # the process ended within a line
                lines.append(rest)
            if prefix is None:
                self._said += [End(**json.loads(line)) for line in lines]
            elif prefix:
                with suppress(OSError):  # a full disk
                    self._output.write(b"".join(prefix + line + b"\n" for line in lines))
            if not read:
                with suppress(KeyError):
                    selector.unregister(descriptor)
                os.close(descriptor)
                return
            if not whole:
                return

    def _print(self, text: str) -> None:
        with suppress(OSError):
            self._output.write(f"{text}\n".encode())


def end_by_signal(number: int) -> None:
    """End this process by the signal that killed one of the job's processes, so that its parent sees it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the core file of interest is the killed process's
    with suppress(OSError, ValueError):  # SIGKILL has no handler
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _become(
    leader: int, peers: Peers, work: RankMain, meeting: Path | Address, telling: int, output: int, ours: Sequence[int]
) -> None:
    """Run one of the processes in the fork. It never returns, because its caller is the leader's loop."""
    code = 1
    try:
        ctypes.CDLL(None, use_errno=True).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != leader:
            os._exit(1)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for descriptor in ours:
            if descriptor >= 0:
                os.close(descriptor)
        if output >= 0:
            for target in (1, 2):
                os.dup2(output, target)
            os.close(output)
        os.environ |= {
            "RANK": str(peers.rank), "LOCAL_RANK": str(peers.local_rank),
            "WORLD_SIZE": str(peers.size), "LOCAL_WORLD_SIZE": str(peers.local_size),
        } if peers.size > 1 else {}  # fmt: skip
        if peers.size > 1:
            peers.join(meeting)
        code = work(peers, lambda end: _report(telling, end))
    except BaseException as error:  # noqa: BLE001  no error of a child may reach the leader's loop
        with suppress(OSError):
            traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
        _report(telling, End(peers.rank, "failed", reason, type(error).__name__, is_of_a_lost_peer(error)))
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        end_helpers()
        os._exit(code)


def _report(telling: int, end: End) -> None:
    limit = _REASON_LIMIT
    while len(line := json.dumps({**asdict(end), "reason": end.reason[:limit]}).encode() + b"\n") > REPORT_BYTES:
        limit //= 2
    os.write(telling, line)
