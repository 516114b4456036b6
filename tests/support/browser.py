"""A browser for tests of the dashboard: the system's Chromium, driven by Playwright."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, expect, sync_playwright

SCREENSHOTS = os.environ.get("MOE_SCREENSHOTS")  # a folder that pictures of the pages go to
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",    "--disable-component-update", "--disable-sync",
)  # fmt: skip
WAIT_MS = 60_000  # for what never comes; nothing is measured by it


def chromium() -> str:
    """The system's Chromium; without one the test is skipped, in CI it fails."""
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
    )
    if not found:
        why = "there is no Chromium (Debian: apt-get install chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    return found


@contextmanager
def browsing() -> Iterator[Browser]:
    """A browser with a profile of its own that is gone afterwards."""
    program = chromium()
    expect.set_options(timeout=WAIT_MS)  # pages' own timeouts do not count for it, and its default is 5 s
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visitor:
    """Somebody who looks at pages, and what their browser complained about.

    Attributes:
        url: the server.
        page: Playwright's page.
        complaints: errors on the console, uncaught errors, and requests that failed or went elsewhere.
        refused: statuses of answers of the API that a test expects.
    """

    url: str
    page: Page
    complaints: list[str] = field(default_factory=list)
    refused: set[int] = field(default_factory=set)

    def open(self, path: str) -> Page:
        """Open a page below `/moe`."""
        self.page.goto(f"{self.url}/moe{path}")
        return self.page

    def must_be_accessible(self) -> None:
        """Check the page as it is with axe, by the rules of WCAG 2.2 A and AA and axe's best practices."""
        tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
        found = Axe().run(self.page, options={"runOnly": {"type": "tag", "values": tags}})
        violations = found.response["violations"]
        told = [
            f"{each['id']}: {each['help']}: {[node['html'][:300] for node in each['nodes']][:4]}" for each in violations
        ]
        assert not told, "\n".join(told)

    def must_fit(self) -> None:
        """Check that nobody must scroll sideways."""
        wide = self.page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1], f"the page is {wide[0]} pixels wide in a window of {wide[1]}"

    def picture(self, name: str, whole: bool = False) -> None:
        """Keep a picture of the page, if somebody wants pictures."""
        if SCREENSHOTS:
            Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
            self.page.evaluate("() => scrollTo(0, 0)")
            self.page.wait_for_timeout(400)
            self.page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png", full_page=whole)

    def must_be_content(self) -> None:
        """Check that the browser had nothing to complain about."""
        assert not self.complaints, "\n".join(self.complaints)


@contextmanager
def visiting(browser: Browser, url: str, **context: Any) -> Iterator[Visitor]:
    """A visitor with an empty profile; afterwards the browser must have had nothing to complain about.

    Args:
        browser: the browser.
        url: the server.
        context: Playwright's settings, such as `color_scheme` and `viewport`.
    """
    made: BrowserContext = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
    page = made.new_page()
    page.set_default_timeout(WAIT_MS)
    visitor = Visitor(url, page)
    home = urlsplit(url).netloc

    def heard(message: ConsoleMessage) -> None:
        source = str(message.location.get("url"))
        expected = any(f"status of {status}" in message.text for status in visitor.refused)
        # A machine that is busy with other tests may take more than a health check's 0.3 s; the page shows it as it is.
        is_busy = source.endswith("/health") and "status of 503" in message.text
        if message.type in ("error", "warning") and not expected and not is_busy:
            visitor.complaints.append(f"console: {message.text} ({source})")

    def asked(request: Request) -> None:
        if urlsplit(request.url).scheme not in ("data", "blob") and urlsplit(request.url).netloc != home:
            visitor.complaints.append(f"a request went elsewhere: {request.url}")

    page.on("console", heard)
    page.on("pageerror", lambda error: visitor.complaints.append(f"uncaught: {error}"))
    page.on("request", asked)
    try:
        yield visitor
        visitor.must_be_content()
    finally:
        made.close()
