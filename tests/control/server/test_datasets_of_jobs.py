"""Uploaded data sets as the rows of jobs: which version a name means, and whose it is."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from llama_stack_api import ResourceNotFoundError

from llama_stack_provider_moe.control.server import compat
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.jobdir.row_sources import source_lines
from tests.control.server.test_datasets import JSONL, VERSION, pushed, text
from tests.support.host_support import (
    BODY,
    Datasets,
    ask,
    caller,
    folder_of,
    serving_in_process,
)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path) as made:
        yield made


def submitted(service: PostTrainingService, dataset_id: str, status: int = 200) -> Any:
    answer = ask(service, "POST", "/jobs", json=BODY | {"data": {"dataset_id": dataset_id}})
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["error"]["message"]


def test_a_job_reads_the_version_that_it_names(service: PostTrainingService) -> None:
    pushed(service)
    newest = pushed(service, content=JSONL + text("new") + b"\n")
    for dataset_id, version, rows in (
        ("mine", newest, 13), ("data:mine", newest, 13), (f"mine@{VERSION}", VERSION, 12),
        (f"mine@{VERSION[:6]}", VERSION, 12), (f"data:mine@{VERSION[:9]}", VERSION, 12),
    ):  # fmt: skip
        answer = submitted(service, dataset_id)
        assert answer["notes"] == [f"data.dataset_id: your data set 'mine', version {version[:12]} with {rows} rows"], (
            dataset_id
        )
        folder = folder_of(service, answer["job_uuid"])
        assert len(folder.train_rows.read_bytes().splitlines()) == rows
        source = {"kind": "data", "id": "mine", "version": version, "rows": rows}
        assert ask(service, "GET", f"/jobs/{answer['job_uuid']}").json()["sources"] == {"train": source}
        assert source_lines(folder) == [f"train: uploaded data set 'mine', version {version[:12]}: {rows} rows"]


def test_a_name_that_the_host_has_too_must_say_whose(service: PostTrainingService) -> None:
    job = submitted(service, "good")
    assert "notes" not in job
    of_host = {"train": {"kind": "host data set", "id": "good", "version": None, "rows": 12}}
    assert ask(service, "GET", f"/jobs/{job['job_uuid']}").json()["sources"] == of_host
    pushed(service, "good", text("1") + b"\n" + text("2"))
    assert submitted(service, "good", 400) == (
        "data.dataset_id: 'good' is not valid; expected data:good for the data set that you uploaded, or host:good for "
        "the host data set: both have this name"
    )
    for dataset_id, rows, kind in (("data:good", 2, "data"), ("host:good", 12, "host data set")):
        job = submitted(service, dataset_id)
        source = ask(service, "GET", f"/jobs/{job['job_uuid']}").json()["sources"]["train"]
        assert (source["rows"], source["kind"], source["id"]) == (rows, kind, "good")
    with caller("bob"):
        assert "notes" not in submitted(service, "good"), "others do not notice"


def test_a_data_set_that_is_not_there(service: PostTrainingService) -> None:
    pushed(service)
    assert submitted(service, "nothing", 404) == "no data set 'nothing' is registered on this server"
    assert submitted(service, "host:mine", 404) == "no data set 'mine' is registered on this server"
    assert submitted(service, "data:good", 404) == "you have no data set 'good' on this server"
    assert submitted(service, "mine@000000", 404) == "you have no version '000000' of a data set 'mine' on this server"
    assert "expected 6 to 64 hexadecimal digits" in submitted(service, "mine@", 400)
    assert submitted(service, "data:../../etc", 404) == "you have no data set '../../etc' on this server"


def test_rows_that_a_job_can_not_use_are_refused_by_their_number(service: PostTrainingService) -> None:
    pushed(service, content=JSONL + b'{"question": "?"}\n')
    message = submitted(service, "mine", 400)
    assert message.startswith("dataset 'mine': 1 problem(s) in 13 row(s): row 13: ")
    assert not any((service.config.state_dir / "staging").iterdir())


def test_every_set_of_a_job_may_be_an_uploaded_one(service: PostTrainingService) -> None:
    pushed(service)
    pushed(service, "prompts", b"".join(json.dumps({"prompt": f"{n}?"}).encode() + b"\n" for n in range(4)))
    body = BODY | {
        "data": {"dataset_id": "good", "validation_dataset_id": "data:mine"},
        "eval": {"safe_dataset_id": "prompts", "retain_dataset_id": f"mine@{VERSION[:10]}"},
    }
    sources = ask(service, "POST", "/jobs/validate", json=body).json()["sources"]
    assert {part: (source["kind"], source["id"]) for part, source in sources.items()} == {
        "train": ("host data set", "good"), "validation": ("data", "mine"), "eval-safe": ("data", "prompts"),
        "eval-retain": ("data", "mine"),
    }  # fmt: skip


class Files:
    """A host with files in place of data sets, as OGX has them."""

    async def openai_retrieve_file(self, request: Any) -> SimpleNamespace:
        """Metadata of the one file."""
        if request.file_id != "file-1":
            raise ResourceNotFoundError(request.file_id, "File", "files.list()")
        return SimpleNamespace(id="file-1", filename="rows.jsonl")

    async def openai_retrieve_file_content(self, request: Any) -> SimpleNamespace:
        """Its content."""
        await self.openai_retrieve_file(request)
        return SimpleNamespace(body=JSONL)


def test_on_a_host_with_files_a_name_may_be_a_file(
    service: PostTrainingService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "_HAS_DATASETS", False)
    monkeypatch.setattr(service._rows, "_deps", {compat.Api.files: Files()})
    job = submitted(service, "file-1")
    of_host = {"train": {"kind": "host file", "id": "file-1", "version": None, "rows": 12}}
    assert ask(service, "GET", f"/jobs/{job['job_uuid']}").json()["sources"] == of_host
    pushed(service)
    assert submitted(service, "mine")["notes"]
    pushed(service, "file-1")
    assert "host:file-1 for the host file: both have this name" in submitted(service, "file-1", 400)
    assert submitted(service, "file-2", 404) == "no file 'file-2' was uploaded to this server"


def test_beside_data_sets_an_id_of_the_hosts_form_is_a_file(
    service: PostTrainingService, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_id = "file-" + "0123456789abcdef" * 2
    deps = {compat.Api.datasets: Datasets()}
    assert compat.rows_kind(deps, file_id) == "host data set", "no provider of files"
    deps |= {compat.Api.files: Files()}
    kinds = {name: compat.rows_kind(deps, name) for name in ("good", "file-1", "file-name", file_id, file_id + ".x")}
    assert [name for name, kind in kinds.items() if kind == "host file"] == [file_id]
    monkeypatch.setattr(service._rows, "_deps", deps)
    assert submitted(service, "good")["job_uuid"]
    assert submitted(service, file_id, 404) == f"no file {file_id!r} was uploaded to this server"


def test_the_host_is_not_asked_about_names_that_nobody_uploaded(tmp_path: Path) -> None:
    datasets, asked = Datasets(), []
    datasets.during = lambda: asked.append(1)
    with serving_in_process(tmp_path, datasets) as service:
        submitted(service, "good")
    assert len(asked) == 1, "once, to read it"
