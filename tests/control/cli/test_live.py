"""`moe-train` against a real server and supervisor, with tiny training processes."""

import contextlib
import io
import itertools
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama_stack_provider_moe.control.cli.client import state_of
from llama_stack_provider_moe.control.cli.exits import Exit
from tests.support import host_harness
from tests.support.cli_support import MOE_TRAIN, moe_train, template_at
from tests.support.host_harness import QUICKSTART, run_config, serving
from tests.support.jobs_support import TINY_CHILD, wait_for

# A training process that does what the name of the job's model says.
PLANS: dict[str, dict[str, Any]] = {
    "plan/completes": {"steps": 3, "step_s": 0.2},
    "plan/fails": {"steps": 1, "end": "failed"},
    "plan/goes-on": {"steps": 5000, "step_s": 0.05},
    "plan/talks": {"steps": 30, "step_s": 0.1, "print_bytes": 50_000},
}
PLANNED_CHILD = """
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[-1])
plan = json.loads(PLANS)[json.loads((folder / "spec.json").read_text())["model"]]
(folder / "child.json").write_text(json.dumps(plan))
os.execv(sys.executable, [sys.executable, "-S", TINY_CHILD, str(folder)])
"""


@pytest.fixture(scope="module")
def yaml_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    child, interpreter = folder / "planned.py", folder / "python"
    child.write_text(f"PLANS = {json.dumps(PLANS)!r}\nTINY_CHILD = {str(TINY_CHILD)!r}\n{PLANNED_CHILD}")
    interpreter.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{child}" "$3"\n')
    interpreter.chmod(0o755)
    limits = {"start": False, "poll_s": 0.05, "idle_exit_s": 0, "max_concurrent_jobs": 4}
    return run_config(QUICKSTART, folder, provider={"training_python": str(interpreter), "supervisor": limits})


@pytest.fixture(scope="module")
def server(yaml_file: Path) -> Iterator[host_harness.Server]:
    """A server without a supervisor; every command finds it through MOE_TRAIN_URL."""
    rows = [{"prompt": f"What is {number}?", "completion": "A number."} for number in range(8)]
    bad = [*rows, {"prompt": "And this?"}, {"prompt": "", "completion": "Nothing."}]
    with serving(yaml_file, yaml_file.parent / "state") as running, pytest.MonkeyPatch.context() as patch:
        for name, content in (("rows", rows), ("bad-rows", bad)):
            source = {"type": "rows", "rows": content}
            body = {"dataset_id": name, "purpose": "post-training/messages", "source": source}
            httpx.post(running.url + "/v1beta/datasets", json=body, timeout=60).raise_for_status()
        patch.setenv("MOE_TRAIN_URL", running.url)
        yield running


