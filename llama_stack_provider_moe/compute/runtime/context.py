"""What all parts of a training process share: the job, its folder, its events, and a request to stop."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llama_stack_provider_moe.compute.runtime.peers import ALONE, Peers
from llama_stack_provider_moe.jobdir.events import EventLog, Message
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec import JobSpec, TrainingSpec


class Stopped(BaseException):
    """The job was asked to stop and has saved its progress; this is never an error.

    Like `KeyboardInterrupt` it is not an `Exception`: a signal handler raises it inside a library's code, which must
    not handle it as a failure.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


class HandedOver(BaseException):
    """A kernel failed, and the job is to go on in a new process, with torch's kernels; no failure of the job.

    Not an `Exception` for the reason that `Stopped` is none.
    """


@dataclass
class Stop:
    """A request to stop, set by a signal handler.

    While `at_once` is true (loading, tokenising: there is nothing to save yet) the handler raises. Later it only sets
    `requested`, and training ends after the current step with a checkpoint.
    """

    requested: bool = False
    at_once: bool = True

    def request(self, *_: object) -> None:
        """Request a stop; usable as a signal handler. A second request does not interrupt the handling of the first."""
        first, self.requested = not self.requested, True
        if self.at_once and first:
            raise Stopped(0)

    def between_steps(self, peers: Peers = ALONE) -> None:
        """From now on finish the current step first, in all processes together."""
        self.at_once = False
        if peers.any(self.requested):
            raise Stopped(0)


@dataclass(frozen=True)
class Forecast:
    """The memory that a job is expected to need per device (`compute.train.strategy`), as text and in figures."""

    text: str
    figures: dict[str, object]


@dataclass(frozen=True)
class Session[S: JobSpec]:
    """One run of one job.

    Attributes:
        spec: the job.
        folder: its folder.
        events: its events.
        started_before: whether an earlier process started the job and did not finish it.
        peers: the processes of the job.
        stop: a request to stop.
        forecast: the memory that it is expected to need, if that was estimated.
    """

    spec: S
    folder: JobFolder
    events: EventLog
    started_before: bool = False
    peers: Peers = ALONE
    stop: Stop = field(default_factory=Stop)
    forecast: Forecast | None = None

    @property
    def job_uuid(self) -> str:
        """The job's id, which is its folder's name."""
        return self.folder.root.name

    @property
    def cache(self) -> str:
        """The folder of this job's tokenised rows; jobs do not share it."""
        return str(self.folder.root / "cache")

    @property
    def staging(self) -> Path:
        """The folder where checkpoints are written before they get their names."""
        return self.folder.checkpoints(self.spec) / ".writing"

    def say(self, text: str, level: Literal["info", "warning"] = "info") -> None:
        """Write a message to the events and to output.log."""
        self.events.append(Message(level=level, text=text))
        self.show(text if level == "info" else f"warning: {text}")

    def show(self, text: str) -> None:
        """Write lines to output.log only; of the job's processes only rank 0 writes them."""
        if self.peers.leads:
            print(text, file=sys.stdout, flush=True)


class NoEvents(EventLog):
    """Discards events, for a process that does not write the job's events."""

    def __init__(self) -> None:
        """Open no file."""

    def append(self, event: object) -> None:
        """Do nothing: rank 0 writes the same event."""

    def close(self) -> None:
        """Do nothing: no file is open."""


AnySession = Session[TrainingSpec]
