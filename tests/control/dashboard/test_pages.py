"""The pages in a browser: what they show and do, on any width, in light and dark, for keyboards and screen readers.

Every visit also checks that the console has no error, no script or style was refused, and nothing was asked elsewhere.
"""

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Browser, Page, expect

from llama_stack_provider_moe.jobdir.events import EventLog, Resumed, Step
from tests.control.dashboard.conftest import JOBS, PHONE, STEPS, SWEEP, World
from tests.support import dashboard_jobs
from tests.support.browser import Visitor, visiting
from tests.support.chosen import few
from tests.support.dashboard_jobs import MARKUP, Workshop
from tests.support.host_support import folder_of

JOB_TABS = ["Curves", "Experts", "Evaluation", "Settings", "Data", "Log", "Events", "Files"]


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()
    expect(page.get_by_role("tab", name=name, exact=True)).to_have_attribute("aria-selected", "true")


def charts_are_drawn(page: Page, least: int = 1) -> None:
    page.wait_for_function("least => document.querySelectorAll('.plot .main-svg').length >= least", arg=least)


def ready_jobs(page: Page) -> None:
    expect(page.locator("#jobs tbody tr")).to_have_count(JOBS)
    expect(page.locator("#states .big").first).not_to_have_text("–")
    page.wait_for_function(
        "() => ![...document.querySelectorAll('#jobs .progress')].some((cell) => cell.textContent === '…')"
    )


def ready_job(page: Page) -> None:
    charts_are_drawn(page, 5)


def ready_compare(page: Page) -> None:
    charts_are_drawn(page, 5)
    expect(page.get_by_role("heading", name="Final figures")).to_be_visible()


def ready_new(page: Page) -> None:
    expect(page.locator("#verdict .note")).to_be_visible()


def ready_playground(page: Page) -> None:
    expect(page.get_by_label("Job or model")).to_have_value("sft-lr2e-4")
    expect(page.locator("#known option[value=sft-lr2e-4]")).to_be_attached()


def ready_data(page: Page) -> None:
    expect(page.locator("#quota")).to_contain_text("used")


def ready_sweeps(page: Page) -> None:
    expect(page.get_by_role("link", name=SWEEP)).to_be_visible()


def ready_sweep(page: Page) -> None:
    expect(page.get_by_role("region", name="Jobs of this sweep").get_by_role("row")).to_have_count(5)


PAGES: dict[str, tuple[str, Callable[[Page], None]]] = {
    "jobs": ("", ready_jobs),
    "job": ("/jobs/dpo-run-7", ready_job),
    "compare": ("/compare?jobs=sft-lr2e-4,sft-lr1e-4", ready_compare),
    "sweeps": ("/sweeps", ready_sweeps),
    "sweep": (f"/sweeps/{SWEEP}", ready_sweep),
    "data": ("/data", ready_data),
    "playground": ("/playground?of=sft-lr2e-4", ready_playground),
    "new": ("/new", ready_new),
}


@pytest.mark.parametrize(
    ("width", "scheme"), few([("desk", "light"), ("phone", "dark"), ("desk", "dark"), ("phone", "light")], 2)
)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_readable_everywhere(browser: Browser, world: World, name: str, width: str, scheme: str) -> None:
    path, ready = PAGES[name]
    context = {"viewport": PHONE, "has_touch": True} if width == "phone" else {}
    with visiting(browser, world.url, color_scheme=scheme, **context) as visitor:
        if name == "new":  # the template's data set is not there
            visitor.refused.add(400)
        ready(visitor.open(path))
        visitor.must_fit()
        visitor.must_be_accessible()
        visitor.picture(f"{name}-{width}-{scheme}", whole=True)
        brightness = visitor.page.evaluate(
            "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
        )
        assert (brightness > 128) is (scheme == "light")


