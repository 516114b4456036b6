"""The safety API of a host without one: wire, bounds, owners, figures, feedback, and what the log tells."""

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from llama_stack_provider_moe.control.guard.routes import SafetyService, create_router
from llama_stack_provider_moe.control.guard.service import GuardService
from llama_stack_provider_moe.control.server import callers
from llama_stack_provider_moe.control.store import feedback_files
from llama_stack_provider_moe.spec.guard_config import GuardConfig
from llama_stack_provider_moe.spec.rows import canonical
from tests.control.server.test_telemetry import Exporter
from tests.support.host_harness import RUN_CONFIGS
from tests.support.host_support import caller
from tests.support.word_scorer import WordScorer

SHIELDS: dict[str, Any] = {
    "tools": {"type": "tool_guard"},
    "cooking": {"type": "rep_monitor", "probe": "cooking"},
    "session": {"type": "trajectory", "shields": ["cooking", "tools"], "max_sum": 1.0},
}
SCORER = WordScorer({"cook": 0.9, "pan": 0.4})
HI = [{"role": "user", "content": "hi"}]
COOK = [{"role": "user", "content": "I cook"}]
BAD_CALL = [
    {"role": "user", "content": "my secret is 42"},
    {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "rm", "arguments": "{}"}}]},
]


@contextmanager
def serving(exporter: Exporter | None = None, scorer: Any = SCORER, **settings: Any) -> Iterator[SafetyService]:
    config = GuardConfig.model_validate(
        {"on_failure": "block", "rules": {"default": str(RUN_CONFIGS / "shields" / "tools.yaml")},
         "probes": {"cooking": "/probe"}, "shields": SHIELDS, "default_shield": "cooking", **settings}
    )  # fmt: skip
    made = SafetyService(GuardService(config, scorer, None if exporter is None else exporter.meter))
    asyncio.run(made.initialize())
    yield made
    asyncio.run(made.shutdown())


