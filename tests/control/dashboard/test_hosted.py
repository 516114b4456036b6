"""The dashboard on a real host with authentication: public pages, a token for data, two owners, an administrator."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.control.server.test_owners import ALICE, BOB, POLICY, ROOT, USERS
from tests.support.authority import authority
from tests.support.browser import visiting
from tests.support.host_harness import QUICKSTART, Server, run_config, serving, tiny_interpreter
from tests.support.jobs_support import wait_for

pytestmark = pytest.mark.e2e
ROWS = [{"prompt": f"Question {number}?", "completion": "An answer."} for number in range(8)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("hosted")
    with authority(USERS) as endpoint:
        auth = {"provider_config": {"type": "custom", "endpoint": endpoint}, "access_policy": POLICY}
        config = run_config(
            QUICKSTART, folder, stack={"server": {"auth": auth}},
            provider={"training_python": tiny_interpreter(folder), "supervisor": {"poll_s": 0.1}},
        )  # fmt: skip
        with serving(config, folder / "state") as running:
            with running.http(token=ALICE) as alice:
                rows = "".join(f'{{"prompt": "{row["prompt"]}", "completion": "yes"}}\n' for row in ROWS)
                alice.put("/datasets/hers", content=rows).raise_for_status()
                body: dict[str, Any] = {"recipe": "sft", "model": "owner/name", "data": {"dataset_id": "hers"}}
                alice.post("/jobs", json=body | {"job_uuid": "alices-own"}).raise_for_status()
                wait_for(lambda: alice.get("/jobs/alices-own/status").json()["status"] == "completed")
            yield running


def log_in(page: Page, token: str) -> None:
    dialogue = page.get_by_role("dialog", name="This server asks for a token")
    expect(dialogue).to_be_visible()
    dialogue.get_by_label("Token").fill(token)
    dialogue.get_by_role("button", name="Use this token").click()


def test_pages_are_public_and_their_data_are_not(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as nobody:
        for path in ("/moe", "/moe/jobs/alices-own", "/moe/static/app.css", "/moe/static/plotly.min.js"):
            answer = nobody.get(path)
            assert answer.status_code == 200, path
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert b"alices-own" not in answer.content
        assert nobody.get("/v1alpha/post-training/jobs").status_code == 401


def test_each_owner_sees_their_own_jobs(browser: Browser, server: Server) -> None:
    with visiting(browser, server.url) as alice:
        alice.refused |= {401}
        page = alice.open("")
        alice.must_be_accessible()
        log_in(page, "token-of-nobody")
        expect(page.locator("#token-why")).to_contain_text("refused")
        log_in(page, ALICE)
        expect(page.locator("#jobs tbody tr")).to_have_count(1)
        expect(page.locator("th.owner")).to_be_hidden()
        assert ALICE not in page.content()
        assert page.evaluate("() => [localStorage.length, document.cookie, sessionStorage.getItem('moe-token')]") == [
            0,
            "",
            ALICE,
        ]
        page.get_by_role("link", name="alices-own").click()
        expect(page.get_by_role("tab", name="Curves")).to_be_visible()
        page.get_by_role("tab", name="Files").click()
        page.get_by_text("adapter, step 0").click()
        with page.expect_download() as download:
            page.get_by_role("region", name="Files of adapter").get_by_role("button", name="Download").click()
        assert download.value.path().read_bytes() == b"weights"
        page.get_by_role("button", name="Forget token").click()
        expect(page.get_by_role("dialog")).to_be_visible()
    with visiting(browser, server.url) as bob:
        bob.refused |= {401, 404}
        page = bob.open("")
        log_in(page, BOB)
        expect(page.locator("#empty")).to_contain_text("No jobs yet.")
        for path in ("/jobs/alices-own", "/compare?jobs=alices-own", "/new?from=alices-own", "/data/hers"):
            bob.open(path)
            expect(page.get_by_role("alert")).to_contain_text("Not found")
            assert "owner/name" not in page.content()
    with visiting(browser, server.url) as root:
        root.refused |= {401}
        page = root.open("")
        log_in(page, ROOT)
        expect(page.locator("td.owner")).to_have_count(1)
        root.must_be_accessible()
