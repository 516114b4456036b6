"""A report is one file that needs nothing else, and shows markup as text."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from llama_stack_provider_moe.control import cli
from llama_stack_provider_moe.control.dashboard.svg import Line, _ticks, heat_map, line_chart, short
from tests.control.dashboard.conftest import GRANITE, World
from tests.support.browser import visiting
from tests.support.dashboard_jobs import MARKUP, change


def written(world: World, folder: Path, job: str, capsys: pytest.CaptureFixture[str]) -> str:
    file = folder / f"{job}.html"
    assert cli.main(["report", "job", job, "-o", str(file), "--url", world.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == str(file)
    return file.read_text(encoding="utf-8")


@pytest.mark.parametrize("job", ["breaker-1", "dpo-run-7", "sft-failed", "sft-later"])
def test_a_report_of_any_job_is_one_file(
    world: World, tmp_path: Path, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = written(world, tmp_path, job, capsys)
    assert not re.findall(r"<script|<link|<img|<[^>]*\ssrc=|url\(|@import|https?://(?!www\.w3\.org)", text)
    HTMLParser().feed(text)
    assert f"<h1>{job}</h1>" in text
    assert "optimizer.lr" in text
    if job != "sft-later":
        assert text.count("<svg") >= 5
    if job == "breaker-1":
        assert "I can&#39;t help with that." in text
        assert "refusal rate" in text


def test_a_report_shows_domains_and_positions(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same from the command line and from the server."""
    text = written(world, tmp_path, "sft-domains", capsys)
    with world.http() as api:
        served = api.get("/jobs/sft-domains/report").text
    for each in (text, served):
        assert "<h3>Loss by domain</h3>" in each
        assert "code, held out" in each
        assert "<h3>Perplexity by domain</h3>" in each
        assert "<h2>Which experts serve which domain</h2>" in each
        assert "<h3>Mutual information, nats</h3>" in each
        assert "a random router" in each
        assert "chat: share of tokens by layer and expert; red: no token" in each
        assert each.count('class="dead"') >= 8, "an expert without a token, in 4 layers of 2 domains"
        assert "<tr><th>1024 to 2047</th><td>8.192k</td><td>812</td><td>31.5</td><td>9.25</td></tr>" in each
    assert "Which experts serve" not in written(world, tmp_path, "breaker-1", capsys)


def test_markup_in_a_report_is_text(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = written(world, tmp_path, "markup-1", capsys) + written(world, tmp_path, "breaker-1", capsys)
    assert "<b>bold</b>" not in text
    assert "&lt;b&gt;bold&lt;/b&gt;" in text


def test_a_report_has_no_character_that_reverses_text(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(world.service, "sft-later", model="x\u202eevil & <b>")
    text = written(world, tmp_path, "sft-later", capsys)
    change(world.service, "sft-later", model=GRANITE)
    assert "\u202e" not in text
    assert "x\ufffdevil &amp; &lt;b&gt;" in text


def test_a_browser_shows_it_without_complaint(
    browser: Browser, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = written(world, tmp_path, "breaker-1", capsys)
    with visiting(browser, world.url) as visitor:
        visitor.page.set_content(text)
        visitor.must_fit()
        visitor.must_be_accessible()
        visitor.picture("report", whole=True)
        assert visitor.page.evaluate("() => window.hacked") is None


def test_lines_are_where_their_values_are() -> None:
    drawn = line_chart("t", [Line("a", [0, 5, 10], [1.0, 3.0, 2.0])])
    assert drawn is not None
    ((points,),) = [re.findall(r'<polyline class="line line-1" points="([^"]+)"', drawn)]
    xs, ys = zip(*(map(float, pair.split(",")) for pair in points.split()), strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[1] < ys[2] < ys[0], "up is smaller"
    assert ys[2] == pytest.approx((ys[0] + ys[1]) / 2, abs=0.2)


def test_a_line_with_a_gap_is_two_lines() -> None:
    drawn = line_chart("t", [Line("a", [1, 2, 3, 4, 5], [1.0, 2.0, None, 3.0, 4.0])])
    assert drawn is not None
    assert drawn.count("<polyline") == 2
    assert line_chart("t", [Line("a", [1], [None])]) is None


def test_names_in_a_drawing_are_escaped() -> None:
    drawn = line_chart(MARKUP, [Line(MARKUP, [1, 2], [1.0, 1.0])])
    assert drawn is not None
    assert "<img" not in drawn


def test_a_dead_expert_is_red_and_large_maps_are_left_out() -> None:
    drawn = heat_map("t", [1, 2], [[0.5, 0.0], [0.5, 1.0]], [0, 1])
    assert drawn is not None
    assert drawn.count('class="dead"') == 1
    assert drawn.count('class="heat-9"') == 1
    assert heat_map("t", list(range(300)), [[0.1] * 300] * 100, list(range(100))) is None
    assert heat_map("t", [], [], []) is None


@pytest.mark.parametrize(("least", "most"), [(0, 1), (-3, 12), (1e-7, 5e-6), (2.2e9, 2.31e9), (0, 50_000)])
def test_ticks_are_few_and_within(least: float, most: float) -> None:
    ticks = _ticks(least, most)
    assert 2 <= len(ticks) <= 6
    assert all(least - 1e-12 <= tick <= most * (1 + 1e-9) for tick in ticks)


@pytest.mark.parametrize(
    ("value", "text"), [(12_300_000, "12.3M"), (0, "0"), (0.25, "0.25"), (2e-5, "2.00e-05"), (1500, "1.5k")]
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text
