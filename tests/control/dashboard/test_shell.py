"""The shell of the dashboard: public pages without data, their policy, and the files that they load."""

import re
from pathlib import Path

import httpx
import pytest

from llama_stack_provider_moe.control.dashboard import assets, pages
from llama_stack_provider_moe.control.dashboard.routes import POLICY
from llama_stack_provider_moe.control.server import compat
from llama_stack_provider_moe.control.server.routes import create_router
from tests.control.dashboard.conftest import World
from tests.support.dashboard_jobs import MARKUP

STATIC = Path(assets.__file__).parent / "static"
PATHS = [page.path.format(job_uuid="j", name="n", sweep_uuid="s", pipeline_uuid="p") for page in pages.PAGES]


def get(world: World, path: str, **headers: str) -> httpx.Response:
    """The answer to a path below `/moe`."""
    return httpx.get(f"{world.url}/moe{path}", headers=headers, timeout=60)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.strip("/").replace("/", "-") or "jobs")
def test_a_page_runs_nothing_inline_and_loads_only_from_here(world: World, path: str) -> None:
    answer = get(world, path)
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=|javascript:", answer.text)
    loaded = re.findall(r'(?:src|href)="([^"#]+)"', answer.text)
    assert loaded
    for each in loaded:
        assert each.startswith("/moe"), f"{each} is not of this server"
        assert get(world, each.removeprefix("/moe")).status_code == 200, each


def test_the_policy_is_strict() -> None:
    rules = dict(rule.split(" ", 1) for rule in POLICY.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert rules["frame-ancestors"] == rules["form-action"] == rules["base-uri"] == "'none'"
    assert "unsafe" not in POLICY


def test_every_route_is_public_and_at_the_top_level(world: World) -> None:
    ours = [route for route in create_router(world.service).routes if getattr(route, "path", "").startswith("/moe")]
    assert len(ours) == len(pages.PAGES) + 1
    for route in ours:
        assert (getattr(route, "openapi_extra", None) or {}).get(compat.PUBLIC_ROUTE_KEY) is True, route


def test_a_page_holds_nothing_of_its_address(world: World) -> None:
    for path in ("/jobs/{}", "/data/{}", "/sweeps/{}", "/pipelines/{}"):
        answer = get(world, path.format("secret-name"))
        assert answer.text == get(world, path.format("other")).text
        assert "secret-name" not in answer.text
    assert "hacked" not in get(world, "/compare?jobs=" + MARKUP).text


def test_modules_import_only_modules_that_exist_and_make_no_markup() -> None:
    for path in STATIC.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r'from "\./([^"]+)"', text):
            assert (STATIC / name).is_file(), f"{path.name} imports {name}"
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "http://",
            "https://",
        ):
            assert word not in text, f"{path.name} has {word}"


def test_a_file_is_sent_once(world: World) -> None:
    first = get(world, "/static/app.css")
    assert first.headers["content-encoding"] == "gzip"
    assert first.headers["content-type"] == "text/css; charset=utf-8"
    again = get(world, "/static/app.css", **{"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304
    assert again.content == b""


@pytest.mark.parametrize("name", ["no.js", "..%2Froutes.py", "%2Fetc%2Fpasswd", "routes.py", "app.css%00.js"])
def test_no_other_file_is_sent(world: World, name: str) -> None:
    assert get(world, f"/static/{name}").status_code == 404


def test_without_plotly_pages_say_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    pages.render.cache_clear()
    monkeypatch.setattr(pages, "has_plotly", lambda: False)
    assert 'data-plotly="no"' in get(world, "/jobs/j").text
    pages.render.cache_clear()
    monkeypatch.undo()
    assert 'data-plotly="yes"' in get(world, "/jobs/j").text