@pytest.fixture(scope="module")
def supervised(server: host_harness.Server, yaml_file: Path) -> Iterator[host_harness.Server]:
    """The same server while `moe-train supervisor` runs."""
    environment = {**os.environ, "MOE_STATE_DIR": str(server.state_dir)}
    command = [*MOE_TRAIN, "supervisor", "--run-config", str(yaml_file), "--json"]
    with (server.state_dir / "supervisor.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment)
    assert process.stdout is not None
    try:
        assert json.loads(process.stdout.readline()) == {"pid": process.pid, "state_dir": str(server.state_dir)}
        yield server
        assert process.poll() is None, "idle_exit_s is 0, but nobody would start it again"
        process.terminate()
        assert process.wait(timeout=300) == Exit.OK
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def template(tmp_path: Path) -> Path:
    return template_at(tmp_path)


# Before there is a supervisor: jobs wait.


def test_a_waiting_job_and_its_cancel(server: host_harness.Server, template: Path) -> None:
    made = moe_train("submit", str(template), "--set", "job_uuid=waits")
    assert (made.code, made.out) == (Exit.OK, "job waits is scheduled\n")
    assert "moe-train status waits --watch" in made.err
    assert "moe-train cancel waits" in made.err
    waiting = moe_train("status", "waits")
    assert waiting.code == Exit.OK
    assert "scheduled (queued), number 1 in the queue" in waiting.out
    report = "report: moe-train report job waits -o report.html"
    assert moe_train("artifacts", "waits").out == f"no artifacts\n{report}\n"
    assert moe_train("logs", "waits") == (Exit.OK, "", "no output yet\n")

    assert moe_train("cancel", "waits") == (Exit.OK, "job waits is cancelled\n", "")
    again = moe_train("cancel", "waits", "--json")
    assert (again.code, again.document) == (Exit.OK, {"job_uuid": "waits", "status": "cancelled"})
    for options in ([], ["--watch"], ["--json"], ["--watch", "--json"]):
        assert moe_train("status", "waits", *options).code == Exit.CANCELLED, options
    assert moe_train("logs", "waits", "--follow").code == Exit.CANCELLED


def test_validate_creates_nothing(server: host_harness.Server, template: Path) -> None:
    before = moe_train("ls", "--json").document
    changes = ["--set", "training.n_epochs=3", "--set", "job_uuid=not-made"]
    told = moe_train("validate", str(template), *changes)
    assert told.code == Exit.OK
    assert told.out.startswith("valid; nothing was created. 8 training rows, of which 10% will be held out.")
    document = moe_train("validate", str(template), *changes, "--json").document
    assert document["spec"]["training"]["n_epochs"] == 3
    assert json.loads(told.out.partition("\n")[2]) == document["spec"]
    dry = ["submit", str(template), *changes, "--dry-run"]
    assert moe_train(*dry).out == told.out
    assert moe_train(*dry, "--label", "team=a", "--note", "first").code == Exit.OK
    assert moe_train(*dry, "--label", "te am=a").code == Exit.REFUSED
    assert "--follow: '--dry-run' is not valid" in moe_train(*dry, "--follow").err
    for command in (["validate"], ["submit", "--dry-run"]):
        wrong = moe_train(*command, str(template), "--set", "optimizer.lr=-1")
        assert (wrong.code, "optimizer.lr: -1 is not valid" in wrong.err) == (Exit.REFUSED, True)
    assert moe_train("ls", "--json").document == before


def test_listing_in_pages(server: host_harness.Server, template: Path) -> None:
    for name in ("page-1", "page-2"):
        moe_train("submit", str(template), "--set", f"job_uuid={name}")
        moe_train("cancel", name)
    first = moe_train("ls", "--limit", "1")
    assert [line.split()[:4] for line in first.out.splitlines()[1:2]] == [
        ["page-2", "cancelled", "sft", "plan/completes"]
    ]
    assert first.out.splitlines()[-1] == "there are more: moe-train ls --after page-2"
    assert moe_train("ls", "--after", "page-2", "--limit", "1", "--json").document["data"][0]["job_uuid"] == "page-1"


def test_a_template_from_standard_input(
    server: host_harness.Server, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(template.read_bytes())))
    assert moe_train("validate", "-", "--json").document["spec"]["model"] == "plan/completes"


def test_a_refusal_is_shown_in_full(server: host_harness.Server, template: Path) -> None:
    changes = ["--set", "training.batch_sise=2", "--set", "optimizer.lr=-1", "--set", "unheard.of=true"]
    fields = moe_train("submit", str(template), *changes)
    assert fields.code == Exit.REFUSED
    assert fields.err.splitlines() == [
        "moe-train: training.batch_sise: unknown key (did you mean batch_size?)",
        "  optimizer.lr: -1 is not valid; expected > 0",
        "  unheard: unknown key; expected labels, note, job_uuid, model, model_from, resources, eval, loader, data, "
        "training, optimizer, efficiency, adapter, moe, trackers, checkpoint_dir, export, notify, metadata, recipe, "
        "options, distill",
    ]
    rows = moe_train("validate", str(template), "--set", "data.dataset_id=bad-rows")
    assert rows.code == Exit.REFUSED
    assert rows.err.splitlines() == [
        "moe-train: dataset 'bad-rows': 2 problem(s) in 10 row(s):",
        "  row 9: completion: is missing beside 'prompt'",
        "  row 10: prompt: is empty",
    ]
    as_json = moe_train("submit", str(template), *changes, "--json")
    assert (as_json.code, as_json.out, as_json.error["status"]) == (Exit.REFUSED, "", 400)
    assert as_json.error["message"].startswith("training.batch_sise: unknown key")


@pytest.mark.parametrize("command", ["status", "logs", "cancel", "artifacts", "resume", "rm"])
@pytest.mark.parametrize("name", ["nobody", "../jobs", "a/b", ".."])
def test_jobs_that_do_not_exist(server: host_harness.Server, command: str, name: str) -> None:
    done = moe_train(command, name, "--json")
    assert (done.code, done.out, done.error["exit_code"]) == (Exit.REFUSED, "", 2)
    assert repr(name) in done.error["message"]


# While `moe-train supervisor` runs.


