"""The plan of a new job on its page: memory, and the time that the server measured or estimated."""

import json
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from llama_stack_provider_moe.spec.run_time import run_time, unknown_time
from tests.control.dashboard.conftest import SWEEP, World
from tests.support.browser import Visitor
from tests.support.dashboard_jobs import change
from tests.support.host_support import BODY

PLAN = {
    "job": {
        "recipe": "sft", "model": "owner/name", "trains": "LoRA", "batch_size": 1, "max_length": 512, "dtype": "bf16",
    },
    "plan": {
        "verdict": "fits", "strategy": "ddp", "processes": 1, "device": "cuda",
        "device_bytes": 80e9, "usable_bytes": 76e9, "options": [],
    },
    "changes": [],
    "vision": "assumed: 1 image of 1,024 x 1,024 pixels in each row",
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
    ("source", "basis"),
    [("measured", "measured on sft-lr2e-4, 1 x NVIDIA H100"), ("estimated", "from FLOPs at 30% of the peak")],
)
def test_a_plan_says_how_long_it_takes_and_how_it_knows(visitor: Visitor, source: Any, basis: str) -> None:
    visitor.refused.add(400)  # the template's data set is not there
    page = planned(visitor, run_time(5230.0, 52_300, 540.0, source, basis))
    expect(page.locator(".time")).to_have_text(
        f"{source} Training takes about 1 h 30 min at 5,230 tokens a second ({basis})."
    )
    expect(page.locator(".time .pill")).to_have_text(source)
    expect(page.locator("#content")).to_contain_text(
        "Vision tower: assumed: 1 image of 1,024 x 1,024 pixels in each row."
    )
    visitor.must_be_accessible()


@pytest.mark.parametrize(
    ("time", "said"),
    [
        (None, "can't say how long"),
        (unknown_time("the GPU is unknown"), "No time estimate: the GPU is unknown"),
        (
            run_time(5230.0, None, 540.0, "estimated", "by FLOPs"),
            "No time estimate: by FLOPs; the number of rows is not",
        ),
    ],
)
def test_a_plan_without_a_time_says_why(visitor: Visitor, time: Any, said: str) -> None:
    visitor.refused.add(400)
    expect(planned(visitor, time).locator("#content")).to_contain_text(said)


def test_a_plan_is_gone_once_the_job_is_another_one(visitor: Visitor) -> None:
    visitor.refused.add(400)
    page = planned(visitor, None)
    expect(page.locator("#content")).to_contain_text("1 process of 80.0 GB")
    page.get_by_label("Job, as JSON").press("End")
    page.get_by_label("Job, as JSON").press("Space")
    expect(page.get_by_role("heading", name="Memory plan")).to_have_count(0)
    expect(page.get_by_role("button", name="Start job")).to_be_disabled()  # until the server has checked the new text


def test_an_answer_about_an_older_text_is_dropped(visitor: Visitor) -> None:
    visitor.refused.add(400)
    page = planned(visitor, None)
    waits: list[Route] = []

    def keep(route: Route) -> None:
        waits.append(route)

    page.unroute("**/jobs/plan*")
    page.route("**/jobs/plan*", keep)
    plan = page.get_by_role("button", name="Plan memory and time")
    with page.expect_request("**/jobs/plan*"):
        plan.click()
    expect(plan).to_be_disabled()
    page.get_by_label("Memory of a GPU").fill("24")
    expect(page.get_by_text("The planner computes")).to_have_count(0)
    waits[0].fulfill(body=json.dumps(PLAN), content_type="application/json")
    expect(plan).to_be_enabled()
    expect(page.get_by_role("heading", name="Memory plan")).to_have_count(0)


@pytest.mark.parametrize("gpus", ["", "0"])
def test_a_plan_for_gpus_says_if_the_server_has_none(
    visitor: Visitor, monkeypatch: pytest.MonkeyPatch, world: World, gpus: str
) -> None:
    visitor.refused.add(400)
    for job in ("dpo-run-7", f"{SWEEP}-3"):
        change(world.service, job, devices="")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    page = planned(visitor, None)
    expect(page.get_by_text("The plan is for GPUs of 80.0 GB, and this server has none.")).to_have_count(
        0 if gpus else 1
    )
    for job, device in (("dpo-run-7", "0"), (f"{SWEEP}-3", "1")):
        change(world.service, job, devices=device)


def test_a_plan_of_a_server_without_estimates(visitor: Visitor, world: World) -> None:
    visitor.refused.add(400)
    page = planned(visitor, ...)
    expect(page.locator("#content")).to_contain_text("It fits, with ddp.")
    expect(page.locator(".time")).to_have_count(0)
