"""The page of a playground without its process: another model asked for, an end from elsewhere, a long prompt."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from llama_stack_provider_moe.jobdir.folder import write_atomic
from llama_stack_provider_moe.jobdir.prompts import Answered, Ended, LoadedModel, PromptFiles, Routed
from tests.control.dashboard.conftest import World
from tests.control.server.test_allowed_paths import model_at
from tests.support.browser import Visitor
from tests.support.dashboard_jobs import Workshop, change
from tests.support.host_support import folder_of


@pytest.fixture(scope="module")
def models(world: World) -> tuple[str, str]:
    """Two models that jobs may use."""
    return str(model_at(world.models / "pg-first")), str(model_at(world.models / "pg-second"))


@pytest.fixture
def loaded(world: World, models: tuple[str, str]) -> Iterator[str]:
    """A playground of the first model that takes prompts; all playgrounds are gone afterwards."""
    with world.http() as api:
        body = {"recipe": "playground", "model": models[0], "job_uuid": "talk"}
        api.post("/jobs", json=body).raise_for_status()
        folder = Workshop(world.service).begin("talk")
        change(world.service, "talk", devices="")
        files = PromptFiles(folder.prompts)
        files.folder.mkdir()
        write_atomic(files.model, LoadedModel(has_adapter=False, moe_layers=[0, 2], experts=4, top_k=1))
        yield "talk"
        for line in api.get("/jobs", params={"recipe": "playground"}).json()["data"]:
            change(world.service, line["job_uuid"], state="cancelled")
            api.delete(f"/jobs/{line['job_uuid']}").raise_for_status()


def form(page: Page) -> None:
    expect(page.locator("#standing")).to_contain_text("2 layers of 4 experts")
    expect(page.locator("#ask")).to_be_visible()


def test_another_model_in_the_address_is_noticed_before_a_message(
    visitor: Visitor, world: World, loaded: str, models: tuple[str, str]
) -> None:
    first, second = models
    page = visitor.open(f"/playground?of={second}")
    expect(page.locator("#replace")).to_contain_text(f"Your playground has {first}, not {second}.")
    expect(page.locator("#ask")).to_be_hidden()
    page.wait_for_timeout(2500)  # it looks at the playground again
    expect(page.locator("#ask")).to_be_hidden()
    visitor.must_be_accessible()
    visitor.must_fit()
    visitor.picture("playground-replace")
    page.get_by_role("button", name=f"Keep {first}").click()
    expect(page.locator("#ask")).to_be_visible()
    expect(page.locator("#replace")).to_be_empty()
    assert world.service.store.get(loaded, None).cancel_requested_at is None
    page.reload()
    page.get_by_role("button", name=f"Replace it with {second}").click()
    expect(page.locator("#standing h2")).to_have_text(second)
    expect(page.locator("#replace")).to_be_empty()
    assert world.service.store.get(loaded, None).cancel_requested_at is not None


def test_the_same_model_in_the_address_asks_nothing(visitor: Visitor, loaded: str, models: tuple[str, str]) -> None:
    page = visitor.open(f"/playground?of={models[0]}")
    form(page)
    expect(page.locator("#replace")).to_be_empty()


def test_a_playground_that_another_tab_ends_and_deletes(visitor: Visitor, world: World, loaded: str) -> None:
    visitor.refused.add(404)
    page = visitor.open("/playground")
    form(page)
    with world.http() as api:
        api.post(f"/jobs/{loaded}/cancel").raise_for_status()
        expect(page.locator("#standing .pill")).to_have_text("ending")
        expect(page.locator("#ask")).to_be_hidden()
        Workshop(world.service).cancel(loaded)
        expect(page.locator("#standing .pill")).to_have_text("cancelled")
        page.reload()
        expect(page.locator("#standing")).to_be_hidden()  # it is no longer the caller's one


def test_a_playground_that_is_deleted_under_the_page(visitor: Visitor, world: World, loaded: str) -> None:
    visitor.refused |= {404, 409}  # 409: the page asks while the files go
    page = visitor.open("/playground")
    form(page)
    change(world.service, loaded, state="cancelled")
    with world.http() as api:
        api.delete(f"/jobs/{loaded}").raise_for_status()
    expect(page.locator("#standing")).to_contain_text(re.compile("cancelled|has been deleted"))
    expect(page.locator("#ask")).to_be_hidden()
    expect(page.locator("#standing .pill", has_text="running")).to_have_count(0)


def test_a_strip_names_its_colours(visitor: Visitor, world: World, loaded: str) -> None:
    page = visitor.open("/playground")
    form(page)
    page.get_by_label("Message", exact=True).fill("Hello?")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#answers pre")).to_be_attached()
    files = PromptFiles(folder_of(world.service, loaded).prompts)
    made = [
        Routed(side="on", id=1, token="a", experts=[[3], [1]], weights=[[1.0], [1.0]]),
        Routed(side="on", id=2, token="b", experts=[[3], [0]], weights=[[1.0], [1.0]]),
        Answered(side="on", text="ab", tokens=2, reason="stop", seconds=0.1),
        Ended(),
    ]
    (number,) = files.numbers()
    files.answer(number).write_text("".join(piece.model_dump_json() + "\n" for piece in made), encoding="utf-8")
    legend = page.get_by_role("list", name="Experts: With its adapter: colours")
    expect(legend.get_by_role("listitem")).to_have_text(["expert 3", "expert 1", "expert 0"])
    colours = legend.locator("i").evaluate_all("signs => signs.map((each) => getComputedStyle(each).backgroundColor)")
    assert len(set(colours)) == 3
    expect(page.locator("#said")).to_have_text("Answered.")
    visitor.must_be_accessible()
    visitor.picture("playground-legend", whole=True)


def test_a_message_that_is_too_long_is_refused_and_not_cut(visitor: Visitor, loaded: str) -> None:
    visitor.refused.add(400)
    page = visitor.open("/playground")
    form(page)
    area = page.get_by_label("Message", exact=True)
    area.focus()
    page.keyboard.insert_text("x" * 100_003)  # as a paste does; `fill` would pass by a limit of the page
    assert len(area.input_value()) == 100_003
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("alert")).to_contain_text("100,000")
    assert len(area.input_value()) == 100_003
