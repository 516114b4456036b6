"""`moe-train` against a real server and supervisor, with tiny training processes; transport failures are staged."""

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
from typing import Any, NamedTuple

import httpx
import pytest

from llama_stack_provider_moe.cli import commands, follow, screen, views
from llama_stack_provider_moe.cli.exits import OUTCOMES, Exit, exit_of
from llama_stack_provider_moe.cli.follow import Follower
from llama_stack_provider_moe.cli.run_config import read_run_config, substituted
from llama_stack_provider_moe.cli.server import Server, state_of
from llama_stack_provider_moe.cli.template import read_template
from llama_stack_provider_moe.errors import InvalidInput, InvalidRows, MoeError, RowProblem, ServerLost, ServerRefused
from llama_stack_provider_moe.jobs.state import JobState
from tests import host_harness
from tests.host_harness import QUICKSTART, free_port, run_config, serving
from tests.jobs_support import TINY_CHILD, wait_for

# A training process that does what the job's model says.
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
MOE_TRAIN = [sys.executable, "-c", "import sys; from llama_stack_provider_moe.cli import main; sys.exit(main())"]


class Done(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def error(self) -> Any:
        return json.loads(self.err)["error"]


def moe_train(*words: str) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = commands.main(list(words))
        except SystemExit as left:
            code = int(left.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


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
    """A server without a supervisor, which every command finds by MOE_TRAIN_URL."""
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
    """The same server with `moe-train supervisor` at work."""
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
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"recipe": "sft", "model": "plan/completes", "data": {"dataset_id": "rows"}}))
    return path


# Before there is a supervisor: jobs wait.


def test_a_waiting_job_and_its_cancel(server: host_harness.Server, template: Path) -> None:
    made = moe_train("submit", str(template), "--set", "job_uuid=waits")
    assert (made.code, made.out) == (Exit.OK, "job waits is scheduled\n")
    assert "moe-train status waits --watch" in made.err
    assert "moe-train cancel waits" in made.err
    waiting = moe_train("status", "waits")
    assert waiting.code == Exit.OK
    assert "scheduled (queued), number 1 in the queue" in waiting.out
    assert moe_train("artifacts", "waits").out == "no artifacts\n"
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


def test_what_the_server_refuses_is_told_whole(server: host_harness.Server, template: Path) -> None:
    changes = ["--set", "training.batch_sise=2", "--set", "optimizer.lr=-1", "--set", "nothing.here=true"]
    fields = moe_train("submit", str(template), *changes)
    assert fields.code == Exit.REFUSED
    assert fields.err.splitlines() == [
        "moe-train: training.batch_sise: unknown key (did you mean batch_size?)",
        "  optimizer.lr: -1 is not valid; expected > 0",
        "  nothing: unknown key; expected job_uuid, model, data, training, optimizer, efficiency, adapter, moe, "
        "checkpoint_dir, recipe, options",
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
def test_jobs_that_are_not_there(server: host_harness.Server, command: str, name: str) -> None:
    done = moe_train(command, name, "--json")
    assert (done.code, done.out, done.error["exit_code"]) == (Exit.REFUSED, "", 2)
    assert repr(name) in done.error["message"]


# With `moe-train supervisor` at work.


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
    with contextlib.suppress(OSError):  # how Linux tells that the other end of a terminal is closed
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
    assert "after the step at hand" in moe_train("cancel", "goes-on").out
    watched = moe_train("status", "goes-on", "--watch")
    assert watched.code == Exit.CANCELLED
    assert "goes-on: cancelled" in watched.out
    assert "after saving a checkpoint" in watched.out


def test_a_closed_pipe_is_no_failed_job(supervised: host_harness.Server, template: Path) -> None:
    process = subprocess.Popen([*MOE_TRAIN, "ls"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (Exit.PIPE_CLOSED, b"")


# Mistakes in the command line.


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["submit", "no-such-file.json"], "No such file"),
        (["submit", "."], "directory"),
        (["validate", "{folder}/broken.json"], "JSON"),
        (["validate", "{folder}/list.json"], "this is a list"),
        (["validate", "{folder}/twice.json"], "'lr' stands twice"),
        (["validate", "{folder}/nan.json"], "NaN is no JSON value"),
        (["validate", "{folder}/job.json", "--set", "training.n_epochs"], "block.field=value"),
        (["validate", "{folder}/job.json", "--set", ".lr=1"], "block.field=value"),
        (["validate", "{folder}/job.json", "--set", "model.lr=1"], "model is text"),
        (["ls", "--url", "localhost:8321"], "http://127.0.0.1:8321"),
        (["ls", "--url", "http://"], "http://127.0.0.1:8321"),
        (["ls", "--api-key", "k\ney"], "not shown"),
        (["ls", "--limit", "0"], "--limit"),
        (["status"], "ID"),
        (["status", ""], "ID"),
        (["train"], "train"),
        (["supervisor", "--run-config", "no-such-file.yaml"], "No such file"),
        (["supervisor", "--run-config", "{folder}/job.json"], "providers.post_training"),
    ],
)
def test_mistakes_are_refused(words: list[str], says: str, tmp_path: Path, template: Path) -> None:
    (tmp_path / "broken.json").write_text('{"recipe": ')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "twice.json").write_text('{"optimizer": {"lr": 1, "lr": 2}}')
    (tmp_path / "nan.json").write_text('{"beta": NaN}')
    words = [word.replace("{folder}", str(tmp_path)) for word in words]
    told = moe_train(*words)
    assert (told.code, told.out) == (Exit.REFUSED, "")
    assert says in " ".join(told.err.split())
    as_json = moe_train(*words, "--json")
    assert (as_json.code, as_json.out, as_json.error["exit_code"]) == (Exit.REFUSED, "", 2)
    assert says in as_json.error["message"]