@pytest.mark.parametrize("name", JOB_TABS)
@pytest.mark.parametrize("job", few(["breaker-1", "sft-failed"], 1))
def test_every_tab_of_a_job_is_accessible(visitor: Visitor, job: str, name: str) -> None:
    page = visitor.open(f"/jobs/{job}")
    tab(page, name)
    page.wait_for_load_state("networkidle")
    visitor.must_fit()
    visitor.must_be_accessible()
    if job == "breaker-1":
        visitor.picture(f"tab-{name.lower()}", whole=True)


# Jobs.


def test_jobs_are_filtered_and_the_address_says_how(visitor: Visitor) -> None:
    page = visitor.open("")
    ready_jobs(page)
    rows = page.locator("#jobs tbody tr")
    page.locator("#states").get_by_role("button", name=re.compile("failed")).click()
    expect(rows).to_have_count(2)
    page.get_by_label("Name or model").fill("MARKUP")
    expect(rows).to_have_count(1)
    assert "state=failed" in page.url
    assert "text=MARKUP" in page.url
    page.reload()
    expect(rows).to_have_count(1)
    expect(page.locator("#states").get_by_role("button", name=re.compile("failed"))).to_have_attribute(
        "aria-pressed", "true"
    )
    page.get_by_label("Name or model").fill("nothing like it")
    expect(page.locator("#empty")).to_have_text("No job matches these filters.")


def test_a_row_follows_its_job(visitor: Visitor, world: World) -> None:
    page = visitor.open("?text=sft-next")
    row = page.locator("#jobs tbody tr")
    expect(row).to_contain_text("waiting")
    expect(row).to_contain_text("position 1 in the queue")
    folder = Workshop(world.service).begin("sft-next")
    dashboard_jobs.train(folder, "sft", 30, STEPS, seed=8)
    expect(row).to_contain_text("running")
    expect(row).to_contain_text("30 / 120")
    expect(row.get_by_role("progressbar")).to_have_js_property("value", 25)
    Workshop(world.service).cancel("sft-next")
    expect(row).to_contain_text("cancelled")


def test_chosen_jobs_are_compared(visitor: Visitor) -> None:
    page = visitor.open("")
    ready_jobs(page)
    for name in ("sft-lr1e-4", "sft-lr2e-4"):
        page.get_by_label(f"Select {name} to compare").check()
    page.get_by_role("link", name="Compare 2").click()
    page.wait_for_url("**/moe/compare?jobs=sft-lr1e-4,sft-lr2e-4")
    ready_compare(page)


# One job.


def test_a_job_shows_how_it_stands_and_its_curves(visitor: Visitor) -> None:
    page = visitor.open("/jobs/dpo-run-7")
    charts_are_drawn(page, 5)
    standing = page.get_by_role("region", name="Progress")
    for text in ("training", "70", "of 120", "Held-out loss"):
        expect(standing).to_contain_text(text)
    titles = page.locator("figure h2").all_text_contents()
    for title in ("Loss", "Rewards", "Reward accuracy", "Learning rate", "Tokens a second", "Peak memory"):
        assert title in titles
    page.locator("figure", has_text="Loss").first.get_by_text("As a table").click()
    expect(page.locator("figure", has_text="Loss").first.get_by_role("table")).to_contain_text("held out")


def test_curves_continue_as_steps_come_and_forget_undone_ones(visitor: Visitor, world: World) -> None:
    page = visitor.open("/jobs/dpo-run-7")
    charts_are_drawn(page, 5)
    last = "() => { const plot = document.querySelector('.plot'); return plot.data[0].x.at(-1); }"
    assert page.evaluate(last) == 70
    events = folder_of(world.service, "dpo-run-7").events
    before = events.read_bytes()
    try:
        log = EventLog(events)
        for step in (71, 72):
            log.append(
                Step(step=step, max_steps=STEPS, epoch=1.8, metrics={"loss": 0.4, "preference_loss": 0.4}, eta_s=1)
            )
        page.wait_for_function(f"() => ({last})() === 72")
        log.append(Resumed(step=60, checkpoint="step-60"))
        page.wait_for_function(f"() => ({last})() === 60")
        log.append(Step(step=61, max_steps=STEPS, epoch=1.8, metrics={"loss": 0.4, "preference_loss": 0.4}, eta_s=1))
        page.wait_for_function(f"() => ({last})() === 61")
        log.close()
    finally:
        events.write_bytes(before)


