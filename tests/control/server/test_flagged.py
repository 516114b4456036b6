"""Flagged conversations as data sets and as rows of jobs: owners, versions, consent, limits."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama_stack_provider_moe.control.server import callers
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store import feedback_files
from tests.support.cli_support import moe_train
from tests.support.host_support import BODY, ask, caller, folder_of, over_http, serving_in_process

OTHER = {"options": {"validation_split": 0}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "flagged"


@pytest.fixture
def service(tmp_path: Path, folder: Path) -> Iterator[PostTrainingService]:
    feedback = {"consent": True, "folder": str(folder)}
    with serving_in_process(tmp_path, feedback=feedback, dataset_quota_bytes=100_000) as made:
        yield made


def flag(
    folder: Path, *texts: str, shield: str = "refused", answer: str | None = "no", user: str | None = None
) -> None:
    """Have a shield flag conversations of a user."""
    owner = "anonymous"
    if user is not None:
        with caller(user):
            owner = callers.owner()
    for text in texts:
        messages = [{"role": "user", "content": text}]
        messages += [] if answer is None else [{"role": "assistant", "content": answer}]
        row = {"at": "2026-01-01T00:00:00+00:00", "shield": shield, "messages": messages}
        feedback_files.append(folder, owner, json.dumps(row).encode() + b"\n", 1 << 30)


def make(service: PostTrainingService, name: str = "flagged", **asked: Any) -> httpx.Response:
    return ask(service, "POST", "/feedback", json={"name": name, **asked})


def made(service: PostTrainingService, **asked: Any) -> list[str]:
    """The users' texts of the data set that comes of it."""
    answer = make(service, **asked)
    assert answer.status_code == 200, answer.text
    rows = ask(service, "GET", "/datasets/flagged/rows", params={"version": answer.json()["sha256"]}).json()["rows"]
    return [row["messages"][0]["content"] for row in rows]


