"""Rows on the pages: which of their tokens a job learns, duplicates, and where a job's rows come from."""

import json

import pytest
from playwright.sync_api import expect

from tests.control.dashboard.conftest import World
from tests.support import tiny_models
from tests.support.browser import Visitor
from tests.support.dashboard_jobs import MARKUP

PROFILE_MS = 180_000  # the first one imports the libraries in a process of its own


@pytest.fixture(scope="module")
def model(world: World) -> str:
    """A model with a tokenizer that jobs may use."""
    return str(tiny_models.build("mixtral", world.models / "mixtral"))


@pytest.fixture(scope="module")
def rows(world: World) -> str:
    """A data set in which rows 11 and 12 repeat rows 1 and 2."""
    answers = ["Answer 1.", "It has two.", "Yes, since 1998.", "On the left.", *[MARKUP] * 6]
    made = [{"prompt": f"Question {number}?", "completion": answer} for number, answer in enumerate(answers, 1)]
    with world.http() as api:
        content = "".join(json.dumps(row) + "\n" for row in [*made, *made[:2]])
        api.put("/datasets/repeats", content=content).raise_for_status()
    return "repeats"


def test_learnt_tokens_and_duplicates_are_shown(visitor: Visitor, model: str, rows: str) -> None:
    page = visitor.open(f"/data/{rows}")
    page.get_by_label("Model").fill(model)
    page.get_by_label("Longest sequence, tokens").fill("64")
    page.get_by_role("button", name="Profile").click()
    first = page.locator(".sequence").first
    expect(first).to_contain_text("Question 1?", timeout=PROFILE_MS)
    learnt = "".join(first.locator("mark").all_inner_texts())
    assert "Answer 1." in learnt
    assert "Question 1?" not in learnt
    assert MARKUP[:20] in page.locator(".sequence").nth(4).inner_text()
    expect(page.locator(".sequence")).to_have_count(6)
    duplicates = page.get_by_role("region", name="Duplicates")
    expect(duplicates.get_by_role("row")).to_have_text(["RowSame as row", "111", "122"])
    visitor.must_be_accessible()
    visitor.must_fit()
    visitor.picture("dataset-learnt", whole=True)
    assert page.evaluate("() => window.hacked") is None
    assert page.evaluate("() => document.querySelectorAll('main img, main script').length") == 0


def test_a_jobs_rows_are_profiled_with_its_settings(visitor: Visitor, world: World, model: str, rows: str) -> None:
    body = {"recipe": "sft", "model": model, "data": {"dataset_id": f"data:{rows}"}, "options": {"max_length": 64}}
    with world.http() as api:
        api.post("/jobs", json=body | {"job_uuid": "of-data"}).raise_for_status()
        try:
            page = visitor.open("/jobs/of-data#data")
            origin = page.get_by_role("region", name="Data of this job")
            expect(origin).to_contain_text("12")
            expect(page.locator("#panel")).to_contain_text("prompt_completion (12)")
            page.get_by_role("button", name=f"Profile {rows} (train)").click()
            expect(page.locator(".sequence").first).to_contain_text("tokens are learnt", timeout=PROFILE_MS)
            visitor.must_be_accessible()
            origin.get_by_role("link", name=rows).click()
            page.wait_for_url(f"**/moe/data/{rows}")
        finally:
            api.post("/jobs/of-data/cancel").raise_for_status()
            api.delete("/jobs/of-data").raise_for_status()


def test_rows_of_the_log_show_what_is_learnt(visitor: Visitor) -> None:
    page = visitor.open("/jobs/sft-lr2e-4#data")
    shown = page.locator(".sequence")
    expect(shown).to_contain_text("What is the tallest mountain?")
    expect(shown.locator("mark")).to_have_text("Mount Everest, 8,849 m.<|end|>")
    expect(page.get_by_role("region", name="Data of this job")).to_contain_text("host data set")
    visitor.must_be_accessible()
