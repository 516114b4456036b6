"""The page that compares jobs: settings that differ, final figures, and how differently routers use their experts."""

import re

from playwright.sync_api import expect

from tests.control.dashboard.conftest import World
from tests.control.dashboard.test_pages import charts_are_drawn
from tests.support.browser import Visitor


def test_comparison_names_settings_that_differ_and_final_figures(visitor: Visitor) -> None:
    page = visitor.open("/compare?jobs=sft-lr2e-4")
    expect(page.locator("#content")).to_contain_text("Add a second job")
    page.get_by_label("Add a job").fill("sft-lr1e-4")
    page.get_by_role("button", name="Add").click()
    page.wait_for_url("**jobs=sft-lr2e-4,sft-lr1e-4")
    differ = page.get_by_role("region", name="Settings that differ")
    expect(differ).to_contain_text("optimizer.lr")
    expect(differ.get_by_role("row")).to_have_count(2)
    final = page.get_by_role("region", name="Final figures")
    expect(final).to_contain_text("Held-out loss")
    expect(final).to_contain_text("lowest")
    charts_are_drawn(page, 5)
    page.get_by_role("button", name="Remove sft-lr2e-4").click()
    page.wait_for_url("**jobs=sft-lr1e-4")
    page.go_back()
    expect(page.locator(".chip")).to_have_count(2)


def distance(world: World, one: str, other: str) -> list[float]:
    """Half the sum of the differences of two jobs' shares, by layer."""
    with world.http() as api:
        first, second = (api.get(f"/jobs/{job}/routing/shares").json()["share"] for job in (one, other))
    return [
        sum(abs(a - b) for a, b in zip(mine, theirs, strict=True)) / 2
        for mine, theirs in zip(first, second, strict=True)
    ]


def test_the_routing_of_three_jobs_is_compared(visitor: Visitor, world: World) -> None:
    page = visitor.open("/compare?jobs=sft-lr2e-4,sft-lr1e-4,dpo-run-7,sft-later")
    pairs = page.get_by_role("region", name="Routing difference of each two jobs")
    rows = pairs.get_by_role("row")
    expect(rows).to_have_count(4)
    expect(page.locator("#content")).to_contain_text("Without routing figures: sft-later.")
    assert [text.strip() for text in rows.nth(1).locator("th, td").all_inner_texts()][1] == "–"
    near, far = distance(world, "sft-lr2e-4", "sft-lr1e-4"), distance(world, "sft-lr2e-4", "dpo-run-7")
    shown = [float(text) for text in rows.nth(1).locator("td").all_inner_texts()[1:]]
    for found, wanted in zip(shown, (near, far), strict=True):
        mean = sum(wanted) / len(wanted)
        assert abs(found - mean) < 1e-3 * mean
    by_layer = page.get_by_role("region", name="Routing difference from sft-lr2e-4, by layer")
    expect(by_layer.get_by_role("row")).to_have_count(9)
    third = by_layer.get_by_role("row").nth(3)
    expect(third).to_contain_text(f"{far[2]:.4g}")
    expect(third.locator("td").nth(1)).to_contain_text("→ 0")  # an expert that died in layer 2
    visitor.must_be_accessible()
    visitor.must_fit()
    visitor.picture("compare-routing", whole=True)


def test_jobs_without_routing_say_so(visitor: Visitor) -> None:
    page = visitor.open("/compare?jobs=sft-lr2e-4,sft-later")
    expect(page.locator("#content")).to_contain_text("sft-later has none")


def test_a_page_that_is_full_says_which_jobs_it_leaves_out(visitor: Visitor, world: World) -> None:
    visitor.refused.add(404)
    names = ["sft-lr2e-4", *(f"none-{number}" for number in range(12))]
    page = visitor.open(f"/compare?jobs={','.join(names)}")
    said = page.locator("#left-out")
    expect(said).to_contain_text("names 13 jobs. This page compares the first 12; it leaves out none-11.")
    expect(page.locator(".chip")).to_have_count(12)
    page.get_by_label("Add a job").fill("sft-lr1e-4")
    page.get_by_role("button", name="Add").click()
    expect(said).to_contain_text("at most 12 jobs. Remove one before you add sft-lr1e-4.")
    expect(page.get_by_label("Add a job")).to_have_value("sft-lr1e-4")
    page.get_by_role("button", name="Remove none-0").click()
    expect(page.get_by_role("button", name="Remove none-11")).to_be_visible()  # there is room for it now
    expect(said).to_be_empty()


def test_ticks_are_plain_numbers(visitor: Visitor) -> None:
    page = visitor.open("/compare?jobs=sft-lr2e-4,sft-lr1e-4")
    charts_are_drawn(page, 5)
    ticks = page.locator("figure", has_text="Learning rate").locator(".ytick text").all_text_contents()
    assert len(ticks) > 2
    assert not [tick for tick in ticks if re.search(r"0\.\d*e", tick)], ticks
    assert {float(tick) for tick in ticks} & {0.0001, 0.0002}
