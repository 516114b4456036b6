"""The pages of pipelines: parts with their states, what they wait for, cancel, resume and delete."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from llama_stack_provider_moe.jobdir.state import JobState
from tests.control.dashboard.conftest import World
from tests.support.browser import Visitor
from tests.support.host_support import BODY


@pytest.fixture
def small(world: World) -> Iterator[str]:
    """A pipeline of two parts, of which the second waits for the first; it is gone afterwards."""
    parts = [
        {"name": "first", "job": BODY | {"adapter": None}},
        {"name": "second", "job": BODY | {"model": "parts.first"}},
    ]
    with world.http() as api:
        api.post("/pipelines", json={"pipeline_uuid": "small", "parts": parts}).raise_for_status()
        yield "small"
        if api.get("/pipelines/small").status_code == 200:
            api.post("/pipelines/small/cancel")  # refused if it has ended
            api.delete("/pipelines/small").raise_for_status()


def test_the_list_leads_to_the_parts_and_to_their_jobs(visitor: Visitor, small: str) -> None:
    page = visitor.open("/pipelines")
    expect(page.locator("#range")).to_have_text("1 pipeline")
    visitor.must_fit()
    visitor.must_be_accessible()
    row = page.get_by_role("row", name=re.compile(small))
    expect(row).to_contain_text("2 waiting")
    row.get_by_role("link", name=small).click()
    rows = page.get_by_role("region", name="Parts of this pipeline").get_by_role("row")
    expect(rows).to_have_count(3)
    expect(rows.nth(2)).to_contain_text("waits for small-first")
    visitor.must_fit()
    visitor.must_be_accessible()
    page.get_by_role("link", name="In the list of jobs").click()
    expect(page.locator("#jobs tbody tr")).to_have_count(2)
    expect(page.locator("#jobs tbody")).to_contain_text("waits for small-first")
    page.locator("#jobs tbody").get_by_role("link", name="pipeline small").first.click()
    page.wait_for_url("**/moe/pipelines/small")
    rows.nth(2).get_by_role("link", name="small-second").click()
    expect(page.locator("#facts")).to_contain_text("of pipeline small")
    page.locator("#facts").get_by_role("link", name=small).click()
    page.wait_for_url("**/moe/pipelines/small")


def test_a_pipeline_is_resumed_cancelled_and_deleted(visitor: Visitor, world: World, small: str) -> None:
    store = world.service.store
    store.move("small-first", JobState.FAILED, reason="the disk was full")
    store.move("small-second", JobState.FAILED, reason="job 'small-first', which it waits for, failed")
    page = visitor.open(f"/pipelines/{small}")
    expect(page.locator("#content")).to_contain_text("the disk was full")
    page.get_by_role("button", name="Resume").click()
    expect(page.locator("#facts")).to_contain_text("waiting")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Cancel the pipeline").click()
    expect(page.locator("#facts")).to_contain_text("cancelled")
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    page.wait_for_url("**/moe/pipelines")
    expect(page.locator("#content")).to_contain_text("No pipelines yet.")
    with world.http() as api:
        assert api.get(f"/pipelines/{small}").status_code == 404


def test_a_lost_part_is_shown_and_nothing_is_to_resume(visitor: Visitor, world: World, small: str) -> None:
    store = world.service.store
    store.move("small-first", JobState.FAILED, reason="the disk was full")
    store.move("small-second", JobState.FAILED, reason="job 'small-first', which it waits for, failed")
    with world.http() as api:
        api.delete("/jobs/small-second").raise_for_status()
    page = visitor.open(f"/pipelines/{small}")
    expect(page.locator("#facts")).to_contain_text("2 parts")
    expect(page.locator("#facts")).to_contain_text("1 lost")
    rows = page.get_by_role("region", name="Parts of this pipeline").get_by_role("row")
    expect(rows).to_have_count(3)
    expect(rows.nth(2)).to_contain_text("second")
    expect(rows.nth(2)).to_contain_text("its job was deleted before it had completed")
    expect(page.get_by_role("button", name="Resume")).to_have_count(0)
    expect(page.get_by_role("button", name="Delete")).to_have_count(1)
    visitor.must_fit()
    visitor.must_be_accessible()


def test_a_pipeline_that_does_not_exist(visitor: Visitor) -> None:
    visitor.refused.add(404)
    page = visitor.open("/pipelines/no-such-pipeline")
    expect(page.get_by_role("alert")).to_contain_text("pipeline 'no-such-pipeline' does not exist")
