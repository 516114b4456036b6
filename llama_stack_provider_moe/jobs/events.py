"""Typed events of a job: one JSON object a line, appended by the child, read by everyone else.

The file is the only channel from a training process to the outside: status, metrics, logs and the
dashboard are views of it. A reader keeps a byte offset as its cursor; a line without its newline is still
being written and is left for the next read.
"""

import os
import re
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AwareDatetime, BaseModel, ConfigDict, Discriminator, Field, TypeAdapter

StoppedBy = Literal["time_budget", "early_stopping"]

# Of an earlier start of a job they say nothing about how the present one does.
_ENDS = ("failed", "finished", "cancelled")
# Longer than any event: damage that has no line's end is read in pieces of this size.
LINE_LIMIT_BYTES = 4 << 20


def now() -> datetime:
    """This moment, in UTC; every time of ours is aware."""
    return datetime.now(UTC)


class _Event(BaseModel):
    # A loss that became NaN is what a reader wants to see most; by default it is written as null, which is no float.
    model_config = ConfigDict(ser_json_inf_nan="strings")

    time: AwareDatetime = Field(default_factory=now)


class Started(_Event):
    """The child is alive and about to load the model."""

    type: Literal["started"] = "started"
    pid: int
    versions: dict[str, str] = Field(description="Distribution name to version, and the device.")


class Resumed(_Event):
    """A later start of the same job goes on from a checkpoint; steps after `step` that were written before are undone.

    A run that begins again from the model itself, for want of a checkpoint, resumes at step 0.
    """

    type: Literal["resumed"] = "resumed"
    step: int
    checkpoint: str | None = Field(description="Name of the checkpoint, None at step 0.")


class Plan(_Event):
    """What was found and what will train, before the first step; also in `resolved.json`."""

    type: Literal["plan"] = "plan"
    plan: dict[str, Any]


class Step(_Event):
    """One optimiser step. Losses in nats; times in seconds; memory in bytes."""

    type: Literal["step"] = "step"
    step: int = Field(ge=0, lt=2**63)
    max_steps: int = Field(ge=0, lt=2**63)
    epoch: float
    metrics: dict[str, float]
    eta_s: float | None = None


class LayerRouting(BaseModel):
    """How one layer's router used its experts over one optimiser step's tokens."""

    layer: int
    share: list[float] = Field(description="Share of the routed tokens (top-k slots) an expert got; sums to 1.")
    min: float
    max: float
    cv: float = Field(description="Coefficient of variation of `share`.")
    dead: int = Field(description="Experts that got no token.")
    load_entropy: float = Field(description="Entropy of the mean routing probabilities, in nats.")
    token_entropy: float = Field(description="Mean over tokens of each token's routing entropy, in nats.")


class Routing(_Event):
    """Router health of one optimiser step, one entry a layer that has experts."""

    type: Literal["routing"] = "routing"
    step: int
    layers: list[LayerRouting]
    sets: dict[str, list[LayerRouting]] = Field(
        default_factory=dict, description="The same of each data set's tokens by themselves, where a step mixes sets."
    )

    def figures(self) -> dict[str, float]:
        """Worst and mean over layers, nothing of none; shares are of the routed tokens, entropies in nats."""
        return _routing_figures(self.layers)

    def figures_by_set(self) -> dict[str, dict[str, float]]:
        """The same of each set."""
        return {name: _routing_figures(layers) for name, layers in self.sets.items()}


def _routing_figures(layers: list[LayerRouting]) -> dict[str, float]:
    if not layers:
        return {}
    return {
        "min_share": min(layer.min for layer in layers),
        "max_share": max(layer.max for layer in layers),
        "max_cv": max(layer.cv for layer in layers),
        "dead_experts": sum(layer.dead for layer in layers),
        "load_entropy": sum(layer.load_entropy for layer in layers) / len(layers),
        "token_entropy": sum(layer.token_entropy for layer in layers) / len(layers),
    }


class Evaluation(_Event):
    """Held-out figures at `step` (0: before training)."""

    type: Literal["evaluation"] = "evaluation"
    step: int
    epoch: float
    metrics: dict[str, float]


class Assessed(_Event):
    """What `eval` measured at `step` (0: before training), each figure as {n, value, low, high} of 95%."""

    type: Literal["assessed"] = "assessed"
    step: int
    measured: dict[str, dict[str, dict[str, float]]] = Field(description="State (before, after, ...) -> figures.")
    differences: dict[str, dict[str, dict[str, float]]] = Field(description="`after - before`, ... -> figures.")
    exceeded: list[str] = Field(description="Limits of `eval.fail_if` that were exceeded.")


