"""A server with jobs in every state, and a browser. No model is trained."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser

from llama_stack_provider_moe.control.server.routes import PREFIX
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.jobdir.events import EventLog, Message
from tests.support import dashboard_jobs
from tests.support.browser import Visitor, browsing, visiting
from tests.support.dashboard_jobs import MARKUP, Workshop, artifact, change
from tests.support.host_support import BODY, ask, folder_of, over_http, serving_in_process, submit

PHONE = {"width": 390, "height": 844}
JOBS = 15  # that make_jobs makes
SWEEP = "lr-sweep"
GRANITE = "ibm-granite/granite-3.0-1b-a400m-instruct"
STEPS = 120


@dataclass
class World:
    """A server with jobs.

    Attributes:
        service: what is behind it.
        url: its address.
        models: a folder whose models jobs may use; empty at first.
    """

    service: PostTrainingService
    url: str
    models: Path

    def http(self) -> httpx.Client:
        """A client of the post-training API."""
        return httpx.Client(base_url=self.url + PREFIX, timeout=60)


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    models = tmp_path_factory.mktemp("models")
    with serving_in_process(tmp_path_factory.mktemp("dashboard"), allowed_roots=[models]) as service:
        make_jobs(service)
        with over_http(service) as url:
            yield World(service, url, models)


@pytest.fixture(scope="package")
def browser(world: World) -> Iterator[Browser]:
    """A browser; after the server, for Playwright's event loop stays in this thread until the browser is closed."""
    with browsing() as made:
        yield made


@pytest.fixture
def visitor(browser: Browser, world: World) -> Iterator[Visitor]:
    with visiting(browser, world.url) as made:
        yield made


def make_jobs(service: PostTrainingService) -> None:
    """Jobs of each recipe and state; one has markup wherever somebody could put it."""
    workshop = Workshop(service)
    for job_id, lr, seed in (("sft-lr2e-4", 2e-4, 1), ("sft-lr1e-4", 1e-4, 2)):
        labels = {"team": "geo"} | ({"use": "baseline"} if seed == 2 else {})
        submit(service, job_uuid=job_id, optimizer={"lr": lr}, adapter={"rank": 16, "alpha": 32}, labels=labels)
        folder = workshop.begin(job_id)
        dashboard_jobs.train(folder, "sft", STEPS, STEPS, lr, seed)
        made = artifact(folder, "adapter", "adapter", STEPS, {"adapter_config.json": "{}"}, 1.0 + seed / 20)
        workshop.complete(job_id, artifacts=(made,), loss=1.1, train_seconds=1400.0 + seed)
    submit(service, job_uuid="breaker-1")
    folder = workshop.begin("breaker-1")
    dashboard_jobs.train(folder, "circuit_breaker", STEPS, STEPS, seed=3)
    workshop.assess(folder)
    report = json.dumps(dashboard_jobs.evaluation())
    made = artifact(folder, "evaluation", "evaluation", STEPS, {"eval.json": report})
    workshop.complete("breaker-1", artifacts=(made,))
    change(service, "breaker-1", recipe="circuit_breaker")
    submit(service, job_uuid="sft-domains")
    folder = workshop.begin("sft-domains")
    dashboard_jobs.train(folder, "sft", 20, 40, seed=8)
    dashboard_jobs.by_domain(folder, 20)
    found = artifact(folder, "domains", "analysis", 40, {"routing.json": json.dumps(dashboard_jobs.domain_routing())})
    longer = artifact(folder, "positions", "analysis", 40, {"positions.json": json.dumps(dashboard_jobs.positions())})
    workshop.complete("sft-domains", artifacts=(found, longer))
    graders = [
        {"grader": {"type": "string_check", "name": "right", "input": "{{sample.output_text}}", "reference": "4",
                    "operation": "like"}},
        {"grader": {"type": "length", "name": "short", "unit": "words", "most": 12}, "weight": 0.2},
    ]  # fmt: skip
    submit(service, job_uuid="grpo-1", recipe="grpo", reward=graders)
    folder = workshop.begin("grpo-1")
    change(service, "grpo-1", devices="")
    dashboard_jobs.train(folder, "grpo", 30, STEPS, seed=9)
    for step in (28, 29, 30):
        dashboard_jobs.keep_answers(folder, step)
    for job_id in ("dpo-run-7", "sft-failed", "sft-stopped", "markup-1", "sft-next", "sft-later"):
        told = {"labels": {"from": MARKUP}, "note": MARKUP} if job_id == "markup-1" else {}
        submit(service, job_uuid=job_id, metadata={"note": MARKUP}, **told)
    dashboard_jobs.train(workshop.begin("dpo-run-7"), "dpo", 70, STEPS, 5e-6, 4, dead=True)
    change(service, "dpo-run-7", recipe="dpo")
    dashboard_jobs.train(workshop.begin("sft-failed"), "sft", 31, STEPS, 2e-3, 5)
    workshop.fail(
        "sft-failed", "step 31: loss is nan; the run has diverged (last finite loss 7.203). Try a lower optimizer.lr"
    )
    dashboard_jobs.train(workshop.begin("sft-stopped"), "sft", 40, STEPS, 2e-4, 6)
    workshop.cancel("sft-stopped")
    markup(service, workshop)
    sweep(service, workshop)
    for job_id in (
        "sft-lr2e-4",
        "sft-lr1e-4",
        "breaker-1",
        "grpo-1",
        "dpo-run-7",
        "sft-failed",
        "sft-stopped",
        "sft-next",
        "sft-later",
    ):
        change(service, job_id, model=GRANITE)


def sweep(service: PostTrainingService, workshop: Workshop) -> None:
    """A sweep with two completed jobs, one that it ended early, and one that runs."""
    body = {
        "job": BODY, "parameters": {"optimizer.lr": [1e-4, 3e-4], "adapter.rank": [8, 16]}, "sweep_uuid": SWEEP,
        "max_parallel": 2, "halving": {},
    }  # fmt: skip
    assert ask(service, "POST", "/sweeps", json=body).status_code == 200
    figures = {0: [2.31, 1.42, 1.21], 1: [2.31, 1.38, 1.16], 2: [2.31, 2.9], 3: [2.31, 1.51]}
    for number, values in figures.items():
        job_id = f"{SWEEP}-{number}"
        dashboard_jobs.train(workshop.begin(job_id), "sft", 40 * (len(values) - 1), STEPS, 2e-4, 10 + number)
        workshop.measure(job_id, {40 * index: value for index, value in enumerate(values) if index})
        change(service, job_id, model=GRANITE)
        if number < 2:
            workshop.complete(job_id)
    workshop.end_early(f"{SWEEP}-2", 1)
    change(service, f"{SWEEP}-3", devices="1")


def markup(service: PostTrainingService, workshop: Workshop) -> None:
    """A job with markup in its model, log, events, metrics' names and reason."""
    folder = workshop.begin("markup-1")
    dashboard_jobs.train(folder, "sft", 3, 6, seed=7)
    with folder.output.open("a", encoding="utf-8") as file:
        file.write(MARKUP + "\n")
    log = EventLog(folder_of(service, "markup-1").events)
    log.append(Message(text=MARKUP))
    log.close()
    text = folder.events.read_text(encoding="utf-8").replace('"entropy":', json.dumps(MARKUP) + ":")
    folder.events.write_text(text, encoding="utf-8")
    artifact(folder, "notes", "analysis", 3, {"a<b>.txt": "x"})
    workshop.fail("markup-1", MARKUP)
    change(service, "markup-1", model=f"owner/{MARKUP}")
