"""A job of several processes on one machine: all forked from one that has the libraries imported and then leads them.

To the outside the group is one process: one pid, one exit code, one output file, one event that says how it ended. The
leader trains nothing. It passes on the output of the processes beside rank 0, a line at a time with the number of its
process before it, and once one has ended otherwise than well it lets the others notice, kills those that do not, and
decides what the cause was (`Verdict`).

torchrun does less than a durable job needs: it ends with 1 whatever happened, so that nobody could tell a process that
was killed (start again) from one that failed (do not) or was asked to stop (and has saved its checkpoint); it takes the
last for a failure and ends the others; each process imports the libraries anew; and its rendezvous is a port that
others on the machine can reach, where ours is a file of the job's user alone.
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
from typing import IO, Any, Literal

from llama_stack_provider_moe.training.peers import Address, Peers, is_of_a_lost_peer

# What the others get to notice that one has ended; then they are killed. By gloo they notice at once.
GRACE_S = 15.0
REPORT_BYTES = 4096  # a write of no more than PIPE_BUF (pipe(7)) is never cut by another process's
_REASON_LIMIT = 2000  # characters, as of a job's reason; escaped they may be six bytes each
SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)


@dataclass(frozen=True)
class End:
    """How one process says that it ends; `trace`: by what may be another one's end."""

    rank: int
    kind: Literal["completed", "failed", "stopped"]
    reason: str = ""
    error: str = ""
    trace: bool = False
    step: int = 0


@dataclass(frozen=True)
class Verdict:
    """How the group ended: by what one of its processes said, or else by a signal that killed one."""

    end: End | None
    signal: int | None = None


Report = Callable[[End], None]
Work = Callable[[Peers, Report], int]


def verdict(said: Sequence[End], killed: dict[int, int], asked_to_stop: bool, size: int) -> Verdict:
    """What the group's end was.

    The first reason that is a process's own counts, for what others say after it may be its consequence. A process that
    was killed says nothing; then the traces that its end left in others explain nothing either.

    Args:
        said: in order of arrival.
        killed: rank -> signal, of those that the leader did not kill.
        asked_to_stop: by a SIGTERM.
        size: of the group.
    """
    if any(end.rank == 0 and end.kind == "completed" for end in said):
        return Verdict(next(end for end in said if end.rank == 0))  # all that the job leaves is on disk
    for end in said:
        if end.kind == "stopped" or (end.kind == "failed" and not end.trace):
            alike = end.rank == 0 or any(e.rank == 0 and e.reason == end.reason for e in said)
            told = end.reason if alike or end.kind == "stopped" else f"{end.reason} (process {end.rank} of {size})"
            return Verdict(End(**{**asdict(end), "reason": told}))
    if asked_to_stop and all(number == signal.SIGTERM for number in killed.values()):
        return Verdict(End(0, "stopped"))  # before its handler stood, or by the trace of one that stopped
    if killed:
        return Verdict(None, next(iter(killed.values())))
    traces = [end for end in said if end.kind == "failed"]
    told = f": {traces[0].reason}" if traces else " without a word"
    return Verdict(End(0, "failed", f"the job's {size} processes lost each other{told}", "RuntimeError"))


@dataclass(frozen=True)
class Ends:
    """How the processes of one machine ended, see `verdict`; ranks are those of the whole job."""

    said: tuple[End, ...]
    killed: dict[int, int]
    asked_to_stop: bool


@dataclass(frozen=True)
class Part:
    """One machine's part of a job that runs on several: the `node`-th of `nodes`, whose processes meet at `address`.

    `heed` is asked once in `heed_s` seconds, and the signal that it answers is sent to the processes.
    """

    node: int = 0
    nodes: int = 1
    address: Address | None = None
    heed: Callable[[], signal.Signals | None] = lambda: None
    heed_s: float = 1.0


