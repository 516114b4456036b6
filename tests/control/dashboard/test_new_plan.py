"""The plan of a new job on its page: memory, and the time that the server measured or estimated."""

import json
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from tests.control.dashboard.conftest import World
from tests.support.browser import Visitor
from tests.support.host_support import BODY

PLAN = {
    "job": {
        "recipe": "sft", "model": "owner/name", "trains": "LoRA", "batch_size": 1, "max_length": 512, "dtype": "bf16",
    },
    "plan": {
        "verdict": "fits", "strategy": "ddp", "processes": 1, "device_bytes": 80e9, "usable_bytes": 76e9, "options": [],
    },
    "changes": [],
}  # fmt: skip


def planned(visitor: Visitor, time: Any) -> Page:
    """The page after a plan. The planner needs a real model and half a minute, so the server's answer is given here."""

    def answer(route: Route) -> None:
        route.fulfill(body=json.dumps(PLAN | ({} if time is ... else {"time": time})), content_type="application/json")

    visitor.page.route("**/jobs/plan*", answer)
    page = visitor.open("/new")
    page.get_by_label("Job, as JSON").fill(json.dumps(BODY))
    expect(page.locator("#verdict")).to_contain_text("Valid.")
    page.get_by_role("button", name="Plan memory and time").click()
    expect(page.get_by_role("heading", name="Memory plan")).to_be_visible()
    return page


@pytest.mark.parametrize(
    ("source", "word"),
    [("measured on sft-lr2e-4, 1 x NVIDIA H100", "measured"), ("estimated from FLOPs at 30% of the peak", "estimated")],
)
def test_a_plan_says_how_long_it_takes_and_how_it_knows(visitor: Visitor, source: str, word: str) -> None:
    visitor.refused.add(400)  # the template's data set is not there
    page = planned(visitor, {"seconds": 5400.0, "tokens_per_s": 5230.0, "source": source})
    expect(page.locator(".time")).to_have_text(
        f"{word} Training takes about 1 h 30 min at 5,230 tokens a second ({source})."
    )
    expect(page.locator(".time .pill")).to_have_text(word)
    visitor.must_be_accessible()


@pytest.mark.parametrize(
    ("time", "said"),
    [
        (None, "can't say how long"),
        ({"seconds": None, "tokens_per_s": None, "source": "the GPU is unknown"}, "the GPU"),
    ],
)
def test_a_plan_without_a_time_says_so(visitor: Visitor, time: Any, said: str) -> None:
    visitor.refused.add(400)
    expect(planned(visitor, time).locator("#content")).to_contain_text(said)


def test_a_plan_of_a_server_without_estimates(visitor: Visitor, world: World) -> None:
    visitor.refused.add(400)
    page = planned(visitor, ...)
    expect(page.locator("#content")).to_contain_text("It fits, with ddp.")
    expect(page.locator(".time")).to_have_count(0)
