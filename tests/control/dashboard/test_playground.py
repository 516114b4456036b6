"""The playground in a browser, with a real training process that answers: both sides, experts, stop, replacement."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from peft import LoraConfig, get_peft_model
from playwright.sync_api import Browser, Page, expect

from llama_stack_provider_moe.control.server.routes import PREFIX
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.jobdir.prompts import PromptFiles
from llama_stack_provider_moe.jobdir.state import JobState
from tests.support import tiny_models
from tests.support.browser import Visitor, visiting
from tests.support.dashboard_jobs import Workshop
from tests.support.host_support import folder_of, over_http, serving_in_process

PHONE = {"width": 390, "height": 844}
LOADED_MS = 240_000  # importing torch takes minutes on a busy machine


@dataclass
class Warm:
    """A server with a playground whose model is loaded."""

    service: PostTrainingService
    url: str
    job_id: str


def adapter_at(folder: Path, model: Path) -> Path:
    """An adapter that changes its base's answers."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model)
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(folder)
    return folder


@contextmanager
def beside_a_browser(folder: Path) -> Iterator[PostTrainingService]:
    """A service that a thread opens and closes: in this one, Playwright's event loop may run already."""
    made = serving_in_process(folder)
    with ThreadPoolExecutor(1) as thread:
        service = thread.submit(made.__enter__).result()
        try:
            yield service
        finally:
            thread.submit(made.__exit__, None, None, None).result()


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    with beside_a_browser(tmp_path_factory.mktemp("playground")) as service, over_http(service) as url:
        model = tiny_models.build("granitemoe", service.config.models_dir / "granite")
        adapter_at(service.config.models_dir / "adapter", model)
        body = {
            "recipe": "playground", "model": "granite", "adapter_folder": "adapter", "job_uuid": "warm",
            "training": {"dtype": "fp32"}, "playground": {"idle_s": 900},
        }  # fmt: skip
        answer = httpx.post(f"{url}{PREFIX}/jobs", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        folder = Workshop(service).begin("warm")
        command = [sys.executable, "-m", "llama_stack_provider_moe.compute.worker.main", str(folder.root)]
        with folder.output.open("ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            yield Warm(service, url, "warm")
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture
def visitor(browser: Browser, warm: Warm) -> Iterator[Visitor]:
    with visiting(browser, warm.url) as made:
        yield made


def ready(page: Page) -> None:
    expect(page.locator("#standing")).to_contain_text("layers of", timeout=LOADED_MS)
    expect(page.locator("#ask")).to_be_visible()


def send(page: Page, text: str, tokens: int = 12) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Tokens at most").fill(str(tokens))
    page.get_by_role("button", name="Send").click()


def answered(page: Page) -> list[str]:
    expect(page.locator("#said")).to_have_text("Answered.", timeout=60_000)
    return page.locator("#answers pre").all_text_contents()


def test_both_sides_answer_the_same_prompt(visitor: Visitor, warm: Warm) -> None:
    page = visitor.open("/playground")
    ready(page)
    send(page, "Write <b>3</b> words about friend.")
    first = answered(page)
    assert page.locator("#answers h2").all_text_contents() == ["With its adapter", "Base, without the adapter"]
    assert all(first)
    assert first[0] != first[1]
    expect(page.locator("#answers canvas")).to_have_count(2)
    visitor.must_fit()
    visitor.must_be_accessible()
    visitor.picture("playground-desk-light", whole=True)
    send(page, "Write <b>3</b> words about friend.")
    expect(page.locator("#said")).not_to_have_text("Answered.")
    assert answered(page) == first, "the same seed"


def test_the_strip_has_its_figures_as_a_table(visitor: Visitor, warm: Warm) -> None:
    page = visitor.open("/playground")
    ready(page)
    page.get_by_label("Adapter").select_option("off")
    send(page, "Write 2 words about spring.", 6)
    answered(page)
    page.get_by_text("As a table").click()
    visitor.must_be_accessible()
    loaded = PromptFiles(folder_of(warm.service, warm.job_id).prompts).read_model()
    assert loaded is not None
    rows = page.locator("#answers tbody tr")
    assert 1 <= rows.count() <= 6
    cells = rows.first.locator("td").all_text_contents()
    assert len(cells) == len(loaded.moe_layers)
    assert all(len(cell.split(", ")) == loaded.top_k for cell in cells)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(browser: Browser, warm: Warm, scheme: str) -> None:
    with visiting(browser, warm.url, color_scheme=scheme, viewport=PHONE, has_touch=True) as visitor:
        page = visitor.open("/playground")
        ready(page)
        send(page, "Hello?")
        answered(page)
        visitor.must_fit()
        visitor.must_be_accessible()
        visitor.picture(f"playground-phone-{scheme}", whole=True)


def test_an_answer_is_stopped(visitor: Visitor) -> None:
    page = visitor.open("/playground")
    ready(page)
    page.get_by_label("Adapter").select_option("on")
    send(page, "Write many words.", 1000)
    expect(page.locator("#answers pre")).not_to_be_empty()
    page.get_by_role("button", name="Stop").click()
    answered(page)
    expect(page.locator("#answers")).to_contain_text("stopped")


def test_another_model_replaces_it_only_if_asked(visitor: Visitor, warm: Warm) -> None:
    """Last, because it ends the playground."""
    visitor.refused.add(409)
    page = visitor.open("/playground?of=granite")
    ready(page)
    expect(page.get_by_label("Job or model")).to_have_value("granite")
    page.get_by_role("button", name="Start").click()
    dialogue = page.get_by_role("dialog", name="Replace your playground?")
    expect(dialogue).to_contain_text("'warm' is your playground already")
    visitor.must_be_accessible()
    dialogue.get_by_role("button", name="Back").click()
    assert warm.service.store.get(warm.job_id, None).cancel_requested_at is None
    page.get_by_role("button", name="Start").click()
    page.get_by_role("dialog").get_by_role("button", name="Replace it").click()
    expect(page.locator("#standing")).to_contain_text("waiting")
    assert warm.service.store.get(warm.job_id, None).cancel_requested_at is not None
    page.get_by_role("button", name="End", exact=True).click()
    expect(page.locator("#standing")).to_contain_text("cancelled")
    expect(page.locator("#ask")).to_be_hidden()
    assert warm.service.store.list(None, 1)[0].state is JobState.CANCELLED