class Group:
    """The processes of one job, or of one machine's part of it.

    Args:
        size: how many, here.
        work: what each does; its result is the process's exit code.
        output: where the lines of those beside rank 0 go.
        part: of a job of several machines.
    """

    def __init__(self, size: int, work: Work, output: IO[bytes], part: Part | None = None) -> None:
        self._part = part
        self._nodes, self._first = (1, 0) if part is None else (part.nodes, part.node * size)
        self._here = size
        self._size = size * self._nodes
        self._work = work
        self._output = output
        self._ranks: dict[int, int] = {}  # pid -> rank, of those that have not ended
        self._lines: dict[int, bytes] = {}  # descriptor -> what came after the last whole line
        self._said: list[End] = []
        self._killed: dict[int, int] = {}
        self._asked_to_stop = False
        self._deadline: float | None = None
        self._heed_at = time.monotonic()
        self._waking = -1
        self._handlers: dict[signal.Signals, Any] = {}

    def run(self) -> Verdict:
        """From fork to end; none of them is left."""
        ends = self.ends()
        return verdict(ends.said, ends.killed, ends.asked_to_stop, self._size)

    def ends(self) -> Ends:
        """The same, and what there is to judge by."""
        meeting = Path(tempfile.mkdtemp(prefix="moe-train-"))  # for this user alone
        try:
            with selectors.DefaultSelector() as selector:
                at = None if self._part is None else self._part.address
                self._begin(selector, meeting / "store" if at is None else at)
                while self._ranks:
                    self._look(selector)
                for key in list(selector.get_map().values()):  # what was written until the end
                    self._drain(selector, key, whole=True)
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
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
            pid = os.fork()
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

    def _stop(self, *_: object) -> None:
        """Whoever asks the leader alone asks all; who asked the whole group asks twice, which changes nothing."""
        self._asked_to_stop = True
        for pid in self._ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def _look(self, selector: selectors.BaseSelector) -> None:
        self._heed()
        left_s = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        if self._part is not None:
            left_s = self._part.heed_s if left_s is None else min(left_s, self._part.heed_s)
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

    def _heed(self) -> None:
        if self._part is None or time.monotonic() < self._heed_at:
            return
        self._heed_at = time.monotonic() + self._part.heed_s
        wish = self._part.heed()
        if wish is signal.SIGTERM:
            if not self._asked_to_stop:
                self._stop()
        elif wish is not None:
            for pid in self._ranks:
                os.kill(pid, wish)

    def _ended(self, pid: int, code: int) -> None:
        rank = self._ranks.pop(pid, None)
        if rank is None:  # some library's helper, given to us by its parent's death
            return
        too_late = self._deadline is not None and time.monotonic() >= self._deadline
        if code < 0 and not too_late:
            self._killed[rank] = -code
            self._tell(f"process {rank} of {self._size} was killed by {signal.Signals(-code).name}")
        if (code != 0 or rank == 0) and self._deadline is None:
            self._deadline = time.monotonic() + GRACE_S

    def _drain(self, selector: selectors.BaseSelector, key: selectors.SelectorKey, whole: bool = False) -> None:
        """Read what is there; `whole`: all that is left."""
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
            if not read and rest:  # a line that nobody will end
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

    def _tell(self, text: str) -> None:
        with suppress(OSError):
            self._output.write(f"{text}\n".encode())


def die_of(number: int) -> None:
    """End as a process did that was killed by signal `number`: whoever waits for us sees it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # its core, where it left one, is the one of interest
    with suppress(OSError, ValueError):  # not of SIGKILL
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _become(
    leader: int, peers: Peers, work: Work, meeting: Path | Address, telling: int, output: int, ours: Sequence[int]
) -> None:
    """In the fork: be one of the processes. Never returns: above stands the leader's loop."""
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
    except BaseException as error:  # noqa: BLE001  the entry: whatever it is, it must not get into the leader's loop
        with suppress(OSError):
            traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
        _report(telling, End(peers.rank, "failed", reason, type(error).__name__, is_of_a_lost_peer(error)))
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)


def _report(telling: int, end: End) -> None:
    limit = _REASON_LIMIT
    while len(line := json.dumps({**asdict(end), "reason": end.reason[:limit]}).encode() + b"\n") > REPORT_BYTES:
        limit //= 2
    os.write(telling, line)
