"""Graders over HTTP, ours and OpenAI's: checks and runs before any training; hostile bodies; access to models."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama_stack_provider_moe.client import AsyncClient, Client
from llama_stack_provider_moe.control.server.service import PostTrainingService
from tests.support.host_support import app_of, ask, over_http, serving_in_process

CHECK = {"type": "string_check", "name": "same", "reference": "{{item.gold}}", "operation": "eq"}
MATH = {"type": "math", "name": "right"}
MULTI = {"type": "multi", "name": "both", "calculate_output": "0.5 * a + 0.5 * b", "graders": {"a": CHECK, "b": MATH}}
JUDGED = {"type": "score_model", "name": "j", "model": "judge",
          "input": [{"role": "user", "content": "{{sample.output_text}}"}]}  # fmt: skip


class _Judge(BaseHTTPRequestHandler):
    """Answers with the score 0.7."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        message = {"content": '{"result": 0.7}'}
        body = json.dumps({"choices": [{"message": message}], "usage": {"total_tokens": 5}}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def judge() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Judge)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/chat/completions"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, judge: str) -> Iterator[PostTrainingService]:
    graders = {"judges": {"judge": {"url": judge, "model": "m"}}, "deadline_s": 3}
    with serving_in_process(tmp_path_factory.mktemp("graders"), graders=graders) as made:
        yield made


def run(service: PostTrainingService, grader: dict[str, Any], sample: str, **item: Any) -> dict[str, Any]:
    answer = ask(service, "POST", "/graders/run", json={"grader": grader, "model_sample": sample, "item": item})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def refused(service: PostTrainingService, body: Any, status: int = 400, path: str = "validate") -> str:
    answer = ask(service, "POST", f"/graders/{path}", json=body)
    assert answer.status_code == status, answer.text
    message: str = answer.json()["error"]["message"]
    return message


def test_a_grader_is_checked(service: PostTrainingService) -> None:
    answer = ask(service, "POST", "/graders/validate", json={"grader": MATH})
    assert answer.json() == {
        "grader": MATH | {"input": "{{sample.output_text}}", "reference": "{{item.gold}}", "precision": 6},
        "range": [0, 1],
        "runs": "child",
    }
    multi = ask(service, "POST", "/graders/validate", json={"grader": MULTI}).json()
    assert multi["range"] == [0, 1]
    unbounded = {**MULTI, "calculate_output": "a / b"}
    multi = ask(service, "POST", "/graders/validate", json={"grader": unbounded}).json()
    assert multi["range"] == [None, None]


@pytest.mark.parametrize(
    ("grader", "told"),
    [
        ({**CHECK, "operation": "x"}, "grader.operation: 'x' is not valid; expected 'eq'"),
        ({"type": "python", "name": "p", "source": "1"}, "grader: type: 'python' is not valid, because"),
        ({**JUDGED, "model": "gpt-4o"}, "grader.model: 'gpt-4o' is not valid; expected one of judge"),
        ({"type": "json_schema", "name": "s", "json_schema": {"$ref": "https://example.org/x"}},
         "grader.json_schema.$ref: 'https://example.org/x' is not valid; expected a reference inside this schema"),
        ({"type": "reward_model", "name": "r", "model": "/etc"}, "grader.model: '/etc' is outside the folders"),
        ({"type": "monitor", "name": "m", "probe": "/etc"}, "grader.probe: '/etc' is outside the folders"),
        ({"type": "refusal", "name": "m", "expect": "answer", "judge": "model", "model": "/etc"},
         "grader.model: '/etc' is outside the folders"),
    ],
)  # fmt: skip
def test_a_bad_grader_is_refused_by_field(service: PostTrainingService, grader: dict[str, Any], told: str) -> None:
    status = 403 if "outside" in told else 400
    assert told in refused(service, {"grader": grader}, status)
    assert told in refused(service, {"grader": grader, "model_sample": "x"}, status, "run")


def test_a_run_has_openais_shape(service: PostTrainingService) -> None:
    found = run(service, MULTI, "7", gold="7")
    assert found["reward"] == 1
    assert found["sub_rewards"] == {"a": 1, "b": 1}
    openai = pytest.importorskip("openai.types.fine_tuning.alpha.grader_run_response")
    openai.GraderRunResponse.model_validate(found)
    assert not any(value for name, value in found["metadata"]["errors"].items() if not name.endswith("details"))


