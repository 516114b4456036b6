"""Tests the files of a job's artifacts: listing, checksums, ranges, and no access to other files of the machine."""

import base64
import hashlib
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from llama_stack_provider_moe.control.server import files
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.jobdir.checkpoint_index import write_checksums
from llama_stack_provider_moe.jobdir.folder import Artifact
from llama_stack_provider_moe.jobdir.state import JobState
from tests.support.host_support import ask, caller, folder_of, get_raw, serving_in_process, submit

SECRET = "do not show"
CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()
JOB = "with-artifacts"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path_factory.mktemp("files")) as made:
        submit(made, job_uuid=JOB)
        folder = folder_of(made, JOB)
        (folder.adapter / "deep" / "er").mkdir(parents=True)
        (folder.adapter / "weights.bin").write_bytes(CONTENT)
        (folder.adapter / "deep" / "er" / "größe 1%2F.txt").write_text("deep")
        (folder.adapter / "empty").touch()
        os.symlink("weights.bin", folder.adapter / "alias.bin")
        os.symlink(folder.spec, folder.adapter / "leads-out")
        os.symlink("..", folder.adapter / "up")
        os.symlink("nowhere", folder.adapter / "broken")
        os.symlink("circle", folder.adapter / "circle")
        os.mkfifo(folder.adapter / "pipe")
        (folder.root / "secret").write_text(SECRET)
        checkpoint = folder.root / "checkpoints" / "epoch-1"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights.bin").write_bytes(CONTENT)
        write_checksums(checkpoint, 3)
        elsewhere = made.config.state_dir.parent / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "file").write_text(SECRET)
        places = {"adapter": folder.adapter, "epoch-1": checkpoint, "evil": elsewhere, "root": folder.root,
                  "gone": folder.root / "checkpoints" / "gone"}  # fmt: skip
        made.store.move(JOB, JobState.IN_PROGRESS)
        made.store.move(JOB, JobState.COMPLETED, artifacts=tuple(_artifact(*each) for each in places.items()))
        yield made


def _artifact(name: str, path: Path) -> Artifact:
    return Artifact(
        identifier=f"{JOB}/{name}", kind="adapter", path=str(path), epoch=1, step=3, created_at=datetime.now(UTC),
        bytes=1,
    )  # fmt: skip