def test_a_completed_job(supervised: host_harness.Server, template: Path) -> None:
    followed = moe_train("submit", str(template), "--follow", "--set", "job_uuid=good")
    assert (followed.code, followed.err) == (Exit.OK, "")
    assert re.search(r"^good: completed after \d+s$", followed.out, re.MULTILINE)
    assert "saved adapter good/adapter-0" in followed.out
    status = moe_train("status", "good")
    assert status.code == Exit.OK
    assert "completed, step 3 of 3, loss 0.3333" in status.out
    artifacts = moe_train("artifacts", "good")
    assert artifacts.out.splitlines()[1].split()[:2] == ["good/adapter-0", "adapter"]
    assert artifacts.out.splitlines()[1].endswith(str(supervised.state_dir / "jobs/good/artifacts/adapter-0"))
    assert moe_train("artifacts", "good", "--json").document["checkpoints"][0]["identifier"] == "good/adapter-0"
    assert moe_train("cancel", "good").code == Exit.REFUSED


def test_a_followed_job_in_json(supervised: host_harness.Server, template: Path) -> None:
    done = moe_train("submit", str(template), "--follow", "--json")
    created, *statuses = done.lines
    assert (done.code, done.err) == (Exit.OK, "")
    assert list(created) == ["job_uuid"]
    assert {each["job_uuid"] for each in statuses} == {created["job_uuid"]}
    assert statuses[-1]["status"] == "completed"
    assert not any(state_of(each).ended for each in statuses[:-1])
    assert all(one != other for one, other in itertools.pairwise(statuses))


def test_a_failed_job(supervised: host_harness.Server, template: Path) -> None:
    followed = moe_train("submit", str(template), "--follow", "--set", "model=plan/fails", "--set", "job_uuid=bad")
    assert followed.code == Exit.FAILED
    assert "the rows of this job are too strange" in followed.out
    status = moe_train("status", "bad", "--json")
    assert (status.code, status.document["reason"]) == (Exit.FAILED, "the rows of this job are too strange")


def test_output_is_followed_whole(supervised: host_harness.Server, template: Path) -> None:
    moe_train("submit", str(template), "--set", "model=plan/talks", "--set", "job_uuid=talks")
    output = supervised.state_dir / "jobs/talks/output.log"
    wait_for(lambda: output.exists() and output.stat().st_size > 50_000)
    pieces = moe_train("logs", "talks", "--follow", "--tail", "10000", "--json")
    assert pieces.code == Exit.OK, "it ends as the job ends"
    assert [line for piece in pieces.lines for line in piece["log_lines"]] == output.read_text().splitlines()
    assert moe_train("logs", "talks", "--tail", "10000").out == output.read_text()
    assert len(moe_train("logs", "talks", "--tail", "3").out.splitlines()) == 3
    assert moe_train("status", "talks").code == Exit.OK


def test_ctrl_c_leaves_the_job_running(supervised: host_harness.Server, template: Path) -> None:
    """On a terminal, with its live bar."""
    words = ["submit", str(template), "--follow", "--set", "model=plan/goes-on", "--set", "job_uuid=goes-on"]
    main_end, its_end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "MOE_TRAIN_URL": "http://127.0.0.1:1"}
    process = subprocess.Popen(
        [*MOE_TRAIN, *words, "--url", supervised.url], stdout=its_end, stderr=subprocess.PIPE, env=environment
    )
    os.close(its_end)
    seen = b""
    while not re.search(rb"training.* of 5000.*loss 0\.", seen):
        seen += os.read(main_end, 65536)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # how Linux reports that the other end of a terminal is closed
        while os.read(main_end, 65536):
            pass
    _, err = process.communicate(timeout=300)
    os.close(main_end)
    assert process.returncode == Exit.INTERRUPTED
    told = err.decode()
    assert f"moe-train status goes-on --watch --url {supervised.url}" in told
    assert f"moe-train cancel goes-on --url {supervised.url}" in told
    assert "Traceback" not in told

    assert moe_train("status", "goes-on", "--json").document["status"] == "in_progress"
    assert "after its current step" in moe_train("cancel", "goes-on").out
    watched = moe_train("status", "goes-on", "--watch")
    assert watched.code == Exit.CANCELLED
    assert "goes-on: cancelled" in watched.out
    assert "after saving a checkpoint" in watched.out


def test_a_closed_pipe_is_not_a_failed_job(supervised: host_harness.Server, template: Path) -> None:
    process = subprocess.Popen([*MOE_TRAIN, "ls"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (Exit.PIPE_CLOSED, b"")