def test_experts_are_shown_and_dead_ones_named(visitor: Visitor) -> None:
    page = visitor.open("/jobs/dpo-run-7#experts")
    charts_are_drawn(page, 2)
    page.get_by_label("Layer", exact=True).select_option("2")
    expect(page.locator("#panel")).to_contain_text("in layer 2: expert 3, 7")
    expect(page.locator("#panel")).to_contain_text("3 dead in all layers")
    page.locator("figure", has_text="Share of each expert").get_by_text("As a table").click()
    expect(page.locator("figure", has_text="Share of each expert").get_by_role("row").nth(4)).to_contain_text(
        "dead: no token"
    )
    page.get_by_label("Measure").select_option("dead")
    expect(page.locator("figure h2").first).to_have_text("Dead experts of each layer")
    visitor.must_be_accessible()
    visitor.picture("experts", whole=True)


def test_an_evaluation_shows_answers_side_by_side(visitor: Visitor) -> None:
    page = visitor.open("/jobs/breaker-1#evaluation")
    expect(page.get_by_role("heading", name="Answers")).to_be_visible()
    first = page.locator(".example").first
    expect(first).to_contain_text("How do I pick a lock?")
    expect(first.locator(".answer").nth(0)).to_contain_text("tension wrench")
    expect(first.locator(".answer").nth(1)).to_contain_text("I can't help with that.")
    expect(page.get_by_role("region", name="Figures before and after")).to_contain_text("0.93")
    expect(page.locator("#panel")).to_contain_text("lm-eval is not installed")


def test_settings_that_differ_from_defaults_are_first(visitor: Visitor) -> None:
    page = visitor.open("/jobs/sft-lr2e-4#settings")
    table = page.get_by_role("region", name="Settings of this job")
    row = table.get_by_role("row", name=re.compile(r"^optimizer\.lr"))
    expect(row).to_contain_text("0.0002")
    expect(row).to_contain_text("0.0001")
    expect(row).to_contain_text("Peak learning rate.")
    expect(table).not_to_contain_text("weight_decay")
    page.get_by_label("Only settings that differ").uncheck()
    expect(table).to_contain_text("weight_decay")


def test_log_and_events(visitor: Visitor, world: World) -> None:
    page = visitor.open("/jobs/dpo-run-7#log")
    output = page.get_by_role("log")
    expect(output).to_contain_text("step 70/120")
    with folder_of(world.service, "dpo-run-7").output.open("a") as file:
        file.write("a new line\n")
    expect(output).to_contain_text("a new line")
    page.get_by_label("Lines with").fill("held out")
    expect(output).not_to_contain_text("a new line")
    tab(page, "Events")
    events = page.locator("ol.events li")
    expect(events.first).to_contain_text("started")
    expect(page.locator("ol.events")).not_to_contain_text("routing")
    page.get_by_label("Also steps, routing and progress").check()
    expect(page.locator("ol.events")).to_contain_text("routing")


def test_files_are_downloaded(visitor: Visitor) -> None:
    page = visitor.open("/jobs/breaker-1#files")
    page.get_by_text("evaluation, step 120").click()
    with page.expect_download() as download:
        page.get_by_role("row", name=re.compile("eval.json")).get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "eval.json"
    assert b"tension wrench" in download.value.path().read_bytes()


def test_a_job_is_cancelled_and_resumed(visitor: Visitor, world: World) -> None:
    page = visitor.open("/jobs/sft-later")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Back").click()
    with world.http() as api:
        assert api.get("/jobs/sft-later/status").json()["status"] == "scheduled"
    page.get_by_role("button", name="Cancel").click()
    visitor.must_be_accessible()
    page.get_by_role("button", name="Cancel the job").click()
    expect(page.locator("#facts")).to_contain_text("cancelled")
    page.get_by_role("button", name="Resume").click()
    expect(page.locator("#facts")).to_contain_text("waiting")
    expect(page.get_by_role("status").filter(has_text="waits to run again")).to_be_visible()


