"""What a page shows once its job is deleted, its server was away, or its dialogue was left."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Route, expect

from tests.control.dashboard.conftest import PHONE, World
from tests.support.browser import Visitor
from tests.support.dashboard_jobs import change
from tests.support.host_support import BODY

REVERSED = "x\u202eevil"


@pytest.fixture
def passing(world: World) -> Iterator[str]:
    """A job that waits; it is gone afterwards."""
    name = "passing"
    with world.http() as api:
        api.post("/jobs", json=BODY | {"job_uuid": name, "labels": {"use": REVERSED}}).raise_for_status()
        yield name
        if api.get(f"/jobs/{name}").status_code == 200:
            api.post(f"/jobs/{name}/cancel")
            api.delete(f"/jobs/{name}").raise_for_status()


def test_a_job_that_is_deleted_while_its_page_is_open(visitor: Visitor, world: World, passing: str) -> None:
    visitor.refused.add(404)
    page = visitor.open(f"/jobs/{passing}#log")
    expect(page.get_by_text("Waiting for output")).to_be_visible()
    with world.http() as api:
        change(world.service, passing, state="cancelled")
        page.wait_for_timeout(100)
        api.delete(f"/jobs/{passing}").raise_for_status()
    expect(page.locator("#facts")).to_have_text("This job has been deleted.")
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
    expect(page.get_by_text("Waiting for output")).to_have_count(0)
    expect(page.get_by_role("alert")).to_contain_text("'passing' does not exist")
    visitor.must_be_accessible()


def test_a_server_that_answers_again_is_not_said_to_be_silent(visitor: Visitor) -> None:
    page = visitor.open("/jobs/dpo-run-7#settings")
    expect(page.locator("#facts")).to_contain_text("running")
    page.route("**/jobs/dpo-run-7/status", lambda route: route.abort())
    expect(page.get_by_role("alert")).to_contain_text("the server does not answer")
    page.unroute("**/jobs/dpo-run-7/status")
    expect(page.get_by_role("alert")).to_have_count(0)
    visitor.complaints = [each for each in visitor.complaints if "net::ERR_FAILED" not in each]


def test_escape_returns_to_the_button_of_the_dialogue(visitor: Visitor) -> None:
    page = visitor.open("/jobs/sft-stopped")
    button = page.get_by_role("button", name="Delete")
    button.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(button).to_be_focused()


def test_a_changed_hash_changes_the_tab_and_a_narrow_row_shows_it(visitor: Visitor) -> None:
    visitor.page.set_viewport_size(PHONE)
    page = visitor.open("/jobs/sft-lr2e-4#files")
    row = page.get_by_role("tablist")
    for name in ("Files", "Curves", "Log"):
        page.evaluate("name => { location.hash = name.toLowerCase(); }", name)
        tab = page.get_by_role("tab", name=name, exact=True)
        expect(tab).to_have_attribute("aria-selected", "true")
        mine, whole = tab.bounding_box(), row.bounding_box()
        assert mine is not None
        assert whole is not None
        assert whole["x"] - 1 <= mine["x"]
        assert mine["x"] + mine["width"] <= whole["x"] + whole["width"] + 1, name
    page.reload()
    expect(page.get_by_role("tab", name="Log", exact=True)).to_have_attribute("aria-selected", "true")
    page.evaluate("() => { location.hash = 'nothing'; }")
    expect(page.get_by_role("tab", name="Log", exact=True)).to_have_attribute("aria-selected", "true")


def test_a_character_that_reverses_text_is_replaced(visitor: Visitor, passing: str) -> None:
    page = visitor.open(f"?text={passing}")
    label = page.locator("#jobs tbody .label")
    expect(label).to_have_text("usex\ufffdevil")
    label.click()
    expect(page.locator("#chosen")).to_contain_text("use=x\ufffdevil")
    expect(page.locator("#jobs tbody tr")).to_have_count(1)  # the filter has the true text
    button = page.get_by_role("button", name="Remove the filter")
    assert "\u202e" not in str(button.get_attribute("aria-label"))


def test_a_log_and_a_row_show_no_reversed_text(visitor: Visitor) -> None:
    def answer(route: Route) -> None:
        route.fulfill(body='event: logs\ndata: {"log_lines": ["a\\u202eb"]}\n\n', content_type="text/event-stream")

    page = visitor.page
    page.route("**/logs?*", answer, times=1)
    visitor.open("/jobs/dpo-run-7#log")
    expect(page.get_by_role("log")).to_contain_text("a\ufffdb")


@pytest.mark.parametrize("path", ["/sweeps", "/data", "/compare?jobs=sft-lr2e-4,sft-lr1e-4"])
def test_words_stay_whole_on_a_phone(visitor: Visitor, world: World, path: str) -> None:
    visitor.page.set_viewport_size(PHONE)
    with world.http() as api:
        rows = '{"prompt": "a", "completion": "b"}\n' * 68
        api.put("/datasets/of-a-phone", content=rows).raise_for_status()
    page = visitor.open(path)
    cells = page.locator("table.plain :is(td, th)")
    expect(cells.nth(6)).to_be_attached()
    broken = cells.evaluate_all(BROKEN_WORDS)
    assert not broken, broken
    links = page.get_by_role("navigation", name="Main").get_by_role("link")
    places = [link.bounding_box() for link in links.all()]
    assert len({round(place["y"]) for place in places if place}) == 1
    assert all(place and place["height"] < 36 and place["x"] + place["width"] <= PHONE["width"] for place in places)
    visitor.must_fit()
    visitor.picture(f"phone-{path.strip('/').partition('?')[0]}", whole=True)


# Short words that take more than one line.
BROKEN_WORDS = """cells => cells.flatMap((cell) => {
  const found = [];
  const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    for (const { 0: word, index } of texts.currentNode.data.matchAll(/[^\\s-]+/g)) {
      const range = document.createRange();
      range.setStart(texts.currentNode, index);
      range.setEnd(texts.currentNode, index + word.length);
      const lines = new Set([...range.getClientRects()].map((each) => Math.round(each.top)));
      if (word.length < 16 && lines.size > 1) found.push(word);
    }
  }
  return found;
})"""