@pytest.mark.parametrize(
    ("grader", "sample", "flag"),
    [
        ({**CHECK, "reference": "{{item.none}}"}, "x", "invalid_variable_error"),
        ({**MULTI, "calculate_output": "a / b"}, "x", "formula_parse_error"),
        ({**CHECK, "input": "{{sample.output_json.a}}"}, "x", "sample_parse_error"),
        ({"type": "text_similarity", "name": "s", "reference": "{{item.long}}", "evaluation_metric": "fuzzy_match"},
         "ab" * 500_000, "unresponsive_reward_error"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_flagged(
    service: PostTrainingService, grader: dict[str, Any], sample: str, flag: str
) -> None:
    found = run(service, grader, sample, gold="7", long="ba" * 500_000)
    assert found["metadata"]["errors"][flag] is True
    assert found["reward"] == (0 if flag == "sample_parse_error" else None)


def test_a_judge_is_asked(service: PostTrainingService) -> None:
    found = run(service, JUDGED, "hello")
    assert (found["reward"], found["metadata"]["token_usage"]) == (0.7, 5)
    assert found["model_grader_token_usage_per_model"] == {"judge": 5}


def test_openais_routes_do_the_same(service: PostTrainingService) -> None:
    async def post(path: str, body: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app=app_of(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test/v1/fine_tuning/alpha") as client:
            return await client.post(path, json=body)

    checked = asyncio.run(post("/graders/validate", {"grader": CHECK}))
    assert checked.json()["grader"]["name"] == "same"
    ran = asyncio.run(post("/graders/run", {"grader": CHECK, "model_sample": "7", "item": {"gold": "7"}}))
    assert ran.json()["reward"] == 1
    bad = asyncio.run(post("/graders/run", {"grader": CHECK | {"operation": "x"}, "model_sample": "7"})).json()
    assert bad["error"]["param"] == "grader.operation"


def test_a_slow_grader_does_not_hold_the_event_loop(service: PostTrainingService) -> None:
    slow = {"type": "text_similarity", "name": "s", "reference": "{{item.long}}", "evaluation_metric": "gleu"}
    body = {"grader": slow, "model_sample": "a b " * 200_000, "item": {"long": "b a " * 200_000}}

    async def both() -> tuple[float, httpx.Response]:
        transport = httpx.ASGITransport(app=app_of(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test/v1alpha/post-training") as client:
            slowly = asyncio.create_task(client.post("/graders/run", json=body))
            longest = 0.0
            while not slowly.done():
                began = time.monotonic()
                await asyncio.sleep(0.01)
                longest = max(longest, time.monotonic() - began)
            return longest, slowly.result()

    longest, answer = asyncio.run(both())
    assert answer.status_code == 200
    assert longest < 2, "reading the body takes some of it"


def test_clients_have_methods(service: PostTrainingService) -> None:
    with over_http(service) as url:
        with Client(url) as client:
            assert client.validate_grader(MATH)["runs"] == "child"
            assert client.run_grader(CHECK, "7", {"gold": "7"})["reward"] == 1
            tokens = {"type": "length", "name": "l", "unit": "tokens", "most": 3}
            assert client.run_grader(tokens, "a b", output_tokens=2)["reward"] == 1

        async def asked() -> float | None:
            async with AsyncClient(url) as client:
                assert (await client.validate_grader(CHECK))["grader"]["name"] == "same"
                return (await client.run_grader(MATH, "$1/2$", {"gold": "0.5"}))["reward"]

        assert asyncio.run(asked()) == 1


def test_a_closed_service_leaves_no_process(tmp_path: Path) -> None:
    others = threading.enumerate()  # of the service that the other tests share
    with serving_in_process(tmp_path) as service:
        assert run(service, MATH, "7", gold="7")["reward"] == 1
        threads = [each for each in threading.enumerate() if each.name.startswith("moe-grade-") and each not in others]
        assert threads
    for each in threads:  # they see that their process has ended
        each.join(10)
    assert not any(each.is_alive() for each in threads)
