"""What is done on a job's page: an export with its steps, delete with dependants, resume of a failed job."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from llama_stack_provider_moe.jobdir.export_steps import ExportStep, ExportSteps, StepState
from llama_stack_provider_moe.jobdir.folder import write_atomic
from tests.control.dashboard.conftest import World
from tests.control.server.test_allowed_paths import model_at
from tests.support.browser import Visitor
from tests.support.dashboard_jobs import Workshop, artifact, change
from tests.support.host_support import BODY

VERIFICATION = {"logits": {"largest_difference": 0.0021, "limit": 0.05}, "rows": 16}


@pytest.fixture
def built_on(world: World) -> Iterator[tuple[str, str]]:
    """A completed job, and a job that was trained on its result."""
    workshop = Workshop(world.service)
    with world.http() as api:
        api.post("/jobs", json=BODY | {"job_uuid": "base-job"}).raise_for_status()
        folder = workshop.begin("base-job")
        model = model_at(folder.artifacts / "merged")
        workshop.complete("base-job")
        later = {"job_uuid": "later-job", "model": str(model), "adapter": {"rank": 2}}
        api.post("/jobs", json=BODY | later).raise_for_status()
        api.post("/jobs/later-job/cancel").raise_for_status()
        yield "base-job", "later-job"
        for job in ("later-job", "base-job"):
            if api.get(f"/jobs/{job}").status_code == 200:
                api.delete(f"/jobs/{job}").raise_for_status()


def step_states(folder: Path, *states: tuple[str, StepState]) -> None:
    """Write the steps of an export, as its process does."""
    steps = [ExportStep(name=name, state=state) for name, state in states]
    write_atomic(folder, ExportSteps(steps=steps))


def test_an_export_shows_its_steps_and_what_was_verified(visitor: Visitor, world: World) -> None:
    page = visitor.open("/jobs/sft-lr1e-4")
    page.get_by_role("button", name="Export").click()
    dialogue = page.get_by_role("dialog", name="Export this job")
    expect(dialogue.get_by_label("Export, as JSON")).to_have_value('{\n  "merged": true\n}')
    visitor.must_be_accessible()
    dialogue.get_by_role("button", name="Export").click()
    page.wait_for_url("**/moe/jobs/export-*")
    export = page.url.rpartition("/")[2].partition("#")[0]
    try:
        expect(page.locator("#facts").get_by_role("link", name="sft-lr1e-4")).to_be_visible()
        expect(page.get_by_role("tab", name="Curves")).to_have_count(0)
        page.get_by_role("tab", name="Files").click()
        expect(page.locator("#panel")).to_contain_text("Its steps show once it has begun.")
        folder = Workshop(world.service).begin(export)
        step_states(folder.exports, ("merged", StepState.IN_PROGRESS), ("card", StepState.SCHEDULED))
        steps = page.get_by_role("region", name=f"Steps of {export}")
        expect(steps.get_by_role("row").nth(1)).to_contain_text("running")
        expect(steps.get_by_role("row").nth(2)).to_contain_text("waiting")
        made = artifact(folder, "merged", "merged", 120, {"config.json": "{}"})
        made = made.model_copy(update={"verification": VERIFICATION})
        done = ExportStep(
            name="merged", state=StepState.COMPLETED, note="2 files, 1.2 GB", artifact=made.identifier,
            figures={"bytes": 1200},
        )  # fmt: skip
        failed = ExportStep(name="card", state=StepState.FAILED, reason="no room")
        write_atomic(folder.exports, ExportSteps(steps=[done, failed]))
        Workshop(world.service).complete(export, artifacts=(made,))
        expect(steps.get_by_role("row").nth(1)).to_contain_text("2 files, 1.2 GB")
        expect(steps.get_by_role("row").nth(2)).to_contain_text("no room")
        page.locator(".artifact summary").first.click()
        expect(page.locator(".artifact").first).to_contain_text("Verified before it was listed")
        expect(page.locator(".artifact").first).to_contain_text("logits, largest difference")
        expect(page.locator(".artifact").first).to_contain_text("0.0021")
        visitor.must_be_accessible()
        visitor.must_fit()
        visitor.picture("export", whole=True)
        page.goto(f"{world.url}/moe/jobs/sft-lr1e-4#files")
        expect(page.locator("#panel").get_by_role("link", name=export)).to_be_visible()
    finally:
        with world.http() as api:
            api.delete(f"/jobs/{export}").raise_for_status()


def test_a_mistake_in_an_export_is_told_and_kept(visitor: Visitor) -> None:
    visitor.refused.add(400)
    page = visitor.open("/jobs/sft-lr1e-4")
    page.get_by_role("button", name="Export").click()
    dialogue = page.get_by_role("dialog")
    area = dialogue.get_by_label("Export, as JSON")
    area.fill("{")
    dialogue.get_by_role("button", name="Export").click()
    expect(dialogue.get_by_role("alert")).to_contain_text("not JSON")
    area.fill('{"mergedd": true}')
    dialogue.get_by_role("button", name="Export").click()
    expect(dialogue.get_by_role("alert")).to_contain_text("mergedd")
    expect(area).to_have_value('{"mergedd": true}')


def test_a_job_that_others_need_is_deleted_only_after_a_second_question(
    visitor: Visitor, world: World, built_on: tuple[str, str]
) -> None:
    visitor.refused.add(409)
    base, later = built_on
    page = visitor.open(f"/jobs/{base}")
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    again = page.get_by_role("dialog", name="Other jobs need it")
    expect(again).to_contain_text(f"job '{base}' is needed by job '{later}' (cancelled)")
    visitor.must_be_accessible()
    again.get_by_role("button", name="Back").click()
    with world.http() as api:
        assert api.get(f"/jobs/{base}").status_code == 200
        page.get_by_role("button", name="Delete").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        again.get_by_role("button", name="Delete anyway").click()
        page.wait_for_url("**/moe")
        assert api.get(f"/jobs/{base}").status_code == 404
        assert api.get(f"/jobs/{later}").status_code == 200


def test_a_failed_job_is_resumed(visitor: Visitor, world: World) -> None:
    page = visitor.open("/jobs/sft-failed")
    expect(page.get_by_role("alert")).to_contain_text("the run has diverged")
    with world.http() as api:
        before = api.get("/jobs/sft-failed").json()
    try:
        page.get_by_role("button", name="Resume").click()
        expect(page.locator("#facts")).to_contain_text("waiting")
        expect(page.get_by_role("status").filter(has_text="from the beginning")).to_be_visible()
        expect(page.get_by_role("button", name="Resume")).to_have_count(0)
        expect(page.get_by_role("button", name="Cancel")).to_be_visible()
        with world.http() as api:
            assert api.get("/jobs/sft-failed/status").json()["status"] == "scheduled"
    finally:
        with world.http() as api:
            api.post("/jobs/sft-failed/cancel").raise_for_status()
        change(world.service, "sft-failed", state="failed", reason=before["reason"], cancel_requested_at=None)