def ask(service: SafetyService, method: str, path: str, **request: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        app = FastAPI()
        app.router.routes.extend(create_router(service).routes)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost/v1") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


def run_shield(service: SafetyService, shield_id: str, messages: Any, **more: Any) -> Any:
    body = {"shield_id": shield_id, "messages": messages, **more}
    answer = ask(service, "POST", "/safety/run-shield", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["violation"]


def error(answer: httpx.Response) -> tuple[int, str]:
    assert set(answer.json()) == {"error"}, answer.text
    return answer.status_code, answer.json()["error"]["message"]


def test_shields_are_listed() -> None:
    with serving() as service:
        found = ask(service, "GET", "/shields").json()["data"]
        assert [each["identifier"] for each in found] == ["cooking", "session", "tools"]
        assert ask(service, "GET", "/shields/cooking").json() == found[0]
        assert found[0]["params"]["scored"] == "conversation", "defaults included"
        assert error(ask(service, "GET", "/shields/no")) == (404, "shield 'no' does not exist")


def test_a_shield_is_run() -> None:
    with serving() as service:
        assert run_shield(service, "tools", HI) is None
        found = run_shield(service, "tools", BAD_CALL)
        assert (found["violation_level"], found["metadata"]["rule"]) == ("error", "unknown_tool")
        assert run_shield(service, "cooking", COOK)["metadata"]["score"] == 0.9


def test_a_moderation_has_the_form_of_openai() -> None:
    with serving() as service:
        found = ask(service, "POST", "/moderations", json={"input": ["hi", "I cook"]}).json()
        assert found["model"] == "cooking"
        assert [each["flagged"] for each in found["results"]] == [False, True]
        assert [each["categories"] for each in found["results"]] == [{"cooking": False}, {"cooking": True}]
        assert [each["category_scores"] for each in found["results"]] == [{"cooking": 0.0}, {"cooking": 0.9}]
        assert found["results"][1]["metadata"]["threshold"] == 0.5
        assert not ask(service, "POST", "/moderations", json={"input": "hi"}).json()["results"][0]["flagged"]


def test_a_level_below_error_is_not_flagged() -> None:
    with serving(shields={"cooking": {**SHIELDS["cooking"], "level": "warn"}}) as service:
        (result,) = ask(service, "POST", "/moderations", json={"input": "I cook"}).json()["results"]
        assert (result["flagged"], result["metadata"]["level"]) == (False, "warn")


def test_a_text_without_a_score_is_flagged_as_such() -> None:
    with serving(scorer=None) as service:
        (result,) = ask(service, "POST", "/moderations", json={"input": "hi"}).json()["results"]
        assert (result["flagged"], result["categories"]) == (True, {"not_scored": True})
    with serving(scorer=None, on_failure="allow") as service:
        (result,) = ask(service, "POST", "/moderations", json={"input": "hi"}).json()["results"]
        assert (result["flagged"], result["categories"]) == (False, {})


REFUSED: list[tuple[str, Any, str]] = [
    ("/safety/run-shield", {"messages": HI}, "shield_id: is missing"),
    ("/safety/run-shield", {"shield_id": "tools"}, "messages: is missing"),
    ("/safety/run-shield", {"shield_id": "tools", "messages": []}, "messages: '0 messages' is not valid"),
    ("/safety/run-shield", {"shield_id": "tools", "messages": "hi"}, "messages: 'hi' is not valid; expected a list"),
    ("/safety/run-shield", {"shield_id": "tools", "messages": HI, "params": {}}, "params: unknown key"),
    ("/safety/run-shield", {"shield_id": "no", "messages": HI}, "expected one of ['tools', 'cooking', 'session']"),
    (
        "/safety/run-shield",
        {"shield_id": "session", "messages": HI},
        "`metadata.session_id` of the request, header X-Moe-Session",
    ),
    (
        "/safety/run-shield",
        {"shield_id": "tools", "messages": HI, "metadata": {"session": "s"}},
        "metadata.session: unk",
    ),
    ("/moderations", {}, "input: is missing"),
    ("/moderations", {"input": 7}, "input.str: 7"),
    ("/moderations", {"input": []}, "input: '0 texts' is not valid; expected 1 to 64 texts"),
    ("/moderations", {"input": ["a"] * 65}, "input: '65 texts' is not valid; expected 1 to 64 texts"),
    ("/moderations", {"input": "a", "model": "no"}, "model: 'no' is not valid"),
    ("/moderations", {"input": "a", "model": "tools"}, "because texts have no tool calls"),
    ("/moderations", {"input": "a", "model": "session"}, "`metadata.session_id` of the request, header X-Moe-Session"),
]


@pytest.mark.parametrize(("path", "body", "says"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_a_wrong_request_is_refused(path: str, body: Any, says: str) -> None:
    with serving() as service:
        status, message = error(ask(service, "POST", path, json=body))
        assert (status, says in message) == (400, True), message


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400), (b"{", 400), (b"null", 400), (b"\xff\xfe", 400), (b"[" * 500_000, 400),
        (b'{"shield_id": ' * 100_000, 400), (b'{"messages": [' + b"{}," * 300_000 + b"{}]}", 400),
        (b'{"shield_id": "tools", "messages": ' + b" " * (9 << 20) + b"[]}", 413),
        (b'{"shield_id": "tools\\ud800", "messages": []}', 400),
    ],
    ids=[str(number) for number in range(9)],
)  # fmt: skip
def test_a_hostile_body_is_refused(content: bytes, status: int) -> None:
    with serving() as service:
        headers = {"Content-Type": "application/json"}
        answer = ask(service, "POST", "/safety/run-shield", content=content, headers=headers)
        assert error(answer)[0] == status, answer.text[:300]


def test_the_event_loop_stays_free_while_a_megabyte_is_checked() -> None:
    """Another request is answered meanwhile, and its longest wait is short."""
    arguments = json.dumps({"to": ["a@example.org"], "subject": "x", "body": "y" * (900 << 10)})
    call = {"type": "function", "function": {"name": "send_mail", "arguments": arguments}}
    body = {"shield_id": "tools", "messages": [{"role": "assistant", "tool_calls": [call]}] * 4}

    async def both(service: SafetyService) -> tuple[int, float]:
        app = FastAPI()
        app.router.routes.extend(create_router(service).routes)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost/v1") as client:
            content = json.dumps(body).encode()
            headers = {"Content-Type": "application/json"}
            large = asyncio.create_task(client.post("/safety/run-shield", content=content, headers=headers))
            longest = 0.0
            while not large.done():
                began = time.process_time()
                await asyncio.sleep(0)
                longest = max(longest, time.process_time() - began)
            return (await large).status_code, longest

    with serving() as service:
        status, longest_s = asyncio.run(both(service))
        assert status == 200
        assert longest_s < 1.0


def test_two_owners_sessions_never_mix() -> None:
    pan = [{"role": "user", "content": "a pan"}]
    named = {"metadata": {"session_id": "one"}}
    with serving() as service:
        flagged: dict[str, list[bool]] = {"ann": [], "bob": []}
        for _ in range(4):
            for name, found in flagged.items():
                with caller(name):
                    found.append(run_shield(service, "session", pan, **named) is not None)
        assert flagged == {name: [False, False, True, True] for name in flagged}, "0.4, 0.8, 1.2, 1.6"
        with caller("carl"):
            assert run_shield(service, "session", pan, **named) is None
        assert run_shield(service, "session", pan, **named) is None, "without authentication"


def test_rules_see_the_name_of_the_caller() -> None:
    mail = json.dumps({"to": ["ann@example.org"], "subject": "a", "body": "b"})
    call = {"type": "function", "function": {"name": "send_mail", "arguments": mail}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    with serving() as service:
        for name, refused in (("staff-ann", False), ("guest", True)):
            with caller(name):
                assert (run_shield(service, "tools", messages) is not None) == refused, name
        assert run_shield(service, "tools", messages) is None, "anonymous"


def test_a_session_is_named_by_header_or_metadata() -> None:
    body = {"shield_id": "session", "messages": HI}
    with serving() as service:
        for more, headers in (({"metadata": {"session_id": "a"}}, {}), ({}, {"X-Moe-Session": "a"})):
            answer = ask(service, "POST", "/safety/run-shield", json=body | more, headers=headers)
            assert answer.status_code == 200, answer.text
        assert len(service.service.shields.sessions) == 1
        both = {"metadata": {"session_id": "b"}}
        answer = ask(service, "POST", "/safety/run-shield", json=body | both, headers={"X-Moe-Session": "a"})
        assert error(answer)[0] == 400


def test_checks_are_counted() -> None:
    exporter = Exporter()
    with serving(exporter) as service:
        run_shield(service, "tools", BAD_CALL)
        run_shield(service, "tools", HI)
        run_shield(service, "cooking", HI)
        found = exporter.collect()
        assert found["moe.guard.checks", "error", "tools", "tool_guard"] == 1
        assert found["moe.guard.checks", "none", "tools", "tool_guard"] == 1
        assert found["moe.guard.duration", "tools", "tool_guard"][0] == 2
        assert found["moe.guard.sessions",] == 0
        assert not [key for key in found if key[0] == "moe.guard.failures"]
    exporter.provider.shutdown()


def test_a_failure_is_counted_with_what_was_chosen() -> None:
    for chosen in ("block", "allow"):
        exporter = Exporter()
        with serving(exporter, scorer=None, on_failure=chosen) as service:
            run_shield(service, "cooking", HI)
            assert exporter.collect()["moe.guard.failures", chosen, "down", "cooking", "rep_monitor"] == 1
        exporter.provider.shutdown()


def wait_for(exporter: Exporter, outcome: str, count: int) -> None:
    until = time.monotonic() + 20
    while exporter.collect().get(("moe.guard.feedback", outcome)) != count:
        assert time.monotonic() < until, exporter.collect()
        time.sleep(0.01)


ANSWERED = [*COOK, {"role": "assistant", "content": "How nice"}]


def test_flagged_conversations_become_rows_of_their_owner_with_consent(tmp_path: Path) -> None:
    exporter = Exporter()
    folder = tmp_path / "flagged"
    with serving(exporter, feedback={"consent": True, "folder": str(folder)}) as service:
        run_shield(service, "tools", HI)
        for name in ("ann", "bob"):
            with caller(name):
                run_shield(service, "cooking", [*COOK, {"role": "user", "content": name}])
        run_shield(service, "cooking", COOK)
        run_shield(service, "tools", BAD_CALL)
        run_shield(service, "cooking", ANSWERED)
        run_shield(service, "session", ANSWERED, metadata={"session_id": "s"})
        wait_for(exporter, "kept", 6)
    exporter.provider.shutdown()
    with caller("ann"):
        ann = callers.owner()
    assert kept(folder, ann) == [[*COOK, {"role": "user", "content": "ann"}]]
    found = kept(folder, "anonymous")
    assert [found[0], found[2]] == [COOK, ANSWERED], "equal conversations count once, whichever shields flagged them"
    assert len(found) == 3
    assert found[1][1]["tool_calls"][0]["function"] == {"name": "rm", "arguments": "{}"}
    assert kept(folder, "anonymous", "answered") == found[1:]
    assert kept(folder, "anonymous", shield="tools") == [found[1]]
    assert len(kept(folder, None)) == 5
    for row in found[1:]:
        assert canonical({"messages": row}, 1, "circuit_breaker", "auto")["messages"]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert [oct(path.stat().st_mode)[-3:] for path in files] == ["600"] * 3
    assert oct((folder / "owners").stat().st_mode)[-3:] == "700"


def kept(folder: Path, owner: str | None, only: feedback_files.Only = "all", shield: str | None = None) -> list[Any]:
    lines = b"".join(feedback_files.pieces(folder, owner, only, shield)).splitlines()
    return [json.loads(line)["messages"] for line in lines]


def test_feedback_ends_at_its_limits_and_no_owner_takes_the_room_of_another(tmp_path: Path) -> None:
    exporter = Exporter()
    long = [{"role": "user", "content": "cook " + "x" * (600 << 10)}]
    feedback = {"consent": True, "folder": str(tmp_path), "max_bytes": 3 << 20, "max_bytes_of_owner": 2 << 20}
    with serving(exporter, feedback=feedback) as service:
        for name, (kept_rows, full) in (("eve", (3, 2)), ("ann", (5, 2)), ("bob", (5, 4))):
            with caller(name):
                for _ in range(5 if name == "eve" else 2):
                    run_shield(service, "cooking", long)
                    time.sleep(0.05)
            wait_for(exporter, "kept", kept_rows)
            wait_for(exporter, "full", full)
    exporter.provider.shutdown()
    assert feedback_files.used_bytes(tmp_path) < 3 << 20


@pytest.mark.parametrize("is_asked_for", [False, True])
def test_the_log_has_nothing_of_a_conversation_unless_asked(
    caplog: pytest.LogCaptureFixture, is_asked_for: bool
) -> None:
    logging.getLogger("llama_stack_provider_moe").propagate = True
    with caplog.at_level(logging.DEBUG), serving(log_conversations=is_asked_for) as service:
        run_shield(service, "tools", BAD_CALL)
        wrong = {"shield_id": "tools", "messages": [{"role": "my secret is 42"}]}
        assert ask(service, "POST", "/safety/run-shield", json=wrong).status_code == 400
    ours = "\n".join(each.getMessage() for each in caplog.records if "llama_stack_provider_moe" in each.name)
    assert "moe-guard: without a score: block; rules: default; probes: cooking" in ours
    assert "shield 'tools': error, rule 'unknown_tool'" in ours
    assert ("my secret is 42" in ours) == is_asked_for


def test_health_says_whether_shields_can_answer() -> None:
    with serving() as service:
        found = ask(service, "GET", "/safety/health").json()
        assert (found["status"], found["scorer"], found["probes"]) == ("ok", "ready", ["cooking"])
    with serving(scorer=None) as service:
        assert ask(service, "GET", "/safety/health").json()["status"] == "degraded"
