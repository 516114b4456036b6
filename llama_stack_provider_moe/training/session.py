"""What every part of a training process shares: the job, its folder, its events, and the wish to stop."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llama_stack_provider_moe.jobs.events import EventLog, Message
from llama_stack_provider_moe.jobs.folder import JobFolder
from llama_stack_provider_moe.spec import JobSpec, TrainingSpec
from llama_stack_provider_moe.training.peers import ALONE, Peers


class Stopped(BaseException):
    """The job was asked to stop and has saved what it had; never an error.

    Like `KeyboardInterrupt` it is no `Exception`: raised by a signal handler amid a library's code, it must not be
    taken there for a failure.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


@dataclass
class Stop:
    """The wish to stop, as a signal handler leaves it.

    While `at_once` holds (loading, tokenising: nothing is worth saving yet) the handler raises; later it only notes
    the wish, and training ends at the next step's end with a checkpoint.
    """

    requested: bool = False
    at_once: bool = True

    def request(self, *_: object) -> None:
        """Note the wish; usable as a signal handler. Said twice, it does not interrupt what the first one began."""
        first, self.requested = not self.requested, True
        if self.at_once and first:
            raise Stopped(0)

    def between_steps(self, peers: Peers = ALONE) -> None:
        """From now on finish the step first, in all processes together."""
        self.at_once = False
        if peers.any(self.requested):
            raise Stopped(0)


@dataclass(frozen=True)
class Forecast:
    """What a job was expected to take of a device's memory (`training.strategy`): for a person, and in figures."""

    text: str
    figures: dict[str, Any]


@dataclass(frozen=True)
class Session[S: JobSpec]:
    """One run of one job."""

    spec: S
    folder: JobFolder
    events: EventLog
    started_before: bool = False  # in an earlier process, that did not get to its end
    peers: Peers = ALONE
    stop: Stop = field(default_factory=Stop)
    forecast: Forecast | None = None

    @property
    def job_uuid(self) -> str:
        """The job's id: its folder's name."""
        return self.folder.root.name

    @property
    def cache(self) -> str:
        """Folder of this job's tokenised rows; no job shares one with another."""
        return str(self.folder.root / "cache")

    @property
    def staging(self) -> Path:
        """Where checkpoints are written before they get their names."""
        return self.folder.checkpoints(self.spec) / ".writing"

    def say(self, text: str, level: Literal["info", "warning"] = "info") -> None:
        """A line for a person, to the events and to output.log alike."""
        self.events.append(Message(level=level, text=text))
        self.show(text if level == "info" else f"warning: {text}")

    def show(self, text: str) -> None:
        """Lines for output.log alone. What all of a job's processes would say alike, one says."""
        if self.peers.leads:
            print(text, file=sys.stdout, flush=True)


class NoEvents(EventLog):
    """The events of a process that is not the one which writes the job's."""

    def __init__(self) -> None:
        """No file is opened."""

    def append(self, event: object) -> None:
        """Nothing: rank 0 tells the same."""

    def close(self) -> None:
        """Nothing is open."""


AnySession = Session[TrainingSpec]
