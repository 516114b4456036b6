"""The panel of devices and the queue: with GPUs, with another owner's job, and on a machine without GPUs."""

import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from llama_stack_provider_moe.control.supervisor.processes import ProcessName
from tests.control.dashboard.conftest import SWEEP, World
from tests.support.browser import Visitor
from tests.support.dashboard_jobs import change
from tests.support.host_support import BODY

SMI = """#!/bin/sh
echo "0, GPU-aaaa, NVIDIA H100 80GB HBM3, 87, 40960, 81559"
echo "1, GPU-bbbb, NVIDIA H100 80GB HBM3, 42, 24576, 81559"
echo "2, GPU-cccc, NVIDIA H100 80GB HBM3, 0, 4, 81559"
"""


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that names three GPUs."""
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")


@pytest.fixture
def on_processors(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without GPUs, on which a process of a job runs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code = "import time\nfill = bytes(range(256)) * 400_000\ntime.sleep(600)"
    process = subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True)
    for job in ("dpo-run-7", f"{SWEEP}-3"):
        change(world.service, job, devices="")
    change(world.service, "dpo-run-7", pid=process.pid, supervisor=str(ProcessName.current()))
    yield
    change(world.service, "dpo-run-7", devices="0", pid=None, supervisor=None)
    change(world.service, f"{SWEEP}-3", devices="1")
    process.kill()
    process.wait()


def devices(page: Page) -> list[str]:
    """The texts of the devices, once they are there."""
    expect(page.get_by_role("heading", name="Devices and queue")).to_be_visible()
    return page.get_by_role("list", name="Devices").get_by_role("listitem").all_inner_texts()


@pytest.mark.usefixtures("gpus")
def test_devices_show_their_job_with_use_and_memory(visitor: Visitor, world: World) -> None:
    change(world.service, f"{SWEEP}-3", owner="somebody else")
    try:
        page = visitor.open("")
        first, second, third = devices(page)
    finally:
        change(world.service, f"{SWEEP}-3", owner="anonymous")
    for text in ("GPU 0", "NVIDIA H100 80GB HBM3", "dpo-run-7", "87%", "42.9 GB of 85.5 GB"):
        assert text in first
    assert "a job of another owner" in second
    assert SWEEP not in second
    assert "free" in third
    expect(page.locator("#activity summary")).to_contain_text("2 of 3 GPUs in use")
    expect(page.get_by_role("list", name="Devices").get_by_label("Use: 87%")).to_have_attribute("value", "0.87")
    visitor.must_be_accessible()


@pytest.mark.usefixtures("gpus")
def test_a_picture_of_a_machine_with_gpus(visitor: Visitor) -> None:
    page = visitor.open("?text=granite")
    assert len(devices(page)) == 3
    page.wait_for_load_state("networkidle")
    visitor.must_fit()
    visitor.picture("jobs-gpus", whole=True)


def test_the_queue_is_in_its_order_and_follows(visitor: Visitor, world: World) -> None:
    with world.http() as api:
        for job in ("queue-one", "queue-two"):
            api.post("/jobs", json=BODY | {"job_uuid": job}).raise_for_status()
        page = visitor.open("")
        queue = page.get_by_role("list", name="Queue").get_by_role("listitem")
        expect(queue.filter(has_text="queue-two")).to_have_count(1)
        names = [text.split()[0] for text in queue.all_inner_texts()]
        assert names[-2:] == ["queue-one", "queue-two"]
        api.post("/jobs/queue-one/cancel").raise_for_status()
        expect(queue.filter(has_text="queue-one")).to_have_count(0)
        api.post("/jobs/queue-two/cancel").raise_for_status()
        for job in ("queue-one", "queue-two"):
            api.delete(f"/jobs/{job}").raise_for_status()


@pytest.mark.usefixtures("on_processors")
def test_a_machine_without_gpus_says_so_and_shows_processors_and_memory(visitor: Visitor) -> None:
    page = visitor.open("")
    expect(page.locator("#activity")).to_contain_text("The server found no GPU that jobs may use")
    expect(page.locator("#activity summary")).to_contain_text("no GPU")
    running = page.get_by_role("list", name="Running jobs").get_by_role("listitem").filter(has_text="dpo-run-7")
    expect(running).to_have_text(re.compile(r"[\d.]+ cores?, 1\d\d MB of memory"))
    visitor.must_be_accessible()


def test_a_closed_panel_stays_closed_and_asks_nothing(visitor: Visitor) -> None:
    page = visitor.open("")
    expect(page.get_by_role("list", name="Queue")).to_be_visible()
    page.get_by_role("heading", name="Devices and queue").click()
    expect(page.get_by_role("list", name="Queue")).to_be_hidden()
    page.reload()
    expect(page.locator("#activity summary")).to_contain_text("wait")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/activity" in request.url else None)
    page.wait_for_timeout(6000)
    assert asked == []
    expect(page.get_by_role("list", name="Queue")).to_be_hidden()
