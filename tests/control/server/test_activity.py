"""`GET activity` and `moe-train top`: what runs with use and memory, the queue, and nothing of strangers."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from llama_stack_provider_moe.control.cli import top
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.supervisor import machine_use
from llama_stack_provider_moe.control.supervisor.processes import ProcessName, birth
from tests.support.cli_support import moe_train
from tests.support.host_support import ask, caller, over_http, serving_in_process, submit
from tests.support.jobs_support import wait_for

SMI = """#!/bin/sh
echo "0, GPU-aaaa, NVIDIA H100 80GB HBM3, 87, 40960, 81559"
echo "1, GPU-bbbb, NVIDIA H100 80GB HBM3, 0, 4, 81559"
echo "2, GPU-cccc, NVIDIA H100 80GB HBM3, [N/A], [N/A], 81559"
"""
BUSY = "import time\nfill = bytes(range(256)) * 400000\nwhile True: pass"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path) as made:
        yield made


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(SMI)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")


@pytest.fixture
def busy() -> Iterator[int]:
    """A process that leads a session and keeps a core and 100 MB busy."""
    process = subprocess.Popen([sys.executable, "-S", "-c", BUSY], start_new_session=True)
    try:
        seen = psutil.Process(process.pid)
        wait_for(lambda: seen.memory_info().rss > 110_000_000)
        wait_for(lambda: seen.cpu_times().user > 0.3)
        yield process.pid
    finally:
        process.kill()
        process.wait()


@pytest.mark.usefixtures("gpus")
def test_devices_show_their_job_and_what_others_have_is_only_taken(service: PostTrainingService) -> None:
    with caller("ann"):
        mine = submit(service)
    with caller("bob"):
        theirs = submit(service)
    for _ in range(2):
        assert service.store.claim("me", ["0", "1", "2"]) is not None
    with caller("ann"):
        found = ask(service, "GET", "/activity").json()
    assert [(each["device"], each["job_uuid"], each["is_taken"]) for each in found["devices"]] == [
        ("0", mine, True), ("1", None, True), ("2", None, False)
    ]  # fmt: skip
    first, _, last = found["devices"]
    assert (first["use"], first["memory_bytes"], first["total_bytes"]) == (0.87, 40960 << 20, 81559 << 20)
    assert (last["use"], last["memory_bytes"]) == (None, None), "what the driver does not say is not shown as zero"
    assert theirs not in json.dumps(found)
    assert [each["job_uuid"] for each in found["running"]] == [mine]


def test_processes_of_a_job_are_measured(service: PostTrainingService, busy: int) -> None:
    job = submit(service)
    assert service.store.claim(str(ProcessName.current())) is not None
    service.store.launched(job, busy, birth(busy))

    def measured() -> dict[str, Any]:
        (running,) = ask(service, "GET", "/activity").json()["running"]
        return dict(running)

    running = measured()
    assert running["processes"] == 1
    assert running["memory_bytes"] > 100_000_000
    wait_for(lambda: measured()["cpu"] > 0.02)  # in a quarter second of a busy machine, it may get none


def test_a_process_of_another_machine_is_not_taken_for_one_of_this(service: PostTrainingService, busy: int) -> None:
    job = submit(service)
    assert service.store.claim("elsewhere/boot/ns/1/1.0") is not None
    service.store.launched(job, busy, birth(busy))
    (running,) = ask(service, "GET", "/activity").json()["running"]
    assert (running["processes"], running["cpu"], running["memory_bytes"]) == (None, None, None)


def test_the_queue_is_in_its_order_and_counted(service: PostTrainingService) -> None:
    jobs = [submit(service) for _ in range(52)]
    service.store.claim("me")
    service.store.requeue(jobs[0], "killed")  # it comes first again
    found = ask(service, "GET", "/activity").json()
    assert [(each["position"], each["job_uuid"]) for each in found["waiting"]] == list(enumerate(jobs[:50], 1))
    assert found["more_waiting"] == 2


def test_without_a_driver_there_are_no_gpus(tmp_path: Path) -> None:
    assert machine_use.gpus(str(tmp_path)) == []


@pytest.mark.usefixtures("gpus")
def test_the_command(service: PostTrainingService, monkeypatch: pytest.MonkeyPatch) -> None:
    running, waiting = submit(service), submit(service)
    assert service.store.claim("me", ["0"]) is not None
    with over_http(service) as url:
        monkeypatch.setenv("MOE_TRAIN_URL", url)
        shown = moe_train("top").out
        lines = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
        assert "NVIDIA H100 80GB HBM3" in lines["0"]
        assert "87%" in lines["0"]
        assert running in lines["0"]
        assert waiting in shown
        assert moe_train("top", "--json").document["waiting"][0]["position"] == 1
    assert top.shown({"devices": [], "running": [], "waiting": [], "more_waiting": 0}) is not None