def listed(service: PostTrainingService, name: str) -> dict[str, Any]:
    answer = ask(service, "GET", f"/jobs/{JOB}/artifacts/{name}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def fetch(service: PostTrainingService, path: str, name: str = "adapter", **headers: str) -> httpx.Response:
    return ask(service, "GET", f"/jobs/{JOB}/artifacts/{name}/{quote(path)}", headers=headers)


def test_every_listed_file_can_be_downloaded(service: PostTrainingService) -> None:
    found = listed(service, "adapter")
    assert (found["identifier"], found["kind"]) == (f"{JOB}/adapter", "adapter")
    assert [file["path"] for file in found["files"]] == [
        "alias.bin", "empty", "weights.bin", "deep/er/größe 1%2F.txt",
    ]  # fmt: skip
    assert found["bytes"] == sum(file["bytes"] for file in found["files"]) == 2 * len(CONTENT) + 4
    for file in found["files"]:
        answer = fetch(service, file["path"])
        assert answer.status_code == 200
        assert len(answer.content) == file["bytes"] == int(answer.headers["content-length"])
        digest = hashlib.sha256(answer.content)
        assert digest.hexdigest() == file["sha256"] == answer.headers["x-checksum-sha256"]
        assert answer.headers["etag"] == f'"{file["sha256"]}"'
        assert answer.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
        assert answer.headers["content-type"] == "application/octet-stream", "no browser runs the content"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-disposition"].startswith("attachment")


def test_checksums_are_those_of_the_training_process(service: PostTrainingService) -> None:
    by_path = {file["path"]: file["sha256"] for file in listed(service, "epoch-1")["files"]}
    assert by_path["weights.bin"] == SHA256
    assert set(by_path) == {"weights.bin", "checksums.json"}
    weights = folder_of(service, JOB).root / "checkpoints" / "epoch-1" / "weights.bin"
    weights.write_bytes(CONTENT[:-1] + b"?")  # the disk has corrupted the file
    try:
        answer = fetch(service, "weights.bin", "epoch-1")
        assert answer.headers["x-checksum-sha256"] == SHA256 != hashlib.sha256(answer.content).hexdigest()
    finally:
        weights.write_bytes(CONTENT)


def test_a_computed_checksum_follows_the_file(service: PostTrainingService) -> None:
    path = folder_of(service, JOB).adapter / "empty"
    before = files._computed.cache_info()
    assert listed(service, "adapter") == listed(service, "adapter")
    assert files._computed.cache_info().hits > before.hits, "read once"
    path.write_text("no more")
    try:
        assert fetch(service, "empty").headers["x-checksum-sha256"] == hashlib.sha256(b"no more").hexdigest()
    finally:
        path.write_text("")


@pytest.mark.parametrize(
    ("wanted", "part"),
    [
        ("bytes=0-99", CONTENT[:100]),
        ("bytes=10000-", CONTENT[10000:]),
        ("bytes=-7", CONTENT[-7:]),
        ("bytes=5-5", CONTENT[5:6]),
        ("bytes=10000-99999999", CONTENT[10000:]),
        ("bytes=-99999999", CONTENT),
    ],
)
def test_ranges(service: PostTrainingService, wanted: str, part: bytes) -> None:
    answer = fetch(service, "weights.bin", Range=wanted)
    assert (answer.status_code, answer.content) == (206, part)
    first = CONTENT.index(part) if len(part) > 1 else 5
    if wanted in ("bytes=10000-", "bytes=-7", "bytes=10000-99999999"):
        first = len(CONTENT) - len(part)
    assert answer.headers["content-range"] == f"bytes {first}-{first + len(part) - 1}/{len(CONTENT)}"
    assert answer.headers["x-checksum-sha256"] == SHA256, "the checksum is of the whole file"


@pytest.mark.parametrize(
    ("wanted", "status"),
    [("bytes=10240-", 416), ("bytes=99999999-", 416), ("bytes=-0", 416), ("bytes=9-3", 400), ("bytes=0-1,4-5", 400),
     ("bytes=", 400), ("lines=0-1", 400), ("bytes=-", 400), ("bytes=\u0661-", 400), ("bytes=" + "9" * 99 + "-", 400)],
)  # fmt: skip
def test_invalid_ranges(service: PostTrainingService, wanted: str, status: int) -> None:
    answer = ask(service, "GET", f"/jobs/{JOB}/artifacts/adapter/weights.bin", headers={"Range": wanted.encode()})
    assert answer.status_code == status
    assert answer.json()["error"]["message"].startswith("Range: ")
    if status == 416:
        assert answer.headers["content-range"] == f"bytes */{len(CONTENT)}"


def test_a_range_of_another_version_returns_the_whole_file(service: PostTrainingService) -> None:
    same = fetch(service, "weights.bin", **{"Range": "bytes=1-2", "If-Range": f'"{SHA256}"'})
    assert (same.status_code, same.content) == (206, CONTENT[1:3])
    for stale in ('"other"', "Thu, 01 Jan 2026 00:00:00 GMT", f'W/"{SHA256}"'):
        for wanted in ("bytes=1-2", "bytes=99999999-"):
            other = fetch(service, "weights.bin", **{"Range": wanted, "If-Range": stale})
            assert (other.status_code, other.content) == (200, CONTENT)


@pytest.mark.parametrize(
    "path",
    ["../secret", "..", ".", "", "deep", "deep/..", "deep/../weights.bin", "./weights.bin", "leads-out", "up/../secret",
     "up/secret", "up", "broken", "circle", "pipe", "/etc/passwd", "//etc/passwd", "weights.bin/", "weights.bin\0",
     "deep//er", "WEIGHTS.BIN", "~root", "../../../../../../etc/passwd", "x" * 5000],
)  # fmt: skip
@pytest.mark.parametrize("encoded", [False, True])
def test_other_files_are_not_served(service: PostTrainingService, path: str, encoded: bool) -> None:
    sent = "".join(f"%{byte:02X}" for byte in path.encode()) if encoded else path.replace("\0", "%00")
    answer = get_raw(service, f"/jobs/{JOB}/artifacts/adapter/{sent}")
    assert answer.status_code == 404, answer.text
    assert SECRET not in answer.text


@pytest.mark.parametrize("name", ["evil", "root", "gone", "none", "..", "checkpoints", "%00", "adapter%2F..", "secret"])
def test_no_other_folder_is_an_artifact(service: PostTrainingService, name: str) -> None:
    for path in (name, f"{name}/file", f"{name}/secret", f"{name}/spec.json"):
        answer = get_raw(service, f"/jobs/{JOB}/artifacts/{path}")
        assert answer.status_code == 404
        assert SECRET not in answer.text


def test_strangers_get_nothing(service: PostTrainingService) -> None:
    with caller("mallory"):
        for path in ("adapter", "adapter/weights.bin"):
            answer = ask(service, "GET", f"/jobs/{JOB}/artifacts/{path}")
            assert answer.status_code == 404
            assert answer.json()["error"]["message"] == f"job {JOB!r} does not exist"
