"""First and last evaluation of a file that grows, is replaced, or has none."""

from pathlib import Path

import pytest

from llama_stack_provider_moe.control.server import evaluation_scan
from llama_stack_provider_moe.control.server.evaluation_scan import first_and_last
from llama_stack_provider_moe.jobdir.events import Evaluation, EventLog, Message


def write(path: Path, *steps: int | str) -> None:
    """Append evaluations by their steps, and messages."""
    log = EventLog(path)
    for each in steps:
        log.append(Message(text=each) if isinstance(each, str) else Evaluation(step=each, epoch=0, metrics={"a": each}))
    log.close()


def steps(path: Path) -> tuple[int | None, int | None]:
    first, last = first_and_last(path)
    return None if first is None else first.step, None if last is None else last.step


def test_what_is_appended_is_found(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert steps(path) == (None, None)
    write(path, "nothing yet")
    assert steps(path) == (None, None)
    for step in (0, 5, 9):
        write(path, step, "x" * 1000)
        assert steps(path) == (0, step)


def test_the_first_of_several_between_two_looks_is_the_first(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, "nothing yet")
    assert steps(path) == (None, None)
    write(path, 0, 5, 9)
    assert steps(path) == (0, 9)


def test_a_line_that_was_incomplete_is_found_later(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, 1)
    line = Evaluation(step=7, epoch=0, metrics={}).model_dump_json().encode() + b"\n"
    with path.open("ab") as file:
        file.write(line[:40])
    assert steps(path) == (1, 1)
    with path.open("ab") as file:
        file.write(line[40:])
    assert steps(path) == (1, 7)


def test_another_file_of_that_name_is_read_anew(tmp_path: Path) -> None:
    path, other = tmp_path / "events.jsonl", tmp_path / "other"
    write(path, 1, 2, 3)
    assert steps(path) == (1, 3)
    write(other, 8)
    other.replace(path)
    assert steps(path) == (8, 8)


def test_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.jsonl"
    write(path, 0, *["x" * 10_000] * 200, 1)
    assert steps(path) == (0, 1)
    starts: list[int] = []
    real = evaluation_scan.scan

    def noted(path: Path, kind: type[Evaluation], start: int = 0, limit_bytes: int | None = None) -> object:
        starts.append(start)
        return real(path, kind, start, limit_bytes)

    monkeypatch.setattr(evaluation_scan, "scan", noted)
    write(path, 2)
    assert steps(path) == (0, 2)
    assert starts == [pytest.approx(path.stat().st_size, abs=evaluation_scan.OVERLAP_BYTES + 1000)]
