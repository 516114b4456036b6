"""Labels and notes on the pages: shown, edited, and filtered by, with an address that says how."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.control.dashboard.conftest import World
from tests.support.browser import Visitor
from tests.support.dashboard_jobs import MARKUP


@pytest.fixture
def labelled(world: World) -> Iterator[str]:
    """A job that ends with the labels that it had."""
    yield "sft-stopped"
    with world.http() as api:
        before = {"labels": {"team": None, "use": None, "stage": None}, "note": None}
        api.patch("/jobs/sft-stopped", json=before).raise_for_status()


def of(world: World, job: str) -> tuple[dict[str, str], str | None]:
    """The labels and the note that the API gives."""
    with world.http() as api:
        found = api.get(f"/jobs/{job}").json()
    return found["labels"], found["note"]


def write_label(page: Page, key: str, value: str) -> None:
    """Fill the last line of the dialogue."""
    dialogue = page.get_by_role("dialog")
    dialogue.get_by_label("Key of a label").last.fill(key)
    dialogue.locator("input.value").last.fill(value)


def test_a_job_is_labelled_on_its_page(visitor: Visitor, world: World, labelled: str) -> None:
    visitor.refused.add(400)
    page = visitor.open(f"/jobs/{labelled}")
    page.get_by_role("button", name="Add labels or a note").click()
    dialogue = page.get_by_role("dialog", name=f"Labels and note of {labelled}")
    write_label(page, "bad key!", "x")
    visitor.must_be_accessible()
    visitor.picture("labels")
    dialogue.get_by_role("button", name="Save").click()
    expect(dialogue.get_by_role("alert")).to_contain_text("bad key!")
    expect(dialogue.locator("input.value").last).to_have_value("x")
    write_label(page, "team", "geo")
    dialogue.get_by_role("button", name="Add a label").click()
    write_label(page, "team", "chat")
    dialogue.get_by_role("button", name="Save").click()
    expect(dialogue.get_by_role("alert")).to_contain_text("there twice")
    write_label(page, "stage", f"second {MARKUP}")
    dialogue.get_by_label("Note").fill(f"Stopped too early.\n{MARKUP}")
    dialogue.get_by_role("button", name="Save").click()
    expect(dialogue).to_be_hidden()
    expect(page.locator("#labels")).to_contain_text("teamgeo")
    expect(page.locator("#note")).to_contain_text(MARKUP)
    assert of(world, labelled) == (
        {"team": "geo", "stage": f"second {MARKUP}"}, f"Stopped too early.\n{MARKUP}"
    )  # fmt: skip
    page.get_by_role("button", name="Edit labels and note").click()
    dialogue.get_by_role("button", name="Remove stage").click()
    dialogue.get_by_label("Note").fill("")
    dialogue.get_by_role("button", name="Save").click()
    expect(page.locator("#note")).to_be_hidden()
    assert of(world, labelled) == ({"team": "geo"}, None)
    assert page.evaluate("() => window.hacked") is None


def test_what_is_too_long_is_refused_and_not_cut(visitor: Visitor, world: World, labelled: str) -> None:
    """As the server counts: a character beyond the first 65,536 is one, although JavaScript counts two."""
    page = visitor.open(f"/jobs/{labelled}")
    page.get_by_role("button", name="Add labels or a note").click()
    dialogue = page.get_by_role("dialog")
    expect(dialogue).to_contain_text("A key has at most 63 characters, a value 256, the note 4,000.")
    for key, value, note, told in (
        ("team", "x" * 257, "", 'The value of "team" has 257 characters; at most 256 are possible.'),
        ("k" * 64, "x", "", "has 64 characters; at most 63 are possible."),
        ("team", "x", "n" * 4001, "The note has 4,001 characters; at most 4,000 are possible."),
    ):
        write_label(page, key, value)
        dialogue.get_by_label("Note").fill(note)
        dialogue.get_by_role("button", name="Save").click()
        expect(dialogue.get_by_role("alert")).to_contain_text(told)
        expect(dialogue.locator("input.value").last).to_have_value(value)
        assert of(world, labelled) == ({}, None)
    write_label(page, "team", "\U0001f600" * 256)
    dialogue.get_by_label("Note").fill("n" * 4000)
    dialogue.get_by_role("button", name="Save").click()
    expect(dialogue).to_be_hidden()
    assert of(world, labelled) == ({"team": "\U0001f600" * 256}, "n" * 4000)


def test_a_job_is_labelled_in_the_list(visitor: Visitor, world: World, labelled: str) -> None:
    page = visitor.open(f"?text={labelled}")
    page.get_by_role("button", name=f"Edit labels and note of {labelled}").click()
    write_label(page, "use", "baseline")
    page.get_by_role("dialog").get_by_role("button", name="Save").click()
    expect(page.locator("#jobs tbody .label")).to_have_text("usebaseline")
    assert of(world, labelled)[0] == {"use": "baseline"}


def test_the_list_is_filtered_by_labels_and_the_address_says_how(visitor: Visitor) -> None:
    page = visitor.open("")
    rows = page.locator("#jobs tbody tr")
    page.get_by_label("Label", exact=True).fill("team=geo")
    page.get_by_label("Label", exact=True).press("Enter")
    expect(rows).to_have_count(2)
    page.get_by_label("Label", exact=True).fill("use")
    page.get_by_role("button", name="Filter", exact=True).click()
    expect(rows).to_have_count(1)
    assert "label=team%3Dgeo&label=use" in page.url
    page.reload()
    expect(rows).to_have_count(1)
    visitor.must_be_accessible()
    page.get_by_role("button", name="Remove the filter label use").click()
    expect(rows).to_have_count(2)
    page.get_by_role("button", name="Remove the filter label team=geo").click()
    assert "label" not in page.url
    page.locator("#jobs tbody").get_by_role("link", name="use baseline").click()
    expect(rows).to_have_count(1)
    assert "label=use%3Dbaseline" in page.url


def test_a_label_with_markup_is_text_and_a_filter(visitor: Visitor) -> None:
    page = visitor.open("?text=markup-1")
    label = page.locator("#jobs tbody .label")
    expect(label).to_contain_text(MARKUP)
    expect(page.locator("#jobs tbody .said")).to_have_text(MARKUP)
    label.click()
    expect(page.locator("#chosen")).to_contain_text(f"from={MARKUP}")
    expect(page.locator("#jobs tbody tr")).to_have_count(1)
    assert page.evaluate("() => window.hacked") is None
    assert page.evaluate("() => document.querySelectorAll('main img, main script').length") == 0


LABELS = {"experimental": "", "sweep": "s1", "a-long-key-of-a-team-that-has-a-long-name-and-more": "v1"}


@pytest.mark.parametrize("width", [390, 1280])
def test_a_label_shows_its_key_and_its_value_in_whole_words(
    visitor: Visitor, world: World, labelled: str, width: int
) -> None:
    with world.http() as api:
        api.patch(f"/jobs/{labelled}", json={"labels": LABELS}).raise_for_status()
    try:
        visitor.page.set_viewport_size({"width": width, "height": 844})
        page = visitor.open(f"?text={labelled}")
        words = page.locator("#jobs tbody .label :is(span, b)")
        expect(words).to_have_count(5)
        for word in (page.get_by_text(text, exact=True) for text in ("experimental", "sweep", "s1", "v1")):
            expect(word).to_have_count(1)
            place = word.bounding_box()
            assert place is not None
            assert place["height"] < 30, f"{word.inner_text()} takes more than one line"
        visitor.must_fit()
        visitor.must_be_accessible()
        visitor.picture(f"label-chips-{width}")
    finally:
        with world.http() as api:
            api.patch(f"/jobs/{labelled}", json={"labels": dict.fromkeys(LABELS)}).raise_for_status()
