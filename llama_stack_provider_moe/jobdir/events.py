"""Typed events of a job: one JSON object per line, appended by the training process and read by all others.

The file is the only channel from a training process to the outside: status, metrics, logs and the dashboard are views
of it. A reader keeps a byte offset as its cursor. A line without its newline is still being written and is left for the
next read.
"""

import json
import os
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AwareDatetime, BaseModel, ConfigDict, Discriminator, Field, TypeAdapter, ValidationError

from llama_stack_provider_moe.ground.clock import now as now
from llama_stack_provider_moe.ground.redaction import scrubbed
from llama_stack_provider_moe.jobdir.attempt import require_current
from llama_stack_provider_moe.jobdir.routing_figures import LayerFigures, LayerRouting, figures_of, mutual_information
from llama_stack_provider_moe.jobdir.state import StoppedBy as StoppedBy

# If an earlier start of a job wrote one of these, it says nothing about the current start.
ENDS = ("failed", "finished", "cancelled")
# Longer than any event. Damaged content without newlines is read in pieces of this size.
LINE_LIMIT_BYTES = 4 << 20


class _Event(BaseModel):
    # Readers must see a loss that became NaN. By default it is written as null, which is not a float.
    model_config = ConfigDict(ser_json_inf_nan="strings", defer_build=True)

    time: AwareDatetime = Field(default_factory=now)


class Started(_Event):
    """The training process is alive and about to load the model."""

    type: Literal["started"] = "started"
    pid: int
    versions: dict[str, str] = Field(description="Versions by distribution name, and the device.")


class Resumed(_Event):
    """A later start of the same job resumes from a checkpoint; steps after `step` that were written before are undone.

    A start without a checkpoint begins again with the model and resumes at step 0.
    """

    type: Literal["resumed"] = "resumed"
    step: int
    checkpoint: str | None = Field(description="Name of the checkpoint; null at step 0.")


class Plan(_Event):
    """What was found in the model and what will be trained, before the first step; also in `resolved.json`."""

    type: Literal["plan"] = "plan"
    plan: Mapping[str, object]


class Step(_Event):
    """One optimiser step. Losses are in nats, times in seconds, memory in bytes."""

    type: Literal["step"] = "step"
    step: int = Field(ge=0, lt=2**63)
    max_steps: int = Field(ge=0, lt=2**63)
    epoch: float
    metrics: dict[str, float]
    eta_s: float | None = None


class Routing(_Event):
    """Router health of one optimiser step.

    Each step has figures of every layer. Some have tables too, with the share of every expert: the first step of a
    start, those that `moe.routing_every_n_steps` names, and those with a checkpoint, so that the last step has them.
    """

    type: Literal["routing"] = "routing"
    step: int
    layers: list[LayerRouting] = Field(
        description="Tables, one per layer that has experts, over the tokens of `steps` steps; empty at other steps."
    )
    sets: dict[str, list[LayerRouting]] = Field(
        default_factory=dict, description="The same for the tokens of each data set, if a step mixes data sets."
    )
    steps: int = Field(
        default=1, ge=1, description="Number of steps that the tables cover: this one and those since the last tables."
    )
    by_layer: LayerFigures | None = Field(
        default=None, description="Figures of this step; null where the tables are of this step alone."
    )
    by_set: dict[str, dict[str, float]] = Field(
        default_factory=dict,
        description="Figures over the layers of each data set in this step; empty where `by_layer` is null.",
    )
    mutual_information: float | None = Field(
        default=None, description="Of data set and expert in this step, in nats; null with less than two data sets."
    )

    def in_step(self) -> LayerFigures | None:
        """Return the figures of every layer in this step; None on a dense model."""
        return self.by_layer or figures_of(self.layers)

    def figures(self) -> dict[str, float]:
        """Return worst and mean values over layers, if any: shares of the routed tokens, entropies in nats.

        With data sets, `mutual_information` is that of set and expert in nats, the mean over layers.
        """
        in_step = self.in_step()
        if in_step is None:
            return {}
        found = in_step.over_layers()
        if self.mutual_information is not None:
            found["mutual_information"] = self.mutual_information
        elif len(self.sets) > 1:  # an event of an older version
            found["mutual_information"] = mutual_information(list(self.sets.values()))
        return found

    def figures_by_set(self) -> dict[str, dict[str, float]]:
        """Return the figures of each data set in this step."""
        if self.by_layer is not None:
            return self.by_set
        return {name: found.over_layers() for name, each in self.sets.items() if (found := figures_of(each))}


class Evaluation(_Event):
    """Held-out figures at `step` (0: before training)."""

    type: Literal["evaluation"] = "evaluation"
    step: int
    epoch: float
    metrics: dict[str, float]


class Assessed(_Event):
    """What `eval` measured at `step` (0: before training), each figure as {n, value, low, high} with 95% intervals."""

    type: Literal["assessed"] = "assessed"
    step: int
    measured: dict[str, dict[str, dict[str, float]]] = Field(description="Figures by state (before, after, ...).")
    differences: dict[str, dict[str, dict[str, float]]] = Field(
        description="Figures by difference (`after - before`, ...)."
    )
    exceeded: list[str] = Field(description="Limits of `eval.fail_if` that were exceeded.")


class Export(_Event):
    """A step of an export job begins, or has ended (`jobdir.export_steps.ExportStep`)."""

    type: Literal["export"] = "export"
    step: str
    state: str
    reason: str | None = None


