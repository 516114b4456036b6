"""What holds on any page in a browser: markup is text, a keyboard reaches all, a theme stays, and no frame shows it."""

import pytest
from playwright.sync_api import Browser, expect

from tests.control.dashboard.conftest import World
from tests.control.dashboard.test_pages import JOB_TABS, charts_are_drawn, tab
from tests.support.browser import Visitor
from tests.support.dashboard_jobs import MARKUP


@pytest.mark.parametrize("path", ["", "/jobs/markup-1", "/compare?jobs=markup-1", "/new?from=markup-1"])
def test_markup_is_text(visitor: Visitor, path: str) -> None:
    visitor.refused.add(400)
    page = visitor.open(path)
    page.wait_for_load_state("networkidle")
    if path.startswith("/jobs"):
        for name in JOB_TABS:
            tab(page, name)
            page.wait_for_timeout(150)
            if name == "Curves" and page.get_by_text("All other figures").is_visible():
                page.get_by_text("All other figures").click()
                page.wait_for_timeout(300)
            if name == "Log":
                expect(page.get_by_role("log")).to_contain_text(MARKUP)
    assert page.evaluate("() => window.hacked") is None
    assert page.evaluate("() => document.querySelectorAll('main img, main script, main b.hacked').length") == 0
    if path in ("", "/jobs/markup-1"):
        expect(page.get_by_text(MARKUP).first).to_be_attached()


def test_all_is_reached_by_keyboard(visitor: Visitor) -> None:
    page = visitor.open("/jobs/breaker-1")
    charts_are_drawn(page)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.get_by_role("tab", name="Curves").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Experts")).to_be_focused()
    expect(page.get_by_role("tab", name="Experts")).to_have_attribute("aria-selected", "true")
    page.keyboard.press("End")
    expect(page.get_by_role("tab", name="Files")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("tabpanel")).to_be_focused()


def test_a_chosen_theme_stays(visitor: Visitor) -> None:
    page = visitor.open("")
    page.get_by_role("button", name="Switch between light and dark").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")


def test_no_page_can_be_put_into_a_frame(browser: Browser, world: World) -> None:
    context = browser.new_context()
    page = context.new_page()
    outside = f'<title>outside</title><iframe src="{world.url}/moe"></iframe>'
    page.route("http://elsewhere.test/", lambda route: route.fulfill(body=outside, content_type="text/html"))
    page.goto("http://elsewhere.test/", wait_until="load")
    (frame,) = page.main_frame.child_frames
    assert not frame.get_by_text("MoE training").is_visible()
    assert frame.url.startswith("chrome-error:"), frame.url
    page.goto(f"{world.url}/moe")
    expect(page.get_by_text("MoE training").first).to_be_visible()
    context.close()
