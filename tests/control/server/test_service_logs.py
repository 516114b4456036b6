"""Tests what the service tells of a job's output, without a server."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_stack_provider_moe.control.server import views
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.state import JobState
from tests.support.host_support import Datasets, serving_in_process, submit


@pytest.fixture
def service(tmp_path: Path) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path, Datasets()) as made:
        yield made


def test_logs_come_in_complete_lines_and_continue(service: PostTrainingService) -> None:
    job_id = submit(service)
    output = JobFolder(service.config.jobs_dir / job_id).output

    def read(tail: int = 3, offset: int | None = None) -> tuple[list[str], int]:
        answer = asyncio.run(service.logs(job_id, tail, offset))
        return answer.log_lines, answer.next_offset

    assert read() == ([], 0)
    text = "".join(f"line {number}\n" for number in range(9)) + "10%\r50%\r100%\nhalf a li"
    output.write_text(text)
    lines, offset = read()
    assert (lines, offset) == (["line 7", "line 8", "100%"], len(text) - len("half a li"))
    assert read(offset=offset) == ([], offset)
    with output.open("a") as file:
        file.write("ne\n\x1b[31mred\x1b[0m\n\n")
    lines, offset = read(offset=offset)
    assert lines == ["half a line", "red", ""]
    assert read(offset=offset) == ([], offset)
    assert read(offset=10**9) == ([], output.stat().st_size), "an offset beyond the end means the end"
    with output.open("a") as file:
        file.write("last words")
    service.store.move(job_id, JobState.FAILED, reason="it died")
    assert read(offset=offset)[0] == ["last words"], "nothing more will come"


def test_logs_are_bounded(service: PostTrainingService) -> None:
    job_id = submit(service)
    output = JobFolder(service.config.jobs_dir / job_id).output
    output.write_bytes(b"x" * (views.LOG_WINDOW_BYTES + 10) + b"\nend\n")
    answer = asyncio.run(service.logs(job_id, 10, None))
    assert answer.log_lines[-1] == "end"
    assert sum(map(len, answer.log_lines)) <= views.LOG_WINDOW_BYTES
    total, offset = b"", 0
    while True:
        answer = asyncio.run(service.logs(job_id, 10, offset))
        if answer.next_offset == offset:
            break
        total, offset = total + "".join(answer.log_lines).encode(), answer.next_offset
    assert total == b"x" * (views.LOG_WINDOW_BYTES + 10) + b"end"
