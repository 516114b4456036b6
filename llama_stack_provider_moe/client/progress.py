"""Shows a job's progress while a client waits: a bar in a notebook, a line in a terminal, lines in a file."""

import html
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TextIO

from llama_stack_provider_moe.client.documents import Figure, Status, progress_of

type Show = Callable[[Status], None]
type Progress = bool | Show
_LOSSES = ("validation_loss", "loss")


@contextmanager
def display_of(progress: Progress) -> Iterator[Show]:
    """Yield the function to call with each status of a job.

    Args:
        progress: True: in the notebook or on standard error; False: nowhere; a function: that function, with each
            status that differs from the one before.
    """
    if progress is False:
        yield lambda _: None
    elif progress is not True:
        yield _changes_only(progress)
    elif (display := notebook_display()) is not None:
        yield _changes_only(_Bar(display).show)
    else:
        line = Line(sys.stderr)
        try:
            yield _changes_only(line.show)
        finally:
            line.close()


class Line:
    """In a terminal, a line that is updated in place; elsewhere a line for each new state, stage and tenth.

    Args:
        out: where to write.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._is_terminal = out.isatty()
        self._drawn = False
        self._last: tuple[object, ...] | None = None

    def show(self, status: Status) -> None:
        """Draw a status."""
        text = words_of(status)
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            self._out.write(f"\r{text[:width]}\x1b[K")
            self._drawn = True
        else:
            part = share_of(status)
            mark = (status["status"], progress_of(status).get("stage"), None if part is None else int(part * 10))
            if mark != self._last:
                self._out.write(text + "\n")
            self._last = mark
        self._out.flush()

    def close(self) -> None:
        """End the line."""
        if self._drawn:
            self._out.write("\n")
            self._out.flush()


class _Bar:
    """A bar in the output of a notebook's cell."""

    def __init__(self, display: Any) -> None:
        self._display = display
        self._handle: Any = None

    def show(self, status: Status) -> None:
        """Draw a status."""
        part = share_of(status)
        value = "" if part is None else f' value="{part:.4f}"'
        shown = self._display.HTML(f"<progress max=1{value}></progress> {html.escape(words_of(status))}")
        if self._handle is None:
            self._handle = self._display.display(shown, display_id=True)
        else:
            self._handle.update(shown)


def notebook_display() -> Any:
    """Return `IPython.display` if this code runs in a notebook's kernel, else None."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if shell is None or not hasattr(shell, "kernel"):
        return None
    return import_module("IPython.display")


def share_of(status: Status) -> float | None:
    """Return how much of a job's current work is done, from 0 to 1; None if that is not known."""
    progress = progress_of(status)
    done, total = progress.get("step"), progress.get("max_steps")
    if not total and (work := progress.get("work")):
        done, total = work["done"], work["total"]
    if not total or done is None:
        return None
    return min(1.0, max(0.0, done / total))


def words_of(status: Status) -> str:
    """Return a status as one line of printable text."""
    progress = progress_of(status)
    parts = [f"job {status['job_uuid']}: {status['status'].replace('_', ' ')}"]
    if stage := progress.get("stage"):
        parts.append(stage)
    if waits_for := progress.get("waits_for"):
        parts.append(f"waits for {', '.join(waits_for)}")
    if position := progress.get("queue_position"):
        parts.append(f"number {position} in the queue")
    if (step := progress.get("step")) is not None and (most := progress.get("max_steps")):
        parts.append(f"step {step} of {most}")
    metrics: dict[str, Figure] = progress.get("metrics") or {}
    name = next((each for each in _LOSSES if each in metrics), None)
    if name is not None:
        value = metrics[name]
        parts.append(f"{name} {value:.4g}" if isinstance(value, float | int) else f"{name} {value}")
    if (left_s := progress.get("eta_s")) is not None and status["status"] == "in_progress":
        parts.append(f"{left_s:.0f} s left")
    if status["status"] in ("failed", "cancelled") and (reason := progress.get("reason")):
        parts.append(reason)
    return "".join(each if each.isprintable() else " " for each in ", ".join(parts))


def _changes_only(show: Show) -> Show:
    last: Status | None = None

    def shown(status: Status) -> None:
        nonlocal last
        if status != last:
            show(status)
        last = status

    return shown