class Progress(_Event):
    """A sign of life and the progress of a stage that is not a training step (see `liveness`).

    A stage writes one event when it begins and ends, and at most one every `liveness.EVERY_S` seconds in between.
    """

    type: Literal["progress"] = "progress"
    stage: str = Field(max_length=200, description="Name of the stage, such as `loading weights`.")
    done: int = Field(ge=0, lt=2**63, description="Number of finished units.")
    total: int | None = Field(default=None, ge=0, lt=2**63, description="Total number of units; null if unknown.")
    unit: str = Field(default="steps", max_length=200, description="Unit of `done` and `total`, in the plural.")


class Saved(_Event):
    """An artifact is complete on disk (`jobdir.folder.Artifact` as JSON)."""

    type: Literal["saved"] = "saved"
    artifact: dict[str, object]


class Message(_Event):
    """A line for the user."""

    type: Literal["message"] = "message"
    level: Literal["info", "warning"] | str = Field(default="info", description="Later versions may add levels.")
    text: str


class Failed(_Event):
    """The training process is ending with an error; `reason` becomes the job's reason."""

    type: Literal["failed"] = "failed"
    reason: str
    error: str = Field(description="Class of the exception.")


class Finished(_Event):
    """Training is done; the manifest follows."""

    type: Literal["finished"] = "finished"
    train_seconds: float = Field(description="Duration of this job's training over all its starts, in seconds.")
    stopped_by: StoppedBy | str | None = Field(default=None, description="What stopped training before its last step.")
    throughput: dict[str, float] = Field(
        default_factory=dict, description="Throughput of its last start, by the names of the step metrics."
    )


class Cancelled(_Event):
    """The training process stopped on request: after `step` with a checkpoint, or before its first step (0) without."""

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
    | Progress
    | Saved
    | Message
    | Failed
    | Finished
    | Cancelled,
    Discriminator("type"),
]
_EVENT: TypeAdapter[Event] = TypeAdapter(Event, config=ConfigDict(defer_build=True))


class Unknown(_Event):
    """An event of a type that only a later version of this package knows, with all its fields."""

    model_config = ConfigDict(extra="allow")

    time: AwareDatetime
    type: str = Field(pattern=r"^[a-z_]{1,64}$")


def parse(line: bytes) -> Any:
    """Parse one line of the file. An event of an unknown type becomes an `Unknown`.

    Raises:
        ValueError: The line is not an event.
    """
    try:
        return _EVENT.validate_json(line)
    except ValidationError as error:
        if error.errors(include_input=False, include_url=False)[0]["type"] != "union_tag_invalid":
            raise
    return Unknown.model_validate_json(line)


_TYPE = re.compile(rb'\s*\{\s*"time"\s*:\s*"[^"]*"\s*,\s*"type"\s*:\s*"([a-z_]*)"')


class EventLog:
    """Appends events to one file. Only one instance in one process writes a job's events.

    If an earlier process left an incomplete line, a newline is added first, so that it damages no other event.

    Args:
        path: The file.
        secrets: Texts to hide in all events (`redaction.known_secrets`), in addition to passwords in URLs.
    """

    def __init__(self, path: Path, secrets: Iterable[str] = ()) -> None:
        require_current()
        self._secrets = [form for secret in secrets for form in {secret, json.dumps(secret)[1:-1]}]
        self._file = path.open("a+b", buffering=0)
        self._lock = threading.Lock()  # the thread that copies to a mirror writes events, too
        if self._file.seek(0, os.SEEK_END) and os.pread(self._file.fileno(), 1, self._file.tell() - 1) != b"\n":
            self._file.write(b"\n")

    def append(self, event: _Event) -> None:
        """Write one event completely (if possible in a single `write`) or not at all.

        Raises:
            OSError: The disk is full, or the file can't be written.
        """
        rest = scrubbed(event.model_dump_json(), self._secrets).encode() + b"\n"
        with self._lock:
            require_current()
            start = os.fstat(self._file.fileno()).st_size
            try:
                while rest:  # a full disk writes the beginning, and fails only at the next call
                    rest = rest[self._file.write(rest) :]
            except OSError:
                self._file.truncate(start)
                raise

    def close(self) -> None:
        """Flush the file to the disk and close it."""
        os.fsync(self._file.fileno())
        self._file.close()


class Page(NamedTuple):
    """Events from one read, and the cursor for the next one."""

    events: list[Any]
    cursor: int
    unreadable: int


def read(path: Path, cursor: int = 0, limit: int = 1000) -> Page:
    """Read up to `limit` events from byte `cursor` on; a missing file has none.

    A line that is not an event (for instance, the disk filled up during a write) is counted; it is neither hidden nor
    fatal. Damaged content without newlines counts once per `LINE_LIMIT_BYTES`.
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
                events.append(parse(line))
            except ValueError:
                unreadable += 1
    return Page(events, cursor, unreadable)


def latest(path: Path, window_bytes: int = 1 << 20) -> dict[str, Any]:
    """Return the newest event of each type in the last `window_bytes` of the file, by type name, newest first.

    Events about the end of an earlier start are left out: a resumed job has not failed. This parses no more events than
    it returns.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return {}
    with file:
        start = max(0, file.seek(0, os.SEEK_END) - window_bytes)
        file.seek(start)
        # The last piece is still being written; the first piece may have begun before the window.
        lines = file.read(window_bytes).split(b"\n")[1 if start else 0 : -1]
    return newest_of(lines)


def newest_of(lines: Sequence[bytes]) -> dict[str, Any]:
    """Return the newest event of each type in lines of the file, see `latest`."""
    newest: dict[str, Any] = {}
    settled: set[str] = set()
    for line in reversed(lines):
        match = _TYPE.match(line)
        if match is not None and match[1].decode() in settled:
            continue
        try:
            event = parse(line)
        except ValueError:
            continue
        if event.type not in settled:
            newest[event.type] = event
            settled |= {event.type, *ENDS} if event.type == "started" else {event.type}
    return newest
