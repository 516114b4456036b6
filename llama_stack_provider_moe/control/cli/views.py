"""What a user sees while following a job: a progress bar on a terminal, lines elsewhere, JSON lines on request."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Protocol

from rich.console import RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from llama_stack_provider_moe.client.documents import Status, progress_of
from llama_stack_provider_moe.control.cli import show
from llama_stack_provider_moe.control.cli.client import state_of
from llama_stack_provider_moe.control.cli.screen import Screen
from llama_stack_provider_moe.jobdir.output import printable
from llama_stack_provider_moe.jobdir.state import JobState

# Training may take several steps a second; a person, or the log of a CI, needs fewer lines.
STEP_LINE_S = 10.0
MOST_OF_NAME = 24  # characters of a job's name beside a bar


class View(Protocol):
    """Shows one status after another."""

    def show(self, status: Status) -> None:
        """Show the status of a job as it is now."""


@contextmanager
def view(screen: Screen) -> Iterator[View]:
    """Return the view that suits `screen`."""
    if screen.as_json:
        yield JsonLines(screen)
    elif screen.live:
        columns = [
            TextColumn("{task.fields[job]}", markup=False),
            TextColumn("{task.description}", markup=False),
            _BarOfKnownLength(),
            TextColumn("{task.fields[steps]}", markup=False),
            TextColumn("{task.fields[figures]}", markup=False),
            _Elapsed(),
        ]
        progress = Progress(*columns, console=screen.out, transient=True, expand=True)
        with screen.drawing(), progress:
            yield Bar(screen, progress)
    else:
        yield Lines(screen)


class _BarOfKnownLength(ProgressColumn):
    """A bar, or nothing if the length is not known: rich would draw a full bar that pulses."""

    def __init__(self) -> None:
        super().__init__()
        self._bar = BarColumn(bar_width=None)

    def render(self, task: Task) -> RenderableType:
        """See rich."""
        return Text("") if task.total is None else self._bar.render(task)


class _Elapsed(ProgressColumn):
    """Time since the job started, or while it waits since it was submitted; runs on between two requests."""

    def render(self, task: Task) -> RenderableType:
        """See rich."""
        since = task.fields["since"]
        if since is None:
            return Text("")
        return Text(show.duration((datetime.now(UTC) - datetime.fromisoformat(since)).total_seconds()))


class JsonLines:
    """Prints every status document as a line of JSON."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def show(self, status: Status) -> None:
        """See `View`."""
        self._screen.line(status)


class News:
    """Finds what is new in a status: evaluations, checkpoints, steps of exports."""

    def __init__(self) -> None:
        self._evaluated: set[int] = set()
        self._saved: set[str] = set()
        self._steps: dict[tuple[str, str], str] = {}

    def of(self, status: Status) -> list[str]:
        """Return one line for each of them."""
        lines = []
        both = progress_of(status).get("evaluation")
        for found in () if both is None else (both["first"], both["last"]):
            if found["step"] not in self._evaluated:
                self._evaluated.add(found["step"])
                lines.append(show.evaluation(found))
        for each in status["checkpoints"]:
            if each["identifier"] not in self._saved:
                self._saved.add(each["identifier"])
                lines.append(f"saved {each['kind']} {each['identifier']}, {show.size(each['bytes'])}")
        for export in progress_of(status).get("exports") or ():
            for step in export["steps"]:
                key, state = (export["job_uuid"], step["name"]), step["state"]
                if self._steps.get(key, "scheduled") != state:
                    told = step["reason"] or step["note"]
                    lines.append(f"{step['name']}: {state}" + (f", {told}" if told else ""))
                self._steps[key] = state
        return lines


class Lines:
    """Prints a line for each new stage and all news, and at most one line per `STEP_LINE_S` for steps.

    A line is printed once: a status in which only the time left differs says nothing new. If the job waits again, its
    lines count anew.
    """

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._news = News()
        self._stage: tuple[str | None, str] | None = None
        self._said_at = 0.0
        self._said: set[tuple[object, ...]] = set()

    def show(self, status: Status) -> None:
        """See `View`."""
        for line in self._news.of(status):
            self._screen.say(line)
        if state_of(status).over:
            self._screen.say(show.ended(status))
            return
        resources = progress_of(status)
        stage = (resources.get("stage"), status["status"])
        if self._stage is not None and self._stage[1] != status["status"]:
            self._said.clear()
        # Not the metrics: they belong to the step.
        told = (*stage, show.work(status), resources.get("step"), resources.get("queue_position"),
                tuple(resources.get("waits_for") or ()))  # fmt: skip
        moment = time.monotonic()
        if told not in self._said and (stage != self._stage or moment - self._said_at >= STEP_LINE_S):
            self._said.add(told)
            self._said_at = moment
            self._screen.say(f"{status['job_uuid']}: {show.standing(status)}")
        self._stage = stage


class Bar:
    """Draws a live line: job, stage, progress, loss, time left, elapsed time. News and notes are printed above it."""

    def __init__(self, screen: Screen, progress: Progress) -> None:
        self._screen = screen
        self._progress = progress
        self._news = News()
        self._task: TaskID = progress.add_task("", total=None, job="", steps="", figures="", since=None)

    def show(self, status: Status) -> None:
        """See `View`."""
        for line in self._news.of(status):
            self._screen.say(line)
        if state_of(status).over:
            self._progress.stop()
            self._screen.say(show.ended(status))
            return
        resources = progress_of(status)
        done, total, told = _standing(status)
        self._progress.update(
            self._task,
            job=printable(shorten(status["job_uuid"])),
            description=printable(str(resources.get("stage") or status["status"])),
            completed=done,
            total=total,
            steps=printable(told),
            figures=printable(", ".join(show.figures(status))),
            since=status.get("started_at") or status.get("scheduled_at"),
        )


def shorten(job_id: str) -> str:
    """Shorten a job's name, to leave room for a bar beside it."""
    return job_id if len(job_id) <= MOST_OF_NAME else f"{job_id[: MOST_OF_NAME - 1]}…"


def _standing(status: Status) -> tuple[int | None, int | None, str]:
    """Return done, total and text of the current stage, or of the training steps if the stage has no count."""
    resources = progress_of(status)
    if state_of(status) is JobState.SCHEDULED:  # a resumed job has steps already, and waits as well
        position = resources.get("queue_position")
        if waits_for := resources.get("waits_for"):
            return 0, None, show.waits(waits_for)
        return 0, None, f"number {position} in the queue" if position else ""
    work = resources.get("work")
    if work is not None and (told := show.work(status)):
        return work["done"], work["total"], told
    step, total = resources.get("step"), resources.get("max_steps")
    return step or 0, total, f"{step} of {total}" if step is not None else ""
