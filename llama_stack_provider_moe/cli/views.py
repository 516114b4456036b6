"""What is said while a job is followed: a progress bar on a terminal, lines elsewhere, JSON lines on request."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from llama_stack_provider_moe.cli import show
from llama_stack_provider_moe.cli.screen import Screen
from llama_stack_provider_moe.cli.server import state_of
from llama_stack_provider_moe.jobs.output import printable

# Steps of a job come as often as they like; lines for a person, or for a CI's log, do not.
STEP_LINE_S = 10.0


class View(Protocol):
    """Shows one status after the other."""

    def show(self, status: dict[str, Any]) -> None:
        """The job stands like this now."""


@contextmanager
def view(screen: Screen) -> Iterator[View]:
    """The view that suits `screen`."""
    if screen.as_json:
        yield JsonLines(screen)
    elif screen.live:
        columns = [
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[steps]}", markup=False),
            TextColumn("{task.fields[figures]}", markup=False),
        ]
        with Progress(*columns, console=screen.out, transient=True, expand=True) as progress:
            yield Bar(screen, progress)
    else:
        yield Lines(screen)


class JsonLines:
    """Every status document, a line each."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def show(self, status: dict[str, Any]) -> None:
        """See `View`."""
        self._screen.line(status)


class News:
    """What a status tells that those before it did not: evaluations, checkpoints, steps of exports."""

    def __init__(self) -> None:
        self._evaluated: set[int] = set()
        self._saved: set[str] = set()
        self._steps: dict[tuple[str, str], str] = {}

    def of(self, status: dict[str, Any]) -> list[str]:
        """A line for each."""
        lines = []
        both = (status["resources_allocated"] or {}).get("evaluation") or {}
        for found in both.values():
            if found["step"] not in self._evaluated:
                self._evaluated.add(found["step"])
                lines.append(show.evaluation(found))
        for each in status["checkpoints"]:
            if each["identifier"] not in self._saved:
                self._saved.add(each["identifier"])
                lines.append(f"saved {each['kind']} {each['identifier']}, {show.size(each['bytes'])}")
        for export in (status["resources_allocated"] or {}).get("exports") or ():
            for step in export["steps"]:
                key, state = (export["job_uuid"], step["name"]), step["state"]
                if self._steps.get(key, "scheduled") != state:
                    told = step["reason"] or step["note"]
                    lines.append(f"{step['name']}: {state}" + (f", {told}" if told else ""))
                self._steps[key] = state
        return lines


class Lines:
    """A line for each change of stage and for news, and for steps at most one in `STEP_LINE_S`."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._news = News()
        self._stage: Any = None
        self._said_at = 0.0

    def show(self, status: dict[str, Any]) -> None:
        """See `View`."""
        for line in self._news.of(status):
            self._screen.say(line)
        if state_of(status).ended:
            self._screen.say(show.ended(status))
            return
        stage = ((status["resources_allocated"] or {}).get("stage"), status["status"])
        moment = time.monotonic()
        if stage != self._stage or moment - self._said_at >= STEP_LINE_S:
            self._stage, self._said_at = stage, moment
            self._screen.say(f"{status['job_uuid']}: {show.standing(status)}")


class Bar:
    """A live bar with steps, loss and time left; news stand above it."""

    def __init__(self, screen: Screen, progress: Progress) -> None:
        self._screen = screen
        self._progress = progress
        self._news = News()
        self._task: TaskID = progress.add_task("", total=None, steps="", figures="")

    def show(self, status: dict[str, Any]) -> None:
        """See `View`."""
        for line in self._news.of(status):
            self._screen.say(line)
        if state_of(status).ended:
            self._progress.stop()
            self._screen.say(show.ended(status))
            return
        resources = status["resources_allocated"] or {}
        step, total = resources.get("step"), resources.get("max_steps")
        self._progress.update(
            self._task,
            description=printable(str(resources.get("stage") or status["status"])),
            completed=step or 0,
            total=total,
            steps=printable(f"{step} of {total}") if step is not None else "",
            figures=printable(", ".join(show.figures(status))),
        )
