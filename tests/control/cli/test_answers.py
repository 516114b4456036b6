"""What `moe-train` does with answers and without one, and what it shows; the server is simulated."""

import io
import json
import re
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from llama_stack_provider_moe.control.cli import act, follow, screen, show, views
from llama_stack_provider_moe.control.cli.client import SILENCE_S, Client, state_of
from llama_stack_provider_moe.control.cli.exits import OUTCOMES, Exit, exit_of
from llama_stack_provider_moe.control.cli.follow import Follower
from llama_stack_provider_moe.errors import InvalidRows, MoeError, RowProblem, ServerLost, ServerRefused
from llama_stack_provider_moe.jobdir.state import JobState
from tests.support.cli_support import moe_train, template_at
from tests.support.free_ports import free_port


@pytest.fixture
def template(tmp_path: Path) -> Path:
    return template_at(tmp_path)


# There is no server, or it stops answering.


def test_no_server(template: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for words in (["ls"], ["submit", str(template)], ["status", "x", "--watch"], ["logs", "x", "--follow"]):
        done = moe_train(*words, "--url", url)
        assert (done.code, done.out) == (Exit.LOST, "")
        assert done.err.startswith(f"moe-train: no server answers at {url}")
        assert "was created" not in done.err
        assert moe_train(*words, "--url", url, "--json").error["exit_code"] == 4


def answering(*answers: Any) -> tuple[Client, list[httpx.Request]]:
    """A server that gives one of `answers` per request, and repeats the last one."""
    waiting, asked = list(answers), []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        given = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        if isinstance(given, Exception):
            raise given
        return httpx.Response(200, json=given) if isinstance(given, dict) else given

    return Client("http://example.test/", "secret", httpx.MockTransport(answer)), asked


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
    """Time that passes only while sleeping, so that a slow machine asks as often as a fast one."""

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
    assert len(asked) == 1 + 6  # one answer, then a request each second from 0 to 5


@pytest.mark.parametrize("answer", [DROPPED, GATEWAY])
def test_the_first_request_is_not_repeated(answer: Any) -> None:
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
    monkeypatch.setattr(act, "Client", lambda url, key, note: server)
    done = moe_train("submit", str(template), "--json")
    assert (done.code, done.out, len(asked)) == (Exit.LOST, "", 1)
    assert done.error["hints"] == ["to see whether the job was created: moe-train ls --url http://example.test"], (
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
    bad = {JobState.FAILED, JobState.CANCELLED, JobState.UNREADABLE}
    assert {state for state, code in OUTCOMES.items() if code is not Exit.OK} == bad


def test_a_body_goes_out_whatever_it_holds() -> None:
    server, asked = answering({"job_uuid": "j"})
    body = {"model": "half a pair: \ud800", "data": {"dataset_id": "größer"}}
    server.submit(body)
    assert json.loads(asked[0].content) == body


# What users see.


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


def test_a_job_that_learns_from_rewards_shows_its_reward_held_out() -> None:
    first = {"step": 0, "epoch": 0.0, "metrics": {"validation_loss": -0.25, "reward": 0.25, "perplexity": 3.0}}
    last = {"step": 4, "epoch": 1.0, "metrics": {"validation_loss": -0.75, "reward": 0.75, "perplexity": 2.0}}
    metrics = {"loss": -0.001, "reward": 0.5}
    status = a_status(step=4, max_steps=4, metrics=metrics, evaluation={"first": first, "last": last})
    assert show.held_out(status) == "reward 0.25 -> 0.75"
    assert show.evaluation(status["resources_allocated"]["evaluation"]["last"]) == "held out at step 4: reward 0.75"
    assert show.figures(status) == ["loss -0.001", "reward 0.5"]


@pytest.mark.parametrize("loss", [-0.75, 0.75, None])
def test_a_negative_held_out_loss_of_an_artifact_is_explained(loss: float | None) -> None:
    metrics = {"epoch": 1, "train_loss": 0.1, "validation_loss": loss, "perplexity": 2.0}
    artifact = {"identifier": "a", "kind": "adapter", "epoch": 1, "step": 4, "bytes": 9, "path": "/a",
                "training_metrics": metrics}  # fmt: skip
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(show.artifacts({"job_uuid": "j", "checkpoints": [artifact]}))  # type: ignore[typeddict-item]
    assert ("a GRPO job's held-out loss is its mean reward, negated" in console.export_text()) == (loss == -0.75)


def test_steps_do_not_flood_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with views.view(screen.Screen(as_json=False)) as shown:
        for step in range(1, 1000):
            shown.show(a_status(step=step, max_steps=1000))
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_line_is_not_repeated(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The time left changes all the time, and an evaluation comes between two looks at one step."""
    monkeypatch.setattr(views, "STEP_LINE_S", 0.0)
    step = {"step": 5, "max_steps": 9, "metrics": {"loss": 1.0}}
    waits = a_status("scheduled", stage="queued", queue_position=1)
    with views.view(screen.Screen(as_json=False)) as shown:
        for status in [
            waits, waits, *(a_status(**step, eta_s=float(left)) for left in (90, 80, 80)),
            a_status(**step, stage="evaluating"), a_status(**step), waits, a_status(**step), a_status("completed"),
        ]:  # fmt: skip
            shown.show(status)
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "j: scheduled (queued), number 1 in the queue",
        "j: in_progress (training), step 5 of 9, loss 1, ETA 1m30s",
        "j: in_progress (evaluating), step 5 of 9, loss 1",
        "j: scheduled (queued), number 1 in the queue",
        "j: in_progress (training), step 5 of 9, loss 1",
        "j: completed after 1h30m",
    ]
    assert not re.search(r"[\x1b\r]", out)


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


def test_terminal_sequences_of_a_server_are_removed(capsys: pytest.CaptureFixture[str]) -> None:
    shown = screen.Screen(as_json=False)
    shown.say("\x1b]0;title\x07[bold]loss[/bold] \x1b[2J:warning:")
    shown.print(["\x1b[31mred\x1b[0m"])
    assert capsys.readouterr().out == "[bold]loss[/bold] :warning:\nred\n"


def a_lost_job(state: str, attempts: int, lost: int) -> dict[str, Any]:
    time = "2026-01-01T00:00:00Z"
    return {
        "job_uuid": "j", "status": state, "scheduled_at": time, "started_at": time,
        "completed_at": "2026-01-01T00:00:13Z", "attempts": attempts, "reason": "x" * 300 + " word" * 40,
        "recipe": "sft", "model": "m", "folder": "/f", "spec": None, "resolved": None, "checkpoints": [],
        "resources_allocated": {"attempts": attempts, "lost": lost, "reason": "killed"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("attempts", "lost", "tried"),
    [(3, 3, "3 times; its process was lost 3 times"), (2, 1, "2 times; its process was lost once")],
)
def test_starts_are_counted_once_and_time_is_of_the_last_one(
    attempts: int, lost: int, tried: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown, detail = screen.Screen(as_json=False), a_lost_job("failed", attempts, lost)
    shown.say(show.job(detail))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("tried")] == [tried]
    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("took")] == ["13s of its last start"]
    shown.say(show.ended(detail))
    assert "j: failed after 13s of its last start" in capsys.readouterr().out
    shown.say(show.ended(a_lost_job("failed", 1, 0)))
    assert "j: failed after 13s\n" in capsys.readouterr().out


def test_a_long_reason_pads_no_other_line(capsys: pytest.CaptureFixture[str]) -> None:
    screen.Screen(as_json=False).say(show.job(a_lost_job("failed", 3, 3)))
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line != line.rstrip()] == []
    assert any("x" * 300 + " word" * 40 in line for line in lines), "and stays whole where no person looks"


def test_a_slow_answer_is_noted_once() -> None:
    told: list[str] = []
    asked = threading.Event()

    def slow(_request: httpx.Request) -> httpx.Response:
        assert asked.wait(60)
        return httpx.Response(200, json={"job_uuid": "j"})

    def note(line: str) -> None:
        told.append(line)
        asked.set()

    with Client("http://test", transport=httpx.MockTransport(slow), note=note, silence_s=0.05) as server:
        assert server.job("j") == {"job_uuid": "j"}
        with server.follow("j", None, None) as opened:
            assert opened is None
    assert told[0] == "http://test does not answer yet; still waiting"
    asked.clear()
    server = Client("http://test", transport=httpx.MockTransport(slow), note=note, silence_s=0.05)
    with server, server.follow("j", None, None):
        pass
    assert asked.is_set(), "while a stream is opened too"


def test_a_suspended_server_is_noted_on_the_command_line() -> None:
    """Its kernel still accepts connections, but nothing answers until the process continues."""
    with socket.create_server(("127.0.0.1", 0)) as stopped:
        url = f"http://127.0.0.1:{stopped.getsockname()[1]}"
        done: list[Any] = []
        asking = threading.Thread(target=lambda: done.append(moe_train("status", "j", "--url", url)))
        asking.start()
        connection, _ = stopped.accept()
        with connection:
            asking.join(SILENCE_S + 1)
            connection.recv(4096)  # then it closes the connection
        asking.join(60)
    assert done[0].code == Exit.LOST
    assert done[0].err.startswith(f"{url} does not answer yet; still waiting\n")
    assert done[0].err.count("does not answer yet") == 1
