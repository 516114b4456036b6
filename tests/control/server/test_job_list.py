"""The list of jobs with its filters, and labels and notes over HTTP and on the command line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama_stack_provider_moe.control.server.service import PostTrainingService
from tests.support.cli_support import moe_train, template_at
from tests.support.host_support import BODY, ask, caller, folder_of, over_http, serving_in_process, submit


@pytest.fixture
def service(tmp_path: Path) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path) as made:
        yield made


def names(service: PostTrainingService, query: str) -> list[str]:
    answer = ask(service, "GET", f"/jobs?{query}")
    assert answer.status_code == 200, answer.text
    return [job["job_uuid"] for job in answer.json()["data"]]


def patch(service: PostTrainingService, job_id: str, **body: Any) -> httpx.Response:
    return ask(service, "PATCH", f"/jobs/{job_id}", json=body)


def test_labels_come_with_a_job_and_are_changed_without_its_spec(service: PostTrainingService) -> None:
    job = submit(service, labels={"team": "geo", "run": "<b>1</b>"}, note="first try")
    spec = folder_of(service, job).spec
    before = spec.read_bytes()
    assert b"geo" not in before
    assert b"first try" not in before
    changed = patch(service, job, labels={"team": None, "größe".replace("ö", "oe").replace("ß", "ss"): "L"})
    assert changed.json() == {"job_uuid": job, "labels": {"groesse": "L", "run": "<b>1</b>"}, "note": "first try"}
    assert spec.read_bytes() == before
    detail, (line,) = ask(service, "GET", f"/jobs/{job}").json(), ask(service, "GET", "/jobs").json()["data"]
    for shown in (detail, line):
        assert (shown["labels"], shown["note"]) == ({"groesse": "L", "run": "<b>1</b>"}, "first try")
    assert patch(service, job, note=None).json()["note"] is None


def test_filters_combine(service: PostTrainingService) -> None:
    first = submit(service, labels={"team": "geo", "n": "1"}, note="About Rain")
    second = submit(service, labels={"team": "geo", "n": "2"})
    third = submit(service, labels={"team": "art"})
    ask(service, "POST", f"/jobs/{second}/cancel")
    assert names(service, "label=team=geo") == [second, first]
    assert names(service, "label=team&state=scheduled") == [third, first]
    assert names(service, "label=team=geo&label=n=1") == [first]
    assert names(service, "state=cancelled&state=failed") == [second]
    assert names(service, "text=rain") == [first]
    assert names(service, "recipe=dpo") == []
    assert names(service, "model=owner/name&limit=1") == [third]
    assert names(service, f"label=team&after={third}&limit=1") == [second]
    owner = ask(service, "GET", "/jobs").json()["data"][0]["owner"]
    assert len(names(service, f"owner={owner}")) == 3
    assert names(service, "owner=somebody") == []


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("state=done", "state"), ("label==x", "label: '=x' is not valid; expected KEY=VALUE, or KEY"),
        ("limit=0", "limit"), ("text=" + "x" * 300, "text"),
    ],
)  # fmt: skip
def test_a_filter_that_is_none_is_named(service: PostTrainingService, query: str, said: str) -> None:
    answer = ask(service, "GET", f"/jobs?{query}")
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"labels": {"-bad": "x"}}, "1 to 63 letters, digits"),
        ({"labels": {"a b": "x"}}, "1 to 63 letters, digits"),
        ({"labels": {"a": "x" * 257}}, "at most 256 characters"),
        ({"labels": {"a": "two\nlines"}}, "labels.a"),
        ({"labels": {"a": 1}}, "labels.a: 1 is not valid; expected text"),
        ({"labels": {f"k{n}": "" for n in range(33)}}, "at most 32 labels"),
        ({"note": "x" * 4001}, "at most 4,000 characters"),
        ({"note": "\0"}, "note"),
        ({"status": "completed"}, "status: unknown key"),
        ([], "the body"),
    ],
)  # fmt: skip
def test_a_change_that_is_not_valid_is_refused(service: PostTrainingService, body: Any, said: str) -> None:
    job = submit(service)
    answer = ask(service, "PATCH", f"/jobs/{job}", json=body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_a_strangers_job_is_not_found(service: PostTrainingService) -> None:
    with caller("ann"):
        job = submit(service, labels={"a": "b"})
    with caller("bob"):
        assert patch(service, job, labels={"a": None}).status_code == 404
        assert names(service, "label=a") == []
    assert service.store.labels([job]) == {job: {"a": "b"}}


def test_a_job_that_nobody_may_be_told_of_is_refused(service: PostTrainingService, tmp_path: Path) -> None:
    asked = BODY | {"notify": {"url": "https://hooks.example/x"}}
    said = ask(service, "POST", "/jobs", json=asked).json()["error"]["message"]
    assert "expected no `notify`, because this server tells nobody" in said
    allowed = {"allowed": ["https://hooks.example"], "secret_variable": "X"}
    with serving_in_process(tmp_path / "other", notify=allowed) as other:
        job = ask(other, "POST", "/jobs", json=asked | {"job_uuid": "told"}).json()["job_uuid"]
        assert other.store.get(job, None).notify is not None
        for url in ("https://hooks.example.evil.example/", "http://hooks.example/", "https://u:p@hooks.example/"):
            refused = ask(other, "POST", "/jobs", json=BODY | {"notify": {"url": url}})
            assert refused.status_code == 400, url
        ask(other, "POST", f"/jobs/{job}/cancel")
        (told,) = ask(other, "GET", f"/jobs/{job}").json()["notifications"]
        assert (told["event"], told["state"], told["attempts"]) == ("fine_tuning.job.cancelled", "waiting", 0)


def test_the_commands(service: PostTrainingService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = template_at(tmp_path)
    with over_http(service) as url:
        monkeypatch.setenv("MOE_TRAIN_URL", url)
        changes = ("--set", "model=owner/name", "--set", "data.dataset_id=good", "--set", "job_uuid=mine")
        done = moe_train("submit", str(file), *changes, "--label", "team=geo", "--label", "x=1=2", "--note", "try one")
        assert done.code == 0, done.err
        submit(service)
        listed = moe_train("ls", "--label", "team=geo").out
        assert "team=geo x=1=2" in listed
        assert len(listed.splitlines()) == 2
        assert moe_train("label", "mine", "team=art", "x-", "--note", "").out == "job mine: team=art\n"
        assert "labels" in moe_train("status", "mine").out
        assert moe_train("label", "mine", "--json", "a=b").document["labels"] == {"a": "b", "team": "art"}
        assert moe_train("label", "mine").code == 2
        assert moe_train("label", "mine", "word").code == 2
        assert moe_train("ls", "--label", "team=geo").out == "no jobs\n"
        top = moe_train("top").out
        assert "none of your jobs is running" in top
        assert "mine" in top
