"""Limits of owners as callers meet them: 429 with what is left and when, `GET quota`, `moe-train quota`."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.errors import MoeError, OverLimit
from llama_stack_provider_moe.jobdir.state import JobState
from tests.support.cli_support import moe_train
from tests.support.host_support import BODY, ask, caller, folder_of, over_http, serving_in_process, submit

STORED = 200_000
ROWS = b'{"prompt": "a", "completion": "%s"}\n' % (b"b" * 1000)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[PostTrainingService]:
    limits = {"waiting_jobs": 2, "running_jobs": 1, "gpu_hours_per_day": 4, "stored_bytes": STORED}
    with serving_in_process(tmp_path, limits=limits) as made:
        yield made


def message(answer: httpx.Response) -> str:
    found: str = answer.json()["error"]["message"]
    return found


def stored(service: PostTrainingService, job_id: str, count: int) -> None:
    file = folder_of(service, job_id).root / "artifacts" / "weights"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(bytes(count))


def test_one_job_too_many_is_429_and_leaves_nothing(service: PostTrainingService) -> None:
    first = submit(service)
    submit(service)
    answer = ask(service, "POST", "/jobs", json=BODY | {"job_uuid": "third"})
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "60")
    assert message(answer).startswith(
        "you have 2 jobs that wait, and this server allows 2 (`limits.waiting_jobs`), so 0"
    )
    assert not folder_of(service, "third").root.exists()
    assert list((service.config.state_dir / "staging").iterdir()) == []
    with caller("bob"):
        submit(service)
    ask(service, "POST", f"/jobs/{first}/cancel")
    submit(service)
    assert ask(service, "POST", f"/jobs/{first}/resume").status_code == 429


def test_of_submissions_at_once_as_many_pass_as_may(service: PostTrainingService) -> None:
    def attempt(_: int) -> str | MoeError:
        try:
            return submit(service)
        except MoeError as error:
            return error

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(attempt, range(6)))
    refused = [each for each in found if not isinstance(each, str)]
    assert len(refused) == 4
    assert all(isinstance(each, OverLimit) for each in refused)
    assert len(list(service.config.jobs_dir.glob("sft-*"))) == 2


def test_bytes_of_jobs_and_data_sets_count_together(service: PostTrainingService) -> None:
    job = submit(service)
    stored(service, job, 150_000)
    too_large = ask(service, "PUT", "/datasets/large", content=ROWS * 60)
    assert too_large.status_code == 413
    assert "`limits.stored_bytes`" in message(too_large)
    assert ask(service, "PUT", "/datasets/small", content=ROWS * 30).status_code == 200
    stored(service, job, 190_000)
    for answer in (
        ask(service, "POST", "/jobs", json=BODY),
        ask(service, "PUT", "/datasets/more", content=ROWS),
    ):
        assert answer.status_code == 429
        assert "`limits.stored_bytes`" in message(answer)
        assert "so 0 are left; delete jobs or data sets" in message(answer)
        assert "Retry-After" not in answer.headers, "time alone frees nothing"
    assert ask(service, "DELETE", "/datasets/small").status_code == 200
    stored(service, job, 1000)
    submit(service)


def test_rows_that_would_exceed_the_bytes_are_refused(service: PostTrainingService) -> None:
    job = submit(service)
    stored(service, job, STORED - service.quotas.stored_bytes("anonymous") - 100)
    answer = ask(service, "POST", "/jobs", json=BODY)
    assert answer.status_code == 429
    assert "and the rows of this job need" in message(answer)


def test_a_folder_of_an_ended_job_is_measured_once_until_it_runs_again(service: PostTrainingService) -> None:
    job = submit(service)
    asyncio.run(service.cancel(job))
    stored(service, job, 5000)
    before = service.quotas.stored_bytes("anonymous")
    stored(service, job, 9000)
    assert service.quotas.stored_bytes("anonymous") == before
    asyncio.run(service.resume(job))
    assert service.quotas.stored_bytes("anonymous") == before + 4000


def test_the_quota_says_what_is_used_and_left(service: PostTrainingService) -> None:
    submit(service)
    assert service.store.claim("me", ["0"]) is not None
    submit(service)
    found = ask(service, "GET", "/quota").json()
    assert found["owner"] == "anonymous"
    assert found["waiting_jobs"] == {"used": 1, "limit": 2, "left": 1}
    assert found["running_jobs"] == {"used": 1, "limit": 1, "left": 0}
    assert found["gpu_hours"]["limit"] == 4
    assert found["gpu_hours"]["free_at"] is None
    assert 0 < found["stored_bytes"]["used"] < STORED
    assert found["stored_bytes"]["left"] == STORED - found["stored_bytes"]["used"]


def test_without_limits_only_the_use_is_told(tmp_path: Path) -> None:
    with serving_in_process(tmp_path) as service:
        submit(service)
        found = ask(service, "GET", "/quota").json()
        assert found["waiting_jobs"] == {"used": 1, "limit": None, "left": None}


def test_every_owner_is_listed(service: PostTrainingService) -> None:
    submit(service)
    with caller("bob"):
        submit(service)
        refused = ask(service, "GET", "/quotas")
        assert refused.status_code == 403
        assert "the access policy must permit you to read post_training_job::*" in message(refused)
    every = ask(service, "GET", "/quotas").json()["data"]
    assert [each["waiting_jobs"]["used"] for each in every] == [1, 1]
    assert len({each["owner"] for each in every}) == 2


def test_the_command_shows_it(service: PostTrainingService, monkeypatch: pytest.MonkeyPatch) -> None:
    job = submit(service)
    service.store.claim("me", ["0"])
    service.store.move(job, JobState.COMPLETED)
    with over_http(service) as url:
        monkeypatch.setenv("MOE_TRAIN_URL", url)
        done = moe_train("quota")
        assert done.code == 0
        lines = {line.split("  ")[0].strip(): line.split() for line in done.out.splitlines()}
        assert lines["jobs waiting"][2:] == ["0", "2", "2"]
        assert lines["GPU-hours in 24 h"][-3:] == ["0.00", "4.00", "4.00"]
        as_json: dict[str, Any] = json.loads(moe_train("quota", "--json").out)
        assert as_json["running_jobs"] == {"used": 0, "limit": 1, "left": 1}
        assert "anonymous" in moe_train("quota", "--all").out
