"""The process that renders rows at submission: its start, its environment, and its end with its server's."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from llama_stack_provider_moe.control.server import template_check
from llama_stack_provider_moe.control.server.row_sample import SampledRow
from tests.compute.data.test_template_check import ENDLESS, saved
from tests.control.server.test_template_check import (
    GOOD,
    NOT_CHECKED,
    accepted,
    body,
    child,
    datasets,
    patient,
    with_models,
)
from tests.support.host_support import serving_in_process
from tests.support.jobs_support import wait_for

__all__ = ["patient"]


def processes() -> set[int]:
    """Those that this process has started and that run."""
    return {each.pid for each in psutil.Process().children() if each.status() != psutil.STATUS_ZOMBIE}


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo hello", "its process ended or gave no answer that can be read (ValidationError)"),
        ("exit 3", "its process ended or gave no answer that can be read (EOFError)"),
        ("""echo '{"unavailable": "no trl"}'""", "no trl"),
        ("""echo '{"ready": true}'; exec sleep 60""", "the chat template gave no answer within 0.5 s"),
        ("exec sleep 60", "the process that renders rows is still starting"),
        ("exec head -c 9999999 /dev/zero", "its process ended or gave no answer that can be read (ValueError)"),
        (None, "its process ended or gave no answer that can be read (FileNotFoundError)"),
    ],
)
def test_a_broken_environment_costs_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, why: str
) -> None:
    monkeypatch.setattr(template_check, "LIMIT_S", 0.5 if script is not None and "sleep" in script else 300.0)
    python, before = tmp_path / "python", processes()
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    with serving_in_process(tmp_path, datasets(), training_python=str(python)) as service:
        with_models(service)
        if script is None:
            python.unlink()
        assert accepted(service, body(dataset_id="greets")) == [NOT_CHECKED + why]
    assert processes() <= before


@pytest.mark.usefixtures("patient")
def test_secrets_are_not_in_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "https_proxy", "LC_SECRET")
    for name in secrets:
        monkeypatch.setenv(name, "very-secret")
    given: dict[str, Any] = {"child_secrets": ["WANDB_API_KEY", "LC_SECRET"], "child_env": {"MINE": "very-secret"}}
    with serving_in_process(tmp_path, datasets(), **given) as service:
        with_models(service)
        assert accepted(service, body("free")) == []
        environment = child(service).environ()
    assert "very-secret" not in environment.values()
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert "HF_TOKEN" not in environment


@pytest.mark.usefixtures("patient")
def test_the_server_s_end_ends_it(tmp_path: Path) -> None:
    """Idle, and in an endless template."""
    with serving_in_process(tmp_path / "idle", datasets()) as service:
        with_models(service)
        assert accepted(service, body("free")) == []
        idle = child(service)
    assert not idle.is_running()
    told: list[str] = []
    with serving_in_process(tmp_path / "busy", datasets()) as service:
        with_models(service)
        assert accepted(service, body("free")) == []
        busy, began = child(service), time.monotonic()
        question = template_check.Question(
            model=str(service.config.models_dir / "endless"), name="endless", chat_template=None, rendering={},
            parts={"train": {"kind": "learnt", "rows": [SampledRow(1, GOOD, 9)]}},
        )  # fmt: skip
        checker = service._templates
        waiting = threading.Thread(target=lambda: told.append(str(asyncio.run(checker.check(question)).unavailable)))
        waiting.start()
        worked = busy.cpu_times().user + 0.3
        wait_for(lambda: busy.cpu_times().user > worked)
    waiting.join()
    assert told == ["its process ended or gave no answer that can be read (EOFError)"]
    assert not busy.is_running()
    assert time.monotonic() - began < 90, "the template itself may take 300 s"
    assert asyncio.run(checker.check(question)).unavailable, "a closed one starts no process"
    assert checker.pid is None


def test_a_process_that_never_starts_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 600\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(template_check, "LIMIT_S", 0.5)
    with serving_in_process(tmp_path, datasets(), training_python=str(python)) as service:
        with_models(service)
        assert accepted(service, body()) == [NOT_CHECKED + "the process that renders rows is still starting"]
        first = child(service)
        assert first.is_running(), "it may need longer, and is not started again and again"
        monkeypatch.setattr(template_check, "START_LIMIT_S", 0.1)
        assert accepted(service, body()) == [NOT_CHECKED + "the process that renders rows did not start within 0.1 s"]
        assert not first.is_running()


def test_it_ends_when_its_server_is_killed(tmp_path: Path) -> None:
    """By SIGKILL, in an endless template."""
    folder = saved(tmp_path / "endless", ENDLESS)
    code = f"""
import asyncio, threading
from llama_stack_provider_moe.control.server import template_check as it
from llama_stack_provider_moe.spec.server_config import ProviderConfig
it.LIMIT_S = 300.0
checker = it.TemplateChecker(ProviderConfig(state_dir={str(tmp_path)!r}))
rows = [it.SampledRow(1, {GOOD!r}, 9)]
asyncio.run(checker.check(it.Question(model={str(folder)!r}, name="endless", chat_template=None, rendering={{}},
    parts={{"train": {{"kind": "learnt", "rows": rows}}}})))
"""
    with subprocess.Popen([sys.executable, "-c", code]) as server:
        found = wait_for(lambda: psutil.Process(server.pid).children())[0]
        # Its imports take some seconds of processor time; then only the template does.
        wait_for(lambda: found.cpu_times().user > 1 and found.num_threads() >= 2)
        os.kill(server.pid, signal.SIGKILL)
    gone, left = psutil.wait_procs([found], 120)
    assert (len(gone), left) == (1, [])