class Export(_Event):
    """A step of an export job begins, or has ended (`jobs.exports.ExportStep`)."""

    type: Literal["export"] = "export"
    step: str
    state: str
    reason: str | None = None


class Saved(_Event):
    """An artifact is complete on disk (`jobs.folder.Artifact` as JSON)."""

    type: Literal["saved"] = "saved"
    artifact: dict[str, Any]


class Message(_Event):
    """A line for a person."""

    type: Literal["message"] = "message"
    level: Literal["info", "warning"] = "info"
    text: str


class Failed(_Event):
    """The child is ending with an error; `reason` becomes the job's."""

    type: Literal["failed"] = "failed"
    reason: str
    error: str = Field(description="Class of the exception.")


class Finished(_Event):
    """All done; the manifest follows."""

    type: Literal["finished"] = "finished"
    train_seconds: float = Field(description="Of this job's training, over all its starts.")
    stopped_by: StoppedBy | None = Field(default=None, description="What ended it before its last step.")
    throughput: dict[str, float] = Field(
        default_factory=dict, description="Of the steps of its last start, by the names of the step metrics."
    )


class Cancelled(_Event):
    """The child was asked to stop, and did after saving what it had."""

    type: Literal["cancelled"] = "cancelled"
    step: int


Event = Annotated[
    Started
    | Resumed
    | Plan
    | Step
    | Routing
    | Evaluation
    | Assessed
    | Export
    | Saved
    | Message
    | Failed
    | Finished
    | Cancelled,
    Discriminator("type"),
]
_EVENT: TypeAdapter[Any] = TypeAdapter(Event)
_TYPE = re.compile(rb'\s*\{\s*"time"\s*:\s*"[^"]*"\s*,\s*"type"\s*:\s*"([a-z]*)"')


class EventLog:
    """Appends events to one file; one instance, in one process, writes a job's events.

    Half a line that an earlier process left is ended first: it spoils no event but its own.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+b", buffering=0)
        self._lock = threading.Lock()  # copying to a mirror has a thread, and a word to say
        if self._file.seek(0, os.SEEK_END) and os.pread(self._file.fileno(), 1, self._file.tell() - 1) != b"\n":
            self._file.write(b"\n")

    def append(self, event: _Event) -> None:
        """Write one event whole, in a single `write` where the disk allows it, or not at all.

        Raises:
            OSError: the disk is full, ...
        """
        rest = event.model_dump_json().encode() + b"\n"
        with self._lock:
            start = os.fstat(self._file.fileno()).st_size
            try:
                while rest:  # a full disk takes the beginning and says so at the next attempt alone
                    rest = rest[self._file.write(rest) :]
            except OSError:
                self._file.truncate(start)
                raise

    def close(self) -> None:
        """Sync and close."""
        os.fsync(self._file.fileno())
        self._file.close()


class Page(NamedTuple):
    """Events from one read, and the cursor of the next."""

    events: list[Any]
    cursor: int
    unreadable: int


def read(path: Path, cursor: int = 0, limit: int = 1000) -> Page:
    """Up to `limit` events from byte `cursor` on; a missing file has none.

    A line that is no event (a disk that filled up in the middle of a write) is counted, not hidden and not
    fatal; damage without a line's end counts once for each `LINE_LIMIT_BYTES`.
    """
    events: list[Any] = []
    unreadable = 0
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return Page([], cursor, 0)
    with file:
        file.seek(cursor)
        while len(events) + unreadable < limit:
            line = file.readline(LINE_LIMIT_BYTES)
            if not line.endswith(b"\n") and len(line) < LINE_LIMIT_BYTES:
                break
            cursor += len(line)
            try:
                events.append(_EVENT.validate_json(line))
            except ValueError:
                unreadable += 1
    return Page(events, cursor, unreadable)


def latest(path: Path, window_bytes: int = 1 << 20) -> dict[str, Any]:
    """The newest event of each type among the last `window_bytes` of the file, by its type's name.

    How an earlier start of the job ended is left out: a resumed job has not failed. Every look at a job asks this, so
    no more events are parsed than are given back.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return {}
    with file:
        start = max(0, file.seek(0, os.SEEK_END) - window_bytes)
        file.seek(start)
        # The last piece is being written; the first one may have begun before the window.
        lines = file.read(window_bytes).split(b"\n")[1 if start else 0 : -1]
    newest: dict[str, Any] = {}
    settled: set[str] = set()
    for line in reversed(lines):
        told = _TYPE.match(line)
        if told is not None and told[1].decode() in settled:
            continue
        try:
            event = _EVENT.validate_json(line)
        except ValueError:
            continue
        if event.type not in settled:
            newest[event.type] = event
            settled |= {event.type, *_ENDS} if event.type == "started" else {event.type}
    return newest
