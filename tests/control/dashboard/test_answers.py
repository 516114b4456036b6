"""The answers of a job that learns from rewards, and its curves, in a browser."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from llama_stack_provider_moe.control import cli
from tests.control.dashboard.conftest import PHONE, World
from tests.control.dashboard.test_pages import charts_are_drawn
from tests.support.browser import Visitor, visiting
from tests.support.dashboard_jobs import MARKUP, keep_answers
from tests.support.host_support import folder_of

TITLES = (
    "Reward", "Reward by grader", "Spread of the rewards", "KL divergence from the model before training",
    "Clipped tokens", "Changed routes", "Policy loss",
)  # fmt: skip


def rewards(page: Page) -> list[str]:
    """The reward of each answer on the page, from top to bottom."""
    return [text.split("\n")[1] for text in page.locator("article .graded dl").all_inner_texts()]


def test_answers_are_texts_with_what_each_grader_gave(visitor: Visitor) -> None:
    page = visitor.open("/jobs/grpo-1#samples")
    cards = page.locator("article")
    expect(cards).to_have_count(8)
    expect(page.locator("#panel [role=status]")).to_contain_text("Step 30: 8 answers to 2 prompts. Mean reward")
    expect(page.locator("#panel [role=status]")).to_contain_text("1 answer without a reward")
    first = cards.first
    expect(first).to_contain_text("<|user|>What is 0 + 30?")
    expect(first.get_by_role("row", name=re.compile("^right"))).to_contain_text("0")
    expect(cards.nth(3)).to_contain_text(f"deadline: {MARKUP}")
    expect(cards.nth(1).locator("pre").last).to_contain_text(MARKUP)
    expect(cards.nth(2)).to_contain_text("cut at the largest length")
    assert page.evaluate("() => window.hacked") is None
    assert page.evaluate("() => document.querySelectorAll('main img, main script, main article b').length") == 0
    visitor.must_be_accessible()
    visitor.picture("answers", whole=True)


def test_a_step_and_an_order_are_chosen_by_keyboard(visitor: Visitor) -> None:
    page = visitor.open("/jobs/grpo-1#samples")
    expect(page.locator("article")).to_have_count(8)
    assert rewards(page) == ["0.2", "0.45", "0.7", "–", "0.45", "0.7", "0.95", "1.2"]
    page.get_by_label("Step", exact=True).focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(page.locator("article").first).to_contain_text("of step 29.")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Order")).to_be_focused()
    page.keyboard.press("ArrowDown")
    expect(page.locator("article").first).to_contain_text("answer 3 of step 29")
    assert rewards(page) == ["1.2", "0.95", "0.7", "0.7", "0.45", "0.45", "0.2", "–"]
    page.keyboard.press("ArrowDown")
    expect(page.locator("article").first).to_contain_text("answer 0 of step 29")
    assert rewards(page) == ["0.2", "0.45", "0.45", "0.7", "0.7", "0.95", "1.2", "–"]
    page.keyboard.press("Tab")
    expect(page.locator("article pre").first).to_be_focused()


def test_new_answers_come_and_leave_alone_what_is_read(visitor: Visitor, world: World) -> None:
    folder = folder_of(world.service, "grpo-1")
    page = visitor.open("/jobs/grpo-1#samples")
    status = page.locator("#panel [role=status]")
    expect(status).to_contain_text("Step 30:")
    try:
        keep_answers(folder, 31)
        expect(status).to_contain_text("Step 31:")
        page.locator("article pre").first.focus()
        keep_answers(folder, 32)
        expect(status).to_contain_text("Step 31: 8 answers")
        expect(status).to_contain_text("Those of step 32 appear when you leave the list.")
        expect(page.locator("article pre").first).to_be_focused()
        page.get_by_label("Order").focus()
        expect(status).to_contain_text("Step 32: 8 answers")
        keep_answers(folder, 33, groups=15)
        expect(page.locator("article")).to_have_count(40)
        page.get_by_role("button", name="More answers").press("Enter")
        expect(page.locator("article")).to_have_count(60)
        expect(page.locator("article").nth(40)).to_be_focused()
        expect(page.get_by_role("button", name="More answers")).to_be_hidden()
    finally:
        for step in (31, 32, 33):
            (folder.samples / f"{step:09d}.jsonl").unlink(missing_ok=True)


def test_a_phone_shows_answers_and_a_job_without_any_says_so(browser: Browser, world: World) -> None:
    with visiting(browser, world.url, viewport=PHONE, has_touch=True) as visitor:
        page = visitor.open("/jobs/grpo-1#samples")
        expect(page.locator("article")).to_have_count(8)
        visitor.must_fit()
        visitor.must_be_accessible()
        folder = folder_of(world.service, "grpo-1").samples
        folder.rename(folder.with_name("elsewhere"))
        try:
            page.reload()
            expect(page.locator("#panel .empty")).to_have_text("No answers yet. They come with the first step.")
            expect(page.get_by_label("Order")).to_be_hidden()
        finally:
            folder.with_name("elsewhere").rename(folder)
        expect(page.locator("article")).to_have_count(8)


def test_a_job_of_another_recipe_has_no_answers(visitor: Visitor) -> None:
    page = visitor.open("/jobs/sft-lr2e-4#samples")
    charts_are_drawn(page, 3)
    expect(page.get_by_role("tab", name="Answers")).to_have_count(0)


def test_rewards_have_curves_alone_and_compared(visitor: Visitor) -> None:
    page = visitor.open("/jobs/grpo-1")
    charts_are_drawn(page, 8)
    titles = page.locator("figure h2").all_text_contents()
    assert [title for title in TITLES if title not in titles] == []
    assert "Loss" not in titles, "the loss on held-out prompts is their reward, negated"
    plot = page.locator('.plot[aria-label^="Reward by grader, lines over steps."]')
    expect(plot).to_have_attribute("aria-label", re.compile(r"right: last .*short: last .*right, held out: last "))
    expect(page.get_by_role("region", name="Progress")).to_contain_text("Held-out reward")
    page = visitor.open("/compare?jobs=grpo-1,sft-lr2e-4")
    charts_are_drawn(page, 5)
    titles = page.locator("figure h2").all_text_contents()
    assert {"Reward", "Reward on held-out prompts", "Reward of right", "Reward of short", "Held-out loss"} <= {*titles}
    visitor.must_be_accessible()


def test_a_report_has_the_curves_of_rewards(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.html"
    assert cli.main(["report", "job", "grpo-1", "-o", str(file), "--url", world.url, "--json"]) == 0
    capsys.readouterr()
    text = file.read_text(encoding="utf-8")
    for title in TITLES:
        assert f"<h3>{title}</h3>" in text
    assert "<h3>Loss</h3>" not in text
    assert re.search(r"<dt>Held-out reward</dt><dd>[\d.]+ <small>from 0\.\d+</small>", text)
    by_grader = re.search(r"<h3>Reward by grader</h3>\s*<div class=\"keys\">(.*?)</div>", text)
    assert by_grader is not None
    assert re.findall(r"</i>([^<]+)<", by_grader[1]) == ["right", "short", "right, held out"]
