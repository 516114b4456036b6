"""Figures of many jobs, filters of the list, rows of a data set, templates and schema, for pages that show them."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from llama_stack_provider_moe.control.server import compat, job_figures
from llama_stack_provider_moe.control.server.compat import Caller
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.spec.recipes import RECIPES
from tests.support import dashboard_jobs
from tests.support.dashboard_jobs import Workshop
from tests.support.host_support import ask, caller, folder_of, serving_in_process, submit


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path_factory.mktemp("overview")) as made:
        workshop = Workshop(made)
        for job_id, recipe in (("runs-1", "sft"), ("ended-1", "sft"), ("broken_1", "sft"), ("waits-1", "sft")):
            submit(made, job_uuid=job_id, recipe=recipe)
        for job_id in ("runs-1", "ended-1", "broken_1"):
            dashboard_jobs.train(workshop.begin(job_id), "sft", 6, 12)
        workshop.complete("ended-1")
        workshop.fail("broken_1", "step 7: loss is nan")
        yield made


def listed(service: PostTrainingService, **query: Any) -> list[str]:
    answer = ask(service, "GET", "/jobs", params=query)
    assert answer.status_code == 200, answer.text
    return [job["job_uuid"] for job in answer.json()["data"]]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({}, ["waits-1", "broken_1", "ended-1", "runs-1"]),
        ({"state": "failed"}, ["broken_1"]),
        ({"state": ["scheduled", "in_progress"]}, ["waits-1", "runs-1"]),
        ({"recipe": "dpo"}, []),
        ({"text": "ENDED"}, ["ended-1"]),
        ({"text": "owner/NA"}, ["waits-1", "broken_1", "ended-1", "runs-1"]),
        ({"text": "n_1"}, ["broken_1"]),
        ({"text": "%"}, []),
        ({"state": "completed", "text": "runs"}, []),
        ({"state": ["scheduled", "in_progress"], "after": "broken_1"}, ["runs-1"]),
    ],
    ids=["all", "failed", "states", "recipe", "case", "model", "underscore", "percent", "both", "page"],
)
def test_the_list_is_filtered(service: PostTrainingService, query: dict[str, Any], found: list[str]) -> None:
    assert listed(service, **query) == found


def test_a_state_that_does_not_exist_is_refused(service: PostTrainingService) -> None:
    answer = ask(service, "GET", "/jobs", params={"state": "sleeping"})
    assert answer.status_code == 400
    assert "in_progress" in answer.json()["error"]["message"]


def test_figures_say_how_each_job_stands(service: PostTrainingService) -> None:
    answer = ask(service, "GET", "/figures", params={"jobs": "runs-1,ended-1,broken_1,waits-1,no-such-job"})
    found = {each["job_uuid"]: each for each in answer.json()["data"]}
    assert list(found) == ["runs-1", "ended-1", "broken_1", "waits-1"]
    runs = found["runs-1"]
    assert (runs["stage"], runs["step"], runs["max_steps"], runs["percent"]) == ("training", 6, 12, 50.0)
    assert runs["eta_s"] > 0
    steps = ask(service, "GET", "/jobs/runs-1/metrics").json()
    assert runs["loss"] == steps["metrics"]["ce"][-1], "the loss without balance terms"
    assert runs["held_out_loss"] == steps["evaluations"][-1]["metrics"]["validation_loss"]
    assert found["ended-1"]["percent"] == 100
    assert found["broken_1"]["reason"] == "step 7: loss is nan"
    assert found["waits-1"]["queue_position"] == 1


def test_figures_of_a_job_that_has_ended_are_read_once(
    service: PostTrainingService, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(service, "GET", "/figures", params={"jobs": "ended-1"})
    read: list[str] = []
    real = job_figures.progress
    monkeypatch.setattr(job_figures, "progress", lambda job, folder: read.append(job.id) or real(job, folder))
    ask(service, "GET", "/figures", params={"jobs": "ended-1,runs-1"})
    assert read == ["runs-1"]


def test_too_many_names_are_refused(service: PostTrainingService) -> None:
    answer = ask(service, "GET", "/figures", params={"jobs": ",".join(f"j{number}" for number in range(101))})
    assert answer.status_code == 400
    assert "at most 100" in answer.json()["error"]["message"]


def test_a_job_with_a_link_does_not_hide_the_others(service: PostTrainingService) -> None:
    submit(service, job_uuid="linked")
    events = folder_of(service, "linked").events
    events.symlink_to("/etc/passwd")
    try:
        found = ask(service, "GET", "/figures", params={"jobs": "linked,ended-1"}).json()["data"]
        assert [each["job_uuid"] for each in found] == ["linked", "ended-1"]
        assert "is a link" in found[0]["reason"]
    finally:
        events.unlink()
        ask(service, "POST", "/jobs/linked/cancel")


def test_the_overview_counts_the_callers_jobs(service: PostTrainingService, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ask(service, "GET", "/overview").json()
    assert found["jobs"]["failed"] == found["jobs"]["completed"] == 1
    assert found["recipes"] == list(RECIPES)
    assert found["reads_every_owner"] is False
    with caller("somebody-else"):
        assert set(ask(service, "GET", "/overview").json()["jobs"].values()) == {0}
        assert listed(service) == []
        assert ask(service, "GET", "/figures", params={"jobs": "runs-1"}).json() == {"data": []}
        assert ask(service, "GET", "/jobs/runs-1/routing").status_code == 404
        assert ask(service, "GET", "/jobs/runs-1/events", params={"follow": True}).status_code == 404
    monkeypatch.setattr(compat, "caller", lambda: Caller("root", None))
    monkeypatch.setattr(compat, "may_reach_every_job", lambda policy, action: True)
    assert ask(service, "GET", "/overview").json()["reads_every_owner"] is True


def test_templates_are_jobs_that_the_schema_describes(service: PostTrainingService) -> None:
    schema = ask(service, "GET", "/schema").json()
    assert set(schema["discriminator"]["mapping"]) == set(RECIPES)
    templates = ask(service, "GET", "/templates").json()["data"]
    assert len(templates) > 10
    for each in templates:
        fields = schema["$defs"][schema["discriminator"]["mapping"][each["job"]["recipe"]].rpartition("/")[2]][
            "properties"
        ]
        assert set(each["job"]) <= set(fields), each["name"]
        assert each["summary"].startswith(each["job"]["recipe"])


def test_rows_of_a_data_set_come_in_pages(service: PostTrainingService) -> None:
    rows = [{"prompt": f"<b>{number}</b>", "completion": "é" * number} for number in range(7)]
    body = "".join(json.dumps(row) + "\n" for row in rows)
    assert ask(service, "PUT", "/datasets/mine", content=body).status_code == 200
    first = ask(service, "GET", "/datasets/mine/rows", params={"limit": 5}).json()
    assert (first["rows"], first["has_more"]) == (rows[:5], True)
    second = ask(service, "GET", "/datasets/mine/rows", params={"limit": 5, "cursor": first["cursor"]}).json()
    assert (second["rows"], second["has_more"]) == (rows[5:], False)
    wrong = ask(service, "GET", "/datasets/mine/rows", params={"cursor": first["cursor"] + 1})
    assert wrong.status_code == 400
    assert "cursor" in wrong.json()["error"]["message"]
    with caller("somebody-else"):
        assert ask(service, "GET", "/datasets/mine/rows").status_code == 404


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_site_changes_nothing(service: PostTrainingService, site: str) -> None:
    from_elsewhere = {"Sec-Fetch-Site": site}
    answer = ask(service, "POST", "/jobs/waits-1/cancel", headers=from_elsewhere)
    assert answer.status_code == 403
    assert "another site" in answer.json()["error"]["message"]
    assert listed(service, state="scheduled") == ["waits-1"]
    assert ask(service, "GET", "/jobs", headers=from_elsewhere).status_code == 200, "reading is the browser's business"
    for header in (
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {**from_elsewhere, "Authorization": "Bearer t"},
        {},
    ):
        assert ask(service, "POST", "/jobs/no-such-job/cancel", headers=header).status_code == 404
