"""Images of rows over the routes: stored once beside the rows, second names in jobs' folders, gone with their data."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from llama_stack_api import ResourceNotFoundError

from llama_stack_provider_moe.control.server import compat
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store import dataset_files
from llama_stack_provider_moe.control.store.dataset_files import Arriving, Room
from llama_stack_provider_moe.control.store.image_folder import LEAST_BYTES
from llama_stack_provider_moe.spec.rows.image_parts import ImageDoor
from tests.control.server.test_allowed_paths import model_at
from tests.control.server.test_datasets import files, push, refusal
from tests.support.host_support import BODY, ask, caller, folder_of, serving_in_process
from tests.support.image_bytes import asked, chunk, part, png

RED, BLUE = png(colour=255), png(3, 3, colour=255 << 16)
ROWS = [asked(part(RED)), asked(part(RED), part(BLUE)), asked(text="No image.")]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path, max_dataset_bytes=200_000, dataset_quota_bytes=300_000) as made:
        yield made


def jsonl(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def submitted(service: PostTrainingService, status: int = 200, **changes: Any) -> Any:
    body = BODY | {"data": {"dataset_id": "data:mine"}} | changes
    answer = ask(service, "POST", "/jobs", json=body)
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else refusal(answer, status)


def test_a_data_set_and_a_job_have_each_image_once(service: PostTrainingService) -> None:
    stored = push(service, content=jsonl(*ROWS)).json()
    page = ask(service, "GET", "/datasets/mine/rows").json()
    assert not page["has_more"]
    assert b"base64" not in json.dumps(page).encode()
    red = page["rows"][0]["messages"][0]["content"][0]
    assert red == {"type": "image", "sha256": red["sha256"], "format": "png", "width": 2, "height": 2}
    (rows,) = service.config.datasets_dir.glob("*/rows.jsonl")
    of_data = sorted((rows.parent / "images").iterdir())
    assert [path.name for path in of_data].count(f"{red['sha256']}.png") == 1
    assert sorted(path.read_bytes() for path in of_data) == sorted([RED, BLUE])
    assert stored["bytes"] == rows.stat().st_size + 2 * LEAST_BYTES, "a quota counts images"
    assert {path.stat().st_mode & 0o777 for path in of_data} == {0o600}

    folder = folder_of(service, submitted(service)["job_uuid"])
    of_job = sorted(folder.images.iterdir())
    assert [path.name for path in of_job] == [path.name for path in of_data]
    assert [path.stat().st_ino for path in of_job] == [path.stat().st_ino for path in of_data], "not a second name"
    assert folder.image(red["sha256"], "png").read_bytes() == RED
    job_rows = [json.loads(line) for line in folder.train_rows.read_bytes().splitlines()]
    assert job_rows[0]["messages"][0]["content"] == [red, {"type": "text", "text": "What is it?"}]
    assert job_rows[2]["messages"][0]["content"] == "No image."
    report = json.loads(folder.row_reports.read_bytes())
    assert report["train"]["notes"] == {"images": 2}

    again = push(service, content=jsonl(*ROWS)).json()
    assert (again["sha256"], again["is_new"]) == (stored["sha256"], False)
    assert ask(service, "DELETE", "/datasets/mine").status_code == 200
    assert files(service) == []
    assert folder.image(red["sha256"], "png").read_bytes() == RED, "the job's image went with the data set"


def test_what_is_refused_leaves_no_image(service: PostTrainingService) -> None:
    message = refusal(push(service, content=jsonl(*ROWS, asked(part("https://example.org/x.png")))))
    assert "row 4: messages[0].content[0]: is 'https://example.org/x.png', which this server does not fetch" in message
    assert files(service) == []
    large = [asked(part(png(colour=number, extra=chunk(b"teXt", bytes(60_000))))) for number in range(4)]
    assert "more than 200,000 bytes" in refusal(push(service, content=jsonl(*large)), 413)
    assert files(service) == []
    for number, row in enumerate(large):
        answer = push(service, name=f"d{number}", content=jsonl(row, *large[:1]))
    assert "of your 300,000 bytes on this server" in refusal(answer, 413)


def test_what_a_dead_server_left_of_images_is_deleted(service: PostTrainingService) -> None:
    arriving = Arriving(service.config, Room(1 << 20, "no room"))
    ImageDoor(service.config.images, arriving.images.keep).of_bytes(RED)
    table = service.store.datasets
    dataset_files.sweep(service.config, table)
    assert len(list(arriving.images.path.iterdir())) == 1, "images of an upload that goes on"
    arriving._file.close()
    dataset_files.sweep(service.config, table)
    assert files(service) == []


def test_a_job_that_can_not_use_the_images_is_refused_by_name(service: PostTrainingService) -> None:
    push(service, content=jsonl(*ROWS))
    packed = submitted(service, 400, data={"dataset_id": "data:mine", "packed": True})
    assert packed == (
        "data.packed: True is not valid; expected false, because 2 of the rows have images: each row keeps its own "
        "images"
    )
    for name, more in (("words", {}), ("sights", {"vision_config": {}})):
        path = model_at(service.config.models_dir / name) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | {"model_type": "qwen3_moe"} | more))
    refused = submitted(service, 400, model="words")
    assert refused.startswith("model: ")
    assert refused.endswith(
        "expected a model that reads images, because 2 of the rows have images; this one (qwen3_moe) reads text alone"
    )
    submitted(service, model="sights")
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"vision_config": None}))
    assert submitted(service, 400, model="sights").endswith("this one (qwen3_moe) reads text alone")
    blind = submitted(service, 400, data={"dataset_id": "good"}, adapter={"rank": 4, "vision": "projector"})
    assert blind == "adapter.vision: 'projector' is not valid; expected 'off', because no row has an image"
    breaker = {"retain": {"dataset_id": "data:mine"}}
    assert "is an image; recipe circuit_breaker takes text only, and sft and dpo take images" in submitted(
        service, 400, recipe="circuit_breaker", circuit_breaker=breaker
    )
    assert "an evaluation or analysis takes text only" in submitted(
        service, 400, data={"dataset_id": "good"}, eval={"retain_dataset_id": "data:mine"}
    )
    assert list((service.config.state_dir / "staging").iterdir()) == []


class Files:
    """A host with rows and images among its files."""

    CONTENT: ClassVar = {
        "file-rows": jsonl(*ROWS, asked({"type": "image_file", "image_file": {"file_id": "file-blue"}})),
        "file-blue": BLUE,
        "file-lost": jsonl(asked({"type": "image_file", "image_file": {"file_id": "file-none"}})),
        "file-forged": jsonl(
            asked({"type": "image", "sha256": "a" * 64, "format": "png", "width": 2, "height": 2}),
            asked() | {"tools": [{"url": part(RED)["image_url"]["url"]}]},
        ),
    }

    def __init__(self, owner: str | None = None) -> None:
        self._owner = owner

    async def openai_retrieve_file(self, request: Any) -> SimpleNamespace:
        """Metadata of a file, for its owner."""
        who = compat.caller()
        may = self._owner is None or (who is not None and who.principal == self._owner)
        if request.file_id not in self.CONTENT or not may:
            raise ResourceNotFoundError(request.file_id, "File", "files.list()")
        return SimpleNamespace(id=request.file_id, filename="rows.jsonl")

    async def openai_retrieve_file_content(self, request: Any) -> SimpleNamespace:
        """Its content."""
        return SimpleNamespace(body=self.CONTENT[request.file_id])


def test_rows_and_images_among_the_hosts_files(service: PostTrainingService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_HAS_DATASETS", False)
    monkeypatch.setattr(service._rows, "_deps", {compat.Api.files: Files()})
    folder = folder_of(service, submitted(service, data={"dataset_id": "file-rows"})["job_uuid"])
    assert sorted(path.read_bytes() for path in folder.images.iterdir()) == sorted([RED, BLUE])
    rows = [json.loads(line) for line in folder.train_rows.read_bytes().splitlines()]
    assert rows[3]["messages"][0]["content"][0] == rows[1]["messages"][0]["content"][1]
    lost = submitted(service, 400, data={"dataset_id": "file-lost"})
    assert "row 1: messages[0].content[0]: is file 'file-none', which can't be read: no file 'file-none'" in lost
    forged = submitted(service, 400, data={"dataset_id": "file-forged"})
    assert "row 1: messages[0].content[0]: is a part that the server makes itself" in forged
    assert "row 2: row: has a data: URL of an image where no image stands" in forged


def test_a_data_set_may_name_files_of_its_owner(service: PostTrainingService, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are copied like images in the rows; a file of somebody else is refused as one that is not there."""
    blue = {"type": "image_file", "image_file": {"file_id": "file-blue"}}
    named = "row 2: messages[0].content[0]: is file 'file-blue', "
    assert f"{named}but files are not read here" in refusal(push(service, content=jsonl(ROWS[0], asked(blue))))
    monkeypatch.setattr(service.datasets._uploads, "_deps", {compat.Api.files: Files("alice")})
    with caller("bob"):
        message = refusal(push(service, content=jsonl(ROWS[0], asked(blue))))
    assert f"{named}which can't be read: no file 'file-blue' was uploaded to this server" in message
    assert files(service) == []
    with caller("alice"):
        assert push(service, content=jsonl(ROWS[1], asked(blue))).status_code == 200
        rows = ask(service, "GET", "/datasets/mine/rows").json()["rows"]
        rows_file = asked({"type": "image_file", "image_file": {"file_id": "file-rows"}})
        assert "has no signature of an image" in refusal(push(service, content=jsonl(rows_file)))
    assert rows[1]["messages"][0]["content"][0] == rows[0]["messages"][0]["content"][1]
    (kept,) = service.config.datasets_dir.glob("*/images")
    assert sorted(path.read_bytes() for path in kept.iterdir()) == sorted([RED, BLUE])


def test_a_part_of_another_owners_image_is_refused(service: PostTrainingService) -> None:
    push(service, content=jsonl(*ROWS))
    ours = ask(service, "GET", "/datasets/mine/rows").json()["rows"][0]
    with caller("bob"):
        assert "is a part that the server makes itself" in refusal(push(service, content=jsonl(ours)))


def test_the_jobs_of_a_sweep_share_images(service: PostTrainingService) -> None:
    push(service, content=jsonl(*ROWS))
    job = BODY | {"data": {"dataset_id": "data:mine"}}
    sweep = {"job": job, "parameters": {"optimizer.lr": [1e-4, 2e-4]}, "sweep_uuid": "lr"}
    answer = ask(service, "POST", "/sweeps", json=sweep)
    assert answer.status_code == 200, answer.text
    of_jobs = [sorted(folder_of(service, name).images.iterdir()) for name in answer.json()["jobs"]]
    assert [len(each) for each in of_jobs] == [2, 2]
    assert {path.stat().st_nlink for each in of_jobs for path in each} == {3}, "the data set and two jobs"