@pytest.mark.parametrize(
    ("change", "path", "value"),
    [
        ("training.n_epochs=3", ["training", "n_epochs"], 3),
        ("optimizer.lr=2e-5", ["optimizer", "lr"], 2e-5),
        ("data.shuffle=false", ["data", "shuffle"], False),
        ("adapter=null", ["adapter"], None),
        ("adapter.rank=8", ["adapter", "rank"], 8),
        ('adapter.lora_attn_modules=["q_proj"]', ["adapter", "lora_attn_modules"], ["q_proj"]),
        ("model=owner/name=x", ["model"], "owner/name=x"),
        ("data.dataset_id=plain text", ["data", "dataset_id"], "plain text"),
        ('data.dataset_id="42"', ["data", "dataset_id"], "42"),
        ("optimizer.lr=NaN", ["optimizer", "lr"], "NaN"),
        ("data.dataset_id=", ["data", "dataset_id"], ""),
    ],
)
def test_a_change_changes_that_value_alone(change: str, path: list[str], value: Any, tmp_path: Path) -> None:
    body = {"model": "m", "adapter": None, "data": {"dataset_id": "d"}, "training": {"batch_size": 2}}
    (tmp_path / "job.json").write_text(json.dumps(body))
    changed = read_template(str(tmp_path / "job.json"), [change])
    found: Any = changed
    for key in path:
        found = found[key]
    assert found == value
    assert type(found) is type(value)
    block: Any = body
    for key in path[:-1]:
        if block.get(key) is None:
            block[key] = {}
        block = block[key]
    block[path[-1]] = value
    assert changed == body


# No server, or one that stops answering.


