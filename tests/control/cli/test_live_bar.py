"""The live line of a followed job, drawn on a simulated terminal."""

import io
import re
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.console import Console

from llama_stack_provider_moe.control.cli import views
from llama_stack_provider_moe.control.cli.screen import Screen

FULL = "━"  # character of a bar, full or empty


class Terminal(io.StringIO):
    """Keeps what is drawn."""

    def isatty(self) -> bool:
        return True


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()


def a_status(state: str = "in_progress", **resources: Any) -> dict[str, Any]:
    started = None if state == "scheduled" else ago(65)
    return {
        "job_uuid": "my-job", "status": state, "scheduled_at": ago(3700), "started_at": started, "completed_at": None,
        "checkpoints": [], "resources_allocated": {"stage": "training", "step": None, "max_steps": None, **resources},
    }  # fmt: skip


def drawn(status: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """The live line at one moment, as a reader sees it."""
    with view_on_a_terminal(monkeypatch) as (shown, terminal, progress):
        shown.show(status)
        terminal.truncate(0)
        terminal.seek(0)
        progress.refresh()
        (line,) = [each for each in plain(terminal.getvalue()).splitlines() if each.strip()]
        return line


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")


class view_on_a_terminal:
    """The view of a terminal that keeps what is drawn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, width: int = 120) -> None:
        self.terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", self.terminal)
        monkeypatch.setenv("TERM", "xterm")
        self.screen = Screen(as_json=False)
        self.screen.out = Console(file=self.terminal, force_terminal=True, width=width, markup=False, highlight=False)  # type: ignore[assignment]
        self._view = views.view(self.screen)

    def __enter__(self) -> tuple[views.Bar, Terminal, Any]:
        bar = self._view.__enter__()
        assert isinstance(bar, views.Bar)
        return bar, self.terminal, bar._progress

    def __exit__(self, *raised: Any) -> None:
        self._view.__exit__(*raised)


def test_it_names_job_stage_progress_and_elapsed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    line = drawn(a_status(step=2, max_steps=8, metrics={"loss": 0.5}, eta_s=247.0), monkeypatch)
    assert line.split()[:2] == ["my-job", "training"]
    assert "2 of 8" in line
    assert "loss 0.5, ETA 4m07s" in line
    assert re.fullmatch(r"1m0[5-9]s", line.split()[-1])
    assert FULL in line


@pytest.mark.parametrize(
    "resources",
    [{"stage": "queued", "queue_position": 3}, {"stage": "queued", "queue_position": 3, "step": 8, "max_steps": 8}],
)
def test_a_job_that_waits_has_no_bar(resources: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    line = drawn(a_status("scheduled", **resources), monkeypatch)
    assert FULL not in line
    assert line.split()[:2] == ["my-job", "queued"]
    assert "number 3 in the queue" in line
    assert line.split()[-1] == "1h01m", "since it was submitted"


@pytest.mark.parametrize("stage", ["starting", "loading weights"])
def test_a_stage_of_unknown_length_has_no_bar(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = drawn(a_status(stage=stage), monkeypatch)
    assert FULL not in line
    assert stage in line


def test_a_long_name_leaves_room(monkeypatch: pytest.MonkeyPatch) -> None:
    status = a_status(step=2, max_steps=8) | {"job_uuid": "x" * 128}
    line = drawn(status, monkeypatch)
    assert "x" * 23 + "…" in line
    assert "x" * 24 not in line
    assert FULL in line


def test_notes_on_the_same_terminal_are_printed_above_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    error = Terminal()
    monkeypatch.setattr(sys, "stderr", error)
    monkeypatch.setattr(sys, "__stderr__", error)
    with (made := view_on_a_terminal(monkeypatch)) as (shown, terminal, _):
        shown.show(a_status(step=2, max_steps=8))
        made.screen.note("the server answers again")
        lines = [line.strip() for line in plain(terminal.getvalue()).splitlines()]
    assert "the server answers again" in lines, "on a line of its own"
    assert error.getvalue() == ""
    made.screen.note("afterwards")
    assert error.getvalue() == "afterwards\n"


def test_notes_to_a_file_stay_there(monkeypatch: pytest.MonkeyPatch) -> None:
    error = io.StringIO()
    monkeypatch.setattr(sys, "stderr", error)
    monkeypatch.setattr(sys, "__stderr__", error)
    with (made := view_on_a_terminal(monkeypatch)) as (shown, terminal, _):
        shown.show(a_status(step=2, max_steps=8))
        made.screen.note("the server answers again")
    assert "the server answers again" not in plain(terminal.getvalue())
    assert error.getvalue() == "the server answers again\n"
