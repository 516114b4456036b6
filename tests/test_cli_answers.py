"""What `moe-train` makes of answers, of none, and what it then shows; the server is staged."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama_stack_provider_moe.cli import commands, follow, screen, views
from llama_stack_provider_moe.cli.exits import OUTCOMES, Exit, exit_of
from llama_stack_provider_moe.cli.follow import Follower
from llama_stack_provider_moe.cli.server import Server, state_of
from llama_stack_provider_moe.errors import InvalidRows, MoeError, RowProblem, ServerLost, ServerRefused
from llama_stack_provider_moe.jobs.state import JobState
from tests.cli_support import moe_train, template_at
from tests.host_harness import free_port


@pytest.fixture
def template(tmp_path: Path) -> Path:
    return template_at(tmp_path)


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