def test_no_server(template: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for words in (["ls"], ["submit", str(template)], ["status", "x", "--watch"], ["logs", "x", "--follow"]):
        done = moe_train(*words, "--url", url)
        assert (done.code, done.out) == (Exit.LOST, "")
        assert done.err.startswith(f"moe-train: no server answers at {url}")
        assert "was created" not in done.err
        assert moe_train(*words, "--url", url, "--json").error["exit_code"] == 4


def answering(*answers: Any) -> tuple[Server, list[httpx.Request]]:
    """A server that gives `answers`, one a request; the last one again and again."""
    waiting, asked = list(answers), []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        given = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        if isinstance(given, Exception):
            raise given
        return httpx.Response(200, json=given) if isinstance(given, dict) else given

    return Server("http://example.test/", "secret", httpx.MockTransport(answer)), asked


def a_status(state: str = "in_progress", **resources: Any) -> dict[str, Any]:
    return {
        "job_uuid": "j", "status": state, "scheduled_at": "2025-01-01T10:00:00Z", "started_at": "2025-01-01T10:00:00Z",
        "completed_at": "2025-01-01T11:30:05Z", "checkpoints": [],
        "resources_allocated": {"stage": "training", "step": None, "max_steps": None, **resources},
    }  # fmt: skip


DROPPED = httpx.ReadError("connection reset")
GATEWAY = httpx.Response(502, text="<html>bad gateway</html>")


def test_an_outage_is_waited_out() -> None:
    server, _ = answering(a_status(), DROPPED, GATEWAY, a_status(), a_status(step=1, max_steps=2), a_status("failed"))
    notes: list[str] = []
    seen = list(Follower(server, "j", notes.append, poll_s=0.001, patience_s=30).statuses())
    assert [each["status"] for each in seen] == ["in_progress", "in_progress", "failed"]
    assert len(notes) == 2
    assert "trying again" in notes[0]
    assert notes[1] == "the server answers again"


class Clock:
    """Time that passes by sleeping alone: a slow machine asks as often as a fast one."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("answer", [DROPPED, GATEWAY, httpx.ConnectTimeout("too long")])
def test_a_longer_outage_is_not(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "time", Clock())
    server, asked = answering(a_status(), answer)
    with pytest.raises(MoeError) as raised:
        list(Follower(server, "j", print, poll_s=1, patience_s=5).statuses())
    assert exit_of(raised.value) is Exit.LOST
    assert len(asked) == 1 + 6  # an answer, then a look each second from 0 to 5


@pytest.mark.parametrize("answer", [DROPPED, GATEWAY])
def test_the_first_look_is_not_repeated(answer: Any) -> None:
    server, asked = answering(answer)
    with pytest.raises((ServerLost, ServerRefused)):
        list(Follower(server, "j", print, poll_s=0.001, patience_s=30).statuses())
    assert len(asked) == 1


def test_a_refusal_while_following_is_one() -> None:
    server, _ = answering(a_status(), httpx.Response(404, json={"error": {"message": "no job 'j'"}}))
    with pytest.raises(ServerRefused, match="no job 'j'") as raised:
        list(Follower(server, "j", print, poll_s=0.001).statuses())
    assert exit_of(raised.value) is Exit.REFUSED


def test_a_lost_answer_to_a_submission_is_not_repeated(template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, asked = answering(httpx.RemoteProtocolError("server disconnected"))
    monkeypatch.setattr(commands, "Server", lambda url, key: server)
    done = moe_train("submit", str(template), "--json")
    assert (done.code, done.out, len(asked)) == (Exit.LOST, "", 1)
    assert done.error["hints"] == ["whether the job was created, this tells: moe-train ls --url http://example.test"], (
        "a second try might make a second job"
    )


@pytest.mark.parametrize(
    ("answer", "code", "says"),
    [
        (httpx.Response(500, json={"error": {"message": "its log says what"}}), Exit.LOST, "its log says what"),
        (httpx.Response(503, text="starting"), Exit.LOST, "503"),
        (httpx.Response(501, json={"error": {"message": "not offered"}}), Exit.REFUSED, "not offered"),
        (httpx.Response(409, json={"error": {"message": "is taken"}}), Exit.REFUSED, "is taken"),
        (httpx.Response(401, json={"error": {"message": "who?"}}), Exit.REFUSED, "who?; give --api-key"),
        (httpx.Response(404, json={"detail": "Not Found"}), Exit.REFUSED, "no Llama Stack server with provider"),
        (httpx.Response(200, text="<html>welcome</html>"), Exit.REFUSED, "is it the right server?"),
        (httpx.Response(200, json={**a_status("dreaming")}), Exit.REFUSED, "'dreaming'"),
    ],
)
def test_answers_and_exit_codes(answer: httpx.Response, code: Exit, says: str) -> None:
    server, asked = answering(answer)
    with pytest.raises(MoeError) as raised:
        state_of(server.status("j"))
    assert exit_of(raised.value) is code
    assert says in str(raised.value)
    assert asked[0].headers["Authorization"] == "Bearer secret"
    assert str(asked[0].url) == "http://example.test/v1alpha/post-training/jobs/j/status"


def test_every_state_has_an_outcome() -> None:
    assert set(OUTCOMES) == set(JobState)
    assert {state for state, code in OUTCOMES.items() if code is not Exit.OK} == {JobState.FAILED, JobState.CANCELLED}


def test_a_body_goes_out_whatever_it_holds() -> None:
    server, asked = answering({"job_uuid": "j"})
    body = {"model": "half a pair: \ud800", "data": {"dataset_id": "größer"}}
    server.submit(body)
    assert json.loads(asked[0].content) == body


# What is shown.


def test_lines_of_a_followed_job(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    evaluations = {
        name: {"step": step, "epoch": 0.0, "metrics": {"loss": loss, "rewards/accuracies": accuracy}}
        for name, step, loss, accuracy in [("first", 0, 0.6937, 0.5), ("last", 4, 0.41, 0.875)]
    }
    first = {"first": evaluations["first"], "last": evaluations["first"]}
    steps = [
        a_status(step=step, max_steps=4, metrics={"loss": "NaN" if step == 3 else 1 / step}, eta_s=247.0,
                 evaluation=first) for step in (1, 2, 3)
    ]  # fmt: skip
    monkeypatch.setattr(views, "STEP_LINE_S", 0.0)
    with views.view(screen.Screen(as_json=False)) as shown:
        for status in [a_status(stage="loading"), *steps, a_status("completed", evaluation=evaluations)]:
            shown.show(status)
    assert capsys.readouterr().out.splitlines() == [
        "j: in_progress (loading)",
        "held out at step 0: loss 0.6937, reward accuracy 0.5",
        "j: in_progress (training), step 1 of 4, loss 1, ETA 4m07s",
        "j: in_progress (training), step 2 of 4, loss 0.5, ETA 4m07s",
        "j: in_progress (training), step 3 of 4, loss NaN, ETA 4m07s",
        "held out at step 4: loss 0.41, reward accuracy 0.875",
        "j: completed after 1h30m",
        "held out: loss 0.6937 -> 0.41, reward accuracy 0.5 -> 0.875",
    ]


def test_steps_do_not_flood_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with views.view(screen.Screen(as_json=False)) as shown:
        for step in range(1, 1000):
            shown.show(a_status(step=step, max_steps=1000))
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_problems_are_a_line_each_and_none_is_lost() -> None:
    found = [RowProblem(3, "prompt", "is empty"), RowProblem(17, "chosen", "is missing; a row has prompt, chosen")]
    message = str(InvalidRows("d; e", found, count=25, total_rows=400))
    assert screen.problems(message) == [
        "dataset 'd; e': 25 problem(s) in 400 row(s):", "row 3: prompt: is empty",
        "row 17: chosen: is missing; a row has prompt, chosen", "and 23 more",
    ]  # fmt: skip
    assert screen.problems("training.lr: -1 is not valid; expected > 0") == [
        "training.lr: -1 is not valid; expected > 0"
    ]


def test_a_terminal_obeys_nothing_that_a_server_says(capsys: pytest.CaptureFixture[str]) -> None:
    shown = screen.Screen(as_json=False)
    shown.say("\x1b]0;title\x07[bold]loss[/bold] \x1b[2J:warning:")
    shown.print(["\x1b[31mred\x1b[0m"])
    assert capsys.readouterr().out == "[bold]loss[/bold] :warning:\nred\n"


# A run YAML, as the host reads it.

ENVIRONMENT = {"MOE_T_DIR": "~/dir", "MOE_T_NUMBER": "3", "MOE_T_FALSE": "False", "MOE_T_EMPTY": ""}
# What `replace_env_vars` of llama-stack 0.6.1, a frozen release, makes of each; HOME is /home/me.
REFERENCES: list[tuple[Any, Any]] = [
    ("plain", "plain"),
    ("${env.MOE_T_DIR}", "/home/me/dir"),
    ("${env.MOE_T_UNSET:=~/default}", "/home/me/default"),
    ("${env.MOE_T_EMPTY:=full}", "full"),
    ("${env.MOE_T_NUMBER}", 3),
    ("${env.MOE_T_NUMBER:=7}", 3),
    ("${env.MOE_T_UNSET:=0.5}", 0.5),
    ("${env.MOE_T_UNSET:=}", None),
    ("${env.MOE_T_FALSE}", False),
    ("${env.MOE_T_DIR:+is set}", "is set"),
    ("${env.MOE_T_UNSET:+is set}", None),
    ("${env.MOE_T_DIR:+}", None),
    ("a ${env.MOE_T_NUMBER} b ${env.MOE_T_UNSET:=c}", "a 3 b c"),
    ("sqlite:///${env.MOE_T_DIR}/x.db", "sqlite:////home/me/dir/x.db"),
    ("~/not touched", "~/not touched"),
    ("${env.lower}", "${env.lower}"),
    ("$MOE_T_NUMBER", "$MOE_T_NUMBER"),
    (5, 5),
    (None, None),
    (True, True),
]


@pytest.mark.parametrize(("written", "filled"), REFERENCES, ids=[str(written) for written, _ in REFERENCES])
def test_references_are_filled_in_as_the_host_does(written: Any, filled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    found = substituted({"a": [{"b": written}]}, ENVIRONMENT)
    assert found == {"a": [{"b": filled}]}
    assert type(found["a"][0]["b"]) is type(filled)


@pytest.mark.parametrize("path", sorted(QUICKSTART.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_our_run_configs_are_read(path: Path, tmp_path: Path) -> None:
    config = read_run_config(path, None, {"MOE_STATE_DIR": str(tmp_path)})
    assert config.state_dir == tmp_path.resolve()


@pytest.mark.parametrize(
    ("settings", "provider_id", "says"),
    [
        ("{state_dir: '${env.MOE_T_UNSET}'}", None, "MOE_T_UNSET"),
        ("{supervisor: {poll_s: -1}, stat_dir: x}", None, "supervisor.poll_s.*stat_dir"),
        ("{}", "other", "'moe'"),
    ],
)
def test_a_run_config_that_will_not_do(settings: str, provider_id: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    entry = f"{{provider_id: moe, provider_type: 'inline::moe', config: {settings}}}"
    path.write_text(f"providers: {{post_training: [{{provider_id: x, provider_type: 'inline::other'}}, {entry}]}}")
    with pytest.raises(InvalidInput, match=says):
        read_run_config(path, provider_id, {})


# Without torch, and without what is slow.


def test_upcycling_needs_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    done = moe_train("upcycle", "SOURCE", "OUT", "--experts", "4")
    assert (done.code, done.out) == (Exit.REFUSED, "")
    assert "pip install 'llama-stack-provider-moe[train]' (this one lacks torch)" in done.err


@pytest.mark.parametrize("code", [0, 1, 2])
def test_upcycling_is_another_process(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which gets all that was typed, `--help` too; here it is one that tells what it got."""
    stream = 1 if code == 0 else 2
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\necho "got: $*" >&{stream}\nexit {code}\n')
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    got = "got: -m llama_stack_provider_moe.experts.upcycle A B --experts 4 --help"
    done = moe_train("upcycle", "A", "B", "--experts", "4", "--json", "--help")
    assert done.code == code
    if code == 0:
        assert (done.document, done.err) == ({"report": [got]}, "")
    else:
        assert (done.out, done.error) == ("", {"message": got, "exit_code": code})


def test_a_client_loads_nothing_that_is_slow() -> None:
    code = (
        "import sys\nfrom llama_stack_provider_moe.cli import main\nmain(['ls', '--json', '--url', 'nowhere'])\n"
        "slow = {'torch', 'sqlalchemy', 'fastapi', 'yaml', 'llama_stack'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(slow)}' if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
