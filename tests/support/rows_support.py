"""A job's session without a process of its own, for tests of its rows; `closed_logs` closes its events."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.jobdir.events import EventLog
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec import JOB_SPEC

OPEN: list[EventLog] = []


def session(root: Path, rows: list[Any], validation: list[Any] | None = None, **body: Any) -> Session[Any]:
    """The session of an SFT job (`body` changes it) with these canonical rows and no held-out ones."""
    folder = JobFolder(root / "job")
    folder.data.mkdir(parents=True, exist_ok=True)
    folder.train_rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = {"recipe": "sft", "model": "m", "data": {"dataset_id": "rows"}, "options": {"validation_split": 0}, **body}
    if validation is not None:
        folder.validation_rows.write_text("".join(json.dumps(row) + "\n" for row in validation), encoding="utf-8")
        asked["data"]["validation_dataset_id"] = "others"
    log = EventLog(folder.events)
    OPEN.append(log)
    return Session(JOB_SPEC.validate_python(asked), folder, log)


@pytest.fixture(autouse=True)
def closed_logs() -> Iterator[None]:
    """Close the logs of the sessions that a test made."""
    yield
    while OPEN:
        OPEN.pop().close()