def refusal(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    return str(answer.json()["error"]["message"])


def test_flagged_conversations_become_a_version_of_a_data_set(service: PostTrainingService, folder: Path) -> None:
    flag(folder, "a", "b", "a")
    flag(folder, "c", shield="tools", answer=None)
    first = make(service).json()
    assert (first["rows"], first["columns"], first["is_new"]) == (3, {"messages": 3}, True)
    again = make(service).json()
    assert (again["sha256"], again["is_new"]) == (first["sha256"], False), "the same rows are the same version"
    assert made(service) == ["a", "b", "c"]
    assert made(service, only="answered") == ["a", "b"]
    assert made(service, shield="tools") == ["c"]
    flag(folder, "d")
    assert made(service) == ["a", "b", "c", "d"]
    assert ask(service, "GET", "/feedback").json()["rows"] == 4
    versions = ask(service, "GET", "/datasets/flagged").json()["versions"]
    assert len(versions) == 4
    assert versions[0]["rows"] == 4, "the current one"


def test_nobody_reaches_what_others_said(service: PostTrainingService, folder: Path) -> None:
    flag(folder, "hers", "hers too", user="ann")
    flag(folder, "his", user="bob")
    for user, texts in (("ann", ["hers", "hers too"]), ("bob", ["his"])):
        with caller(user):
            assert made(service) == texts
            assert ask(service, "GET", "/feedback").json()["rows"] == len(texts)
            assert refusal(make(service, everybody=True), 403) == (
                "everybody's flagged conversations are for administrators; leave out `everybody`"
            )
            job = ask(service, "POST", "/jobs", json=BODY | {"data": {"dataset_id": "feedback:all"}} | OTHER).json()
            rows = folder_of(service, job["job_uuid"]).train_rows.read_text()
            assert [json.loads(row)["messages"][0]["content"] for row in rows.splitlines()] == texts
    with caller("carl"):
        assert refusal(make(service), 404) == "you have no flagged conversations"
        answer = ask(service, "POST", "/jobs", json=BODY | {"data": {"dataset_id": "feedback:all"}})
        assert answer.status_code == 400, answer.text
        assert ask(service, "DELETE", "/feedback").json() == {"bytes": 0}
    with caller("ann"):
        assert ask(service, "DELETE", "/feedback").json()["bytes"] > 0
        assert ask(service, "GET", "/feedback").json() == {"rows": 0, "answered": 0, "bytes": 0, "left_out": 0}
        assert ask(service, "GET", "/datasets/flagged").status_code == 200, "the data set stays"
    with caller("bob"):
        assert made(service) == ["his"]


def test_without_authentication_everybody_is_one_user(service: PostTrainingService, folder: Path) -> None:
    flag(folder, "a")
    assert made(service, everybody=True) == ["a"]


def test_a_job_reads_them_as_they_are_now(service: PostTrainingService, folder: Path) -> None:
    flag(folder, *(f"q{number}" for number in range(30)))
    flag(folder, "unanswered", answer=None)
    body = BODY | {"data": {"dataset_id": "feedback:answered"}}
    checked = ask(service, "POST", "/jobs/validate", json=body).json()
    source = checked["sources"]["train"]
    assert (source["kind"], source["id"], source["rows"]) == ("flagged conversations", "feedback:answered", 30)
    assert ask(service, "GET", "/datasets").json()["data"] == [], "a check makes no data set"
    created = ask(service, "POST", "/jobs", json=body).json()
    (note,) = [each for each in created["notes"] if each.startswith("data.dataset_id")]
    version = source["version"][:12]
    assert note == f"data.dataset_id: your flagged conversations as they are now, version {version}"
    assert made(service, only="answered")
    assert ask(service, "GET", "/datasets/flagged").json()["versions"][0]["sha256"] == source["version"], (
        "the same rows"
    )
    flag(folder, "later")
    assert len(folder_of(service, created["job_uuid"]).train_rows.read_bytes().splitlines()) == 30
    assert ask(service, "POST", "/jobs/validate", json=body).json()["sources"]["train"]["rows"] == 31


@pytest.mark.parametrize(
    ("asked", "status", "says"),
    [
        ({"name": "a/b"}, 400, "name: 'a/b' is not valid"),
        ({"only": "some"}, 400, "only: 'some' is not valid; expected"),
        ({"all": True}, 400, "all: unknown key"),
        ({"shield": "nobody"}, 404, "you have no flagged conversations of shield 'nobody'"),
        ({"only": "answered"}, 404, "you have no flagged conversations that end with an answer"),
    ],
)
def test_what_is_wrong_is_named(
    service: PostTrainingService, folder: Path, asked: dict[str, Any], status: int, says: str
) -> None:
    flag(folder, "a", answer=None)
    assert says in refusal(ask(service, "POST", "/feedback", json={"name": "flagged", **asked}), status)
    answer = ask(service, "POST", "/jobs", json=BODY | {"data": {"dataset_id": "feedback:some"}})
    assert "expected one of feedback:all, feedback:answered" in refusal(answer, 400)


def test_the_owners_quota_holds(service: PostTrainingService, folder: Path) -> None:
    flag(folder, *(f"{number} " + "x" * 5000 for number in range(30)))
    assert "dataset_quota_bytes" in refusal(make(service), 413)


def test_without_consent_in_the_configuration_nothing_is_read(tmp_path: Path, folder: Path) -> None:
    flag(folder, "a")
    job = BODY | {"data": {"dataset_id": "feedback:all"}}
    with serving_in_process(tmp_path) as service:
        for answer in (make(service), ask(service, "GET", "/feedback"), ask(service, "DELETE", "/feedback"),
                       ask(service, "POST", "/jobs", json=job)):  # fmt: skip
            assert "makes no use of flagged conversations (`feedback` of its configuration)" in refusal(answer, 403)


def test_the_command_line(service: PostTrainingService, folder: Path) -> None:
    with over_http(service) as url:
        where = ("--url", url)
        assert "none of your conversations" in moe_train("data", "flagged", *where).out
        flag(folder, "a", "b")
        assert "2 of your conversations were flagged, 2 of them end with an answer" in " ".join(
            moe_train("data", "flagged", *where).out.split()
        )
        done = moe_train("data", "flagged", "--name", "mine", "--answered", "--shield", "refused", *where)
        assert (done.code, "data set mine, version" in done.out) == (0, True), done.err
        assert moe_train("data", "flagged", "--name", "mine", "--shield", "no", *where).code == 2
        assert "--name: is missing" in moe_train("data", "flagged", "--answered", *where).err
        for other in (("--name", "a"), ("--everybody",)):
            told = moe_train("data", "flagged", *other, "--erase", *where)
            assert told.code == 2
            assert "expected --erase alone" in " ".join(told.err.split())
        assert moe_train("data", "flagged", "--erase", "--json", *where).document["bytes"] > 0
        assert moe_train("data", "flagged", "--json", *where).document == {
            "rows": 0,
            "answered": 0,
            "bytes": 0,
            "left_out": 0,
        }
