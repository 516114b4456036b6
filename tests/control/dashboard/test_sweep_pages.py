"""The pages of sweeps: ranked jobs, what was ended early, cancel and delete, and a start from the editor."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from tests.control.dashboard.conftest import SWEEP, World
from tests.support.browser import Visitor
from tests.support.dashboard_jobs import MARKUP, change
from tests.support.host_support import BODY


@pytest.fixture
def small(world: World) -> Iterator[str]:
    """A sweep of two jobs that wait; it is gone afterwards."""
    body = {"job": BODY, "parameters": {"optimizer.lr": [1e-4, 2e-4]}, "sweep_uuid": "small"}
    with world.http() as api:
        api.post("/sweeps", json=body).raise_for_status()
        yield "small"
        if api.get("/sweeps/small").status_code == 200:
            api.post("/sweeps/small/cancel").raise_for_status()
            api.delete("/sweeps/small").raise_for_status()


def test_jobs_of_a_sweep_are_ranked(visitor: Visitor) -> None:
    page = visitor.open("/sweeps")
    row = page.get_by_role("row", name=re.compile(SWEEP))
    expect(row).to_contain_text("2 completed")
    expect(row).to_contain_text("validation_loss")
    expect(page.locator("#range")).to_have_text("1 sweep")
    row.get_by_role("link", name=SWEEP).click()
    rows = page.get_by_role("region", name="Jobs of this sweep").get_by_role("row")
    expect(rows).to_have_count(5)
    expect(rows.nth(0)).to_contain_text("optimizer.lr")
    expect(page.locator("#content")).to_contain_text("of 2 jobs that are compared, one goes on; 1 ended early so far")
    shown = [text.replace("\n", " ") for text in rows.all_inner_texts()]
    assert [f"{SWEEP}-{number}" in text for number, text in zip((1, 0, 3, 2), shown[1:], strict=True)] == [True] * 4
    expect(rows.nth(1)).to_contain_text("1 (best)")
    for text in ("0.0001", "16", "1.16", "80"):
        expect(rows.nth(1)).to_contain_text(text)
    expect(rows.filter(has_text=f"{SWEEP}-2")).to_contain_text("ended early")
    expect(rows.filter(has_text=f"{SWEEP}-2")).to_contain_text("because others did better")
    expect(rows.filter(has_text=f"{SWEEP}-3")).to_contain_text("running")
    page.get_by_role("link", name="Compare the best 4").click()
    expect(page.locator(".chip")).to_have_count(4)


def test_a_job_leads_to_its_sweep_and_back(visitor: Visitor) -> None:
    page = visitor.open(f"/jobs/{SWEEP}-1")
    page.locator("#facts").get_by_role("link", name=SWEEP).click()
    page.wait_for_url(f"**/moe/sweeps/{SWEEP}")
    page.get_by_role("link", name="In the list of jobs").click()
    expect(page.locator("#jobs tbody tr")).to_have_count(4)
    expect(page.locator("#chosen")).to_contain_text(SWEEP)
    page.locator("#jobs tbody").get_by_role("link", name=f"sweep {SWEEP}").first.click()
    page.wait_for_url(f"**/moe/sweeps/{SWEEP}")


def test_a_sweep_is_cancelled_and_deleted(visitor: Visitor, world: World, small: str) -> None:
    page = visitor.open(f"/sweeps/{small}")
    expect(page.locator("#facts")).to_contain_text("waiting")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Back").click()
    with world.http() as api:
        assert api.get(f"/sweeps/{small}").json()["status"] == "scheduled"
    page.get_by_role("button", name="Cancel").click()
    visitor.must_be_accessible()
    page.get_by_role("button", name="Cancel the sweep").click()
    expect(page.locator("#facts")).to_contain_text("cancelled")
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    page.wait_for_url("**/moe/sweeps")
    with world.http() as api:
        assert api.get(f"/sweeps/{small}").status_code == 404
        assert api.get(f"/jobs/{small}-0").status_code == 404


def test_a_sweep_follows_its_jobs(visitor: Visitor, world: World, small: str) -> None:
    page = visitor.open(f"/sweeps/{small}")
    row = page.get_by_role("row", name=re.compile(f"{small}-1"))
    expect(row).to_contain_text("waiting")
    with world.http() as api:
        api.post(f"/jobs/{small}-1/cancel").raise_for_status()
    expect(row).to_contain_text("cancelled")


def test_a_sweep_that_does_not_exist(visitor: Visitor) -> None:
    visitor.refused.add(404)
    page = visitor.open("/sweeps/no-such-sweep")
    expect(page.get_by_role("alert")).to_contain_text("sweep 'no-such-sweep' does not exist")
    visitor.must_be_accessible()


def test_markup_in_a_sweep_is_text(visitor: Visitor, world: World, small: str) -> None:
    change(world.service, f"{small}-0", reason=MARKUP)
    page = visitor.open(f"/sweeps/{small}")
    expect(page.get_by_role("region", name="Jobs of this sweep")).to_contain_text(MARKUP)
    assert page.evaluate("() => window.hacked") is None
    assert page.evaluate("() => document.querySelectorAll('main img, main script').length") == 0


def test_a_sweep_is_started_from_the_editor(visitor: Visitor, world: World) -> None:
    visitor.refused.add(400)
    page = visitor.open("/new#sweep")
    job = '{"recipe": "sft", "model": "owner/name", "data": {"dataset_id": "good"}, "job_uuid": "made-here"}'
    page.get_by_label("Job, as JSON").fill(job)
    tried = page.get_by_label("Settings to try")
    start = page.get_by_role("button", name="Start sweep")
    expect(start).to_be_disabled()
    tried.fill("optimizer.lr")
    expect(page.locator("#tried-said")).to_contain_text("not of the form")
    tried.fill("optimizer.lr = 1\noptimizer.lr = 2")
    expect(page.locator("#tried-said")).to_contain_text("there twice")
    tried.fill('optimizer.lr = 1e-4, -1\nadapter = [null, {"rank": 8}]')
    expect(page.locator("#tried-said")).to_contain_text("4 jobs")
    visitor.must_be_accessible()
    start.click()
    expect(page.locator("#sweep").get_by_role("alert")).to_contain_text("optimizer.lr: -1 is not valid")
    tried.fill('optimizer.lr = 1e-4, 2e-4\nadapter = [null, {"rank": 8}]')
    page.get_by_label("Jobs at once").fill("3")
    visitor.picture("new-sweep", whole=True)
    start.click()
    page.wait_for_url("**/moe/sweeps/made-here")
    with world.http() as api:
        made = api.get("/sweeps/made-here").json()
        api.post("/sweeps/made-here/cancel").raise_for_status()
        api.delete("/sweeps/made-here").raise_for_status()
    assert made["parameters"] == {"optimizer.lr": [1e-4, 2e-4], "adapter": [None, {"rank": 8}]}
    assert (made["max_parallel"], made["halving"]) == (3, None)
