"""The audit trail: every action and its owner, never a row; whole lines, rotated; no request fails over it."""

import asyncio
import json
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.audit import Audit, pseudonym
from llama_stack_provider_moe.jobdir.events import now
from llama_stack_provider_moe.jobdir.folder import Artifact
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.limits_config import AuditConfig
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.host_support import BODY, ask, caller, folder_of, serving_in_process, submit
from tests.support.jobs_support import fill, wait_for

SECRET = "the-rows-say-this"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path) as made:
        yield made


def lines(config: ProviderConfig, name: str = "audit.jsonl") -> list[dict[str, Any]]:
    path = config.state_dir / "audit" / name
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def written(service: PostTrainingService, count: int) -> list[dict[str, Any]]:
    wait_for(lambda: len(lines(service.config)) >= count)
    return lines(service.config)


def test_each_action_is_a_line_with_its_owner(service: PostTrainingService) -> None:
    rows = json.dumps({"prompt": SECRET, "completion": SECRET}) + "\n"
    with caller("alice"):
        ask(service, "PUT", "/datasets/hers", content=rows.encode() * 3)
        job = ask(service, "POST", "/jobs", json=BODY | {"data": {"dataset_id": "data:hers"}}).json()["job_uuid"]
        ask(service, "POST", f"/jobs/{job}/cancel")
        ask(service, "POST", f"/jobs/{job}/resume")
        ask(service, "POST", f"/job/cancel?job_uuid={job}")
        ask(service, "DELETE", f"/jobs/{job}")
        ask(service, "DELETE", "/datasets/hers")
    with caller("bob"):
        assert ask(service, "POST", f"/jobs/{job}/cancel").status_code == 404
        submit(service)
    found = written(service, 8)
    assert [each["action"] for each in found] == [
        "upload dataset", "submit", "cancel", "resume", "cancel", "delete", "delete dataset", "submit",
    ]  # fmt: skip
    alice, bob = found[0]["who"], found[-1]["who"]
    assert [each["who"] for each in found] == [alice] * 7 + [bob]
    assert alice != bob
    assert [each.get("job") for each in found[1:6]] == [job] * 5
    assert (found[0]["dataset"], found[0]["rows"]) == ("hers", 3)
    text = (service.config.state_dir / "audit" / "audit.jsonl").read_text()
    assert SECRET not in text
    assert "alice" not in text
    assert str(service.config.state_dir) not in text


def test_downloads_are_noted_with_their_file(service: PostTrainingService) -> None:
    job = submit(service)
    service.store.claim("me")
    artifact = folder_of(service, job).root / "artifacts" / "adapter"
    artifact.mkdir(parents=True)
    (artifact / "weights").write_text("w")
    missing = ask(service, "GET", f"/jobs/{job}/artifacts/adapter/weights")
    assert missing.status_code == 404, "the job has not said that it has one"
    saved = Artifact(
        identifier=f"{job}/adapter", kind="adapter", path=str(artifact), epoch=1, step=2, created_at=now(), bytes=1
    )
    service.store.move(job, JobState.COMPLETED, artifacts=(saved,))
    assert ask(service, "GET", f"/jobs/{job}/artifacts/adapter/weights").status_code == 200
    last = written(service, 2)[-1]
    assert (last["action"], last["job"], last["artifact"], last["file"]) == ("download", job, "adapter", "weights")


def test_the_key_stays_private_and_the_same(tmp_path: Path) -> None:
    config = ProviderConfig(state_dir=tmp_path / "state", group_access=True)
    first, second = Audit(config), Audit(config)
    for audit in (first, second):
        audit.note("ann", "cancel", job="j")
        audit.close()
    key = config.state_dir / "audit" / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert {each["who"] for each in lines(config)} == {pseudonym(key.read_bytes(), "ann")}
    assert sorted(path.name for path in key.parent.iterdir()) == ["audit.jsonl", "key", "lock"]


def test_several_processes_keep_whole_lines_while_files_rotate(tmp_path: Path) -> None:
    config = ProviderConfig(state_dir=tmp_path / "state", audit=AuditConfig(max_bytes=64 << 10, kept_files=100))
    audits = [Audit(config) for _ in range(4)]

    def write(audit: Audit, number: int) -> None:
        for index in range(500):
            audit.note("ann", "cancel", job=f"{number}-{index}")
        audit.close(20)

    threads = [threading.Thread(target=write, args=each) for each in zip(audits, range(4), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = sorted(path.name for path in (config.state_dir / "audit").glob("audit.jsonl*"))
    sizes = [(config.state_dir / "audit" / name).stat().st_size for name in names]
    assert len(names) == 1 + (sum(sizes) - 1) // (64 << 10), "a file is closed at its limit, however much waits"
    assert max(sizes) < (64 << 10) + 200
    jobs = [each["job"] for name in names for each in lines(config, name)]
    assert sorted(jobs) == sorted(f"{number}-{index}" for number in range(4) for index in range(500))


def test_old_files_are_deleted(tmp_path: Path) -> None:
    config = ProviderConfig(state_dir=tmp_path / "state", audit=AuditConfig(max_bytes=64 << 10, kept_files=2))
    for _ in range(5):
        audit = Audit(config)
        for index in range(500):
            audit.note("ann", "cancel", job=f"job-{index}", file="f" * 100)
        audit.close(20)
    names = {path.name for path in (config.state_dir / "audit").glob("audit.jsonl*")}
    assert names == {"audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"}


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    with serving_in_process(tmp_path, audit={"write": False}) as service:
        submit(service)
    assert not (service.config.state_dir / "audit").exists()


def test_a_full_disk_breaks_no_request_and_the_loss_is_told(small: Path) -> None:
    config = ProviderConfig(state_dir=small / "state")
    audit = Audit(config)
    audit.note("ann", "cancel", job="before")
    wait_for(lambda: len(lines(config)) == 1)
    ballast = fill(small)
    for index in range(3):
        audit.note("ann", "cancel", job=f"lost-{index}" + "x" * 5000)
    wait_for(lambda: audit._lost == 3)
    ballast.unlink()
    audit.note("ann", "cancel", job="after")
    wait_for(lambda: len(lines(config)) == 3)
    audit.close()
    before, lost, after = lines(config)
    assert (before["job"], after["job"]) == ("before", "after")
    assert (lost["action"], lost["records"]) == ("lost", 3)


def test_noting_is_quick_even_if_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "audit").write_text("a file in the place of the folder")
    with serving_in_process(tmp_path / "other") as service:
        broken = Audit(ProviderConfig(state_dir=tmp_path / "state"))
        service.audit = broken
        job = submit(service)
        asyncio.run(service.cancel(job))
        began = time.monotonic()
        for index in range(30_000):
            broken.note("ann", "cancel", job=str(index))
        assert time.monotonic() - began < 60, "a note that waits for the disk would wait 30,000 times"
        broken.close()
    assert broken._lost > 0
