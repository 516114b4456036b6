"""The page about clients: its examples with our client run as they stand, but for the server's URL and the model."""

import runpy
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_stack_provider_moe.control.server import stream
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.jobdir.events import now
from llama_stack_provider_moe.jobdir.folder import Artifact
from llama_stack_provider_moe.jobdir.state import JobState
from tests.contracts.doc_blocks import ROOT
from tests.support.host_support import folder_of, over_http, serving_in_process

PAGE = ROOT / "docs" / "getting-started" / "clients.md"
EXAMPLES = [
    block.partition("```")[0]
    for block in PAGE.read_text(encoding="utf-8").split("```python\n")[1:]
    if "llama_stack_provider_moe.client" in block.partition("```")[0]
]


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PostTrainingService]:
    monkeypatch.setattr(stream, "POLL_S", 0.02)
    with serving_in_process(tmp_path / "server") as made:
        yield made


def complete_jobs(service: PostTrainingService, stop: threading.Event) -> None:
    """What a supervisor and its training processes do: each job writes a line and an adapter, and completes."""
    while not stop.wait(0.05):
        for job in service.store.list(None):
            if job.state is not JobState.SCHEDULED:
                continue
            service.store.move(job.id, JobState.IN_PROGRESS)
            folder = folder_of(service, job.id)
            folder.output.write_text("trained\n")
            adapter = folder.root / "artifacts" / "adapter"
            adapter.mkdir(parents=True)
            (adapter / "weights").write_text("w")
            saved = Artifact(
                identifier=f"{job.id}/adapter", kind="adapter", path=str(adapter), epoch=1, step=1, created_at=now(),
                bytes=1,
            )  # fmt: skip
            service.store.move(job.id, JobState.COMPLETED, artifacts=(saved,))


def test_the_page_has_examples_of_both_clients() -> None:
    assert [each for each in EXAMPLES if "AsyncClient" in each]
    assert [each for each in EXAMPLES if "AsyncClient" not in each]


def test_the_examples_run_in_the_order_of_the_page(
    service: PostTrainingService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    example_file, stop = tmp_path / "example.py", threading.Event()
    trains = threading.Thread(target=complete_jobs, args=(service, stop))
    trains.start()
    try:
        with over_http(service) as url:
            for example in EXAMPLES:
                code = example.replace("http://127.0.0.1:8321", url).replace("smollm2-moe", "owner/name")
                assert url in code
                example_file.write_text(code)
                runpy.run_path(str(example_file))
    finally:
        stop.set()
        trains.join()
    assert (tmp_path / "trained" / "adapter" / "weights").read_text() == "w"
    told = capsys.readouterr()
    assert told.out == "20\ntrained\n"
    assert "completed" in told.err
    assert len(service.store.list(None)) == 2