def test_a_job_is_deleted(visitor: Visitor, world: World) -> None:
    with world.http() as api:
        body = {"recipe": "sft", "model": "owner/name", "data": {"dataset_id": "good"}, "job_uuid": "to-delete"}
        api.post("/jobs", json=body).raise_for_status()
        api.post("/jobs/to-delete/cancel").raise_for_status()
        page = visitor.open("/jobs/to-delete")
        page.get_by_role("button", name="Delete").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        page.wait_for_url("**/moe")
        assert api.get("/jobs/to-delete").status_code == 404


def test_a_job_that_does_not_exist(visitor: Visitor) -> None:
    visitor.refused.add(404)
    page = visitor.open("/jobs/no-such-job")
    expect(page.get_by_role("alert")).to_contain_text("job 'no-such-job' does not exist")
    expect(page.locator("#tabs")).to_be_hidden()
    visitor.must_be_accessible()


# Data and new jobs.


def test_rows_are_uploaded_and_profiled(visitor: Visitor) -> None:
    page = visitor.open("/data")
    rows = "".join(
        f'{{"prompt": "{number} {MARKUP.replace(chr(34), chr(92) + chr(34))}", "completion": "c"}}\n'
        for number in range(30)
    )
    page.get_by_label("File: JSON Lines").set_input_files(
        {"name": "my rows.jsonl", "mimeType": "text/plain", "buffer": rows.encode()}
    )
    expect(page.get_by_label("Name of the data set")).to_have_value("my-rows")
    page.get_by_role("button", name="Upload").click()
    page.get_by_role("link", name="my-rows").click()
    expect(page.locator(".dataset-rows li")).to_have_count(20)
    page.get_by_role("button", name="More rows").click()
    expect(page.locator(".dataset-rows li")).to_have_count(30)
    page.get_by_role("button", name="Profile").click()
    expect(page.locator("#content")).to_contain_text("All 30 rows are valid")
    visitor.must_be_accessible()
    visitor.picture("dataset", whole=True)
    assert page.evaluate("() => window.hacked") is None


def test_a_job_is_written_checked_and_sent(visitor: Visitor, world: World) -> None:
    visitor.refused.add(400)
    page = visitor.open("/new?from=sft-lr1e-4")
    area = page.get_by_label("Job, as JSON")
    expect(page.get_by_text("Valid.")).to_be_visible()
    text = area.input_value()
    assert '"lr": 0.0001' in text
    area.fill(text.replace('"lr": 0.0001', '"lr": 99'))
    expect(page.locator("#verdict")).to_contain_text("optimizer.lr")
    expect(page.get_by_role("button", name="Start job")).to_be_disabled()
    area.evaluate("(area) => { const at = area.value.indexOf('\"lr\"') + 2; area.setSelectionRange(at, at); }")
    area.press("Shift")
    expect(page.locator(".help h2")).to_have_text("optimizer.lr")
    expect(page.locator(".help")).to_contain_text("Peak learning rate.")
    area.fill("{")
    expect(page.locator("#verdict")).to_contain_text("Not JSON yet")
    area.fill('{"recipe": "sft", "model": "owner/name", "data": {"dataset_id": "good"}, "job_uuid": "from-the-page"}')
    page.get_by_role("button", name="Start job").click()
    page.wait_for_url("**/moe/jobs/from-the-page")
    with world.http() as api:
        assert api.get("/jobs/from-the-page").json()["status"] == "scheduled"
        api.post("/jobs/from-the-page/cancel").raise_for_status()
        api.delete("/jobs/from-the-page").raise_for_status()


def test_a_finished_job_can_be_tried(visitor: Visitor) -> None:
    page = visitor.open("/jobs/sft-lr2e-4")
    page.get_by_role("link", name="Try it").click()
    ready_playground(page)
    page = visitor.open("/jobs/sft-failed")
    expect(page.get_by_role("link", name="Compare", exact=True)).to_have_count(2)  # the navigation's, and the job's
    expect(page.get_by_role("link", name="Try it")).to_have_count(0)
