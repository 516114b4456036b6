"""A GGUF file that llama.cpp serves, behind the three shields of run_configs/guarded.yaml, on Llama Stack 0.6.1.

A program runs shields as the guide says: before the model, after it, and before each tool call.
"""

import json
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest
import yaml

from llama_stack_provider_moe.compute.export import gguf
from tests.support import llama_support
from tests.support.guard_probe import TinyProbe, fitted
from tests.support.host_harness import RUN_CONFIGS, Server, serving

pytest.importorskip("xllamacpp", reason="llama.cpp's server: pip install 'llama-stack-provider-moe[serve]'")
from examples import serve_models

pytestmark = pytest.mark.e2e

SMOLLM2 = llama_support.CACHE / "SmolLM2-135M-Instruct"  # `make demo` downloads it
SHIELDS = ("refused", "tools", "session")
LIMIT_S = 300.0


class Running(NamedTuple):
    """A server, the probe of its shields, and whether the model that it serves is a trained one."""

    server: Server
    probe: TinyProbe
    is_trained: bool

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        answer = httpx.post(f"{self.server.url}/v1/{path}", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stopped_by(self, messages: list[Any], session: str) -> dict[str, Any]:
        """What each of the three shields objects to, where it stops a conversation."""
        found = {}
        for shield in SHIELDS:
            body = {"shield_id": shield, "messages": messages, "metadata": {"session_id": session}}
            violation = self.ask("safety/run-shield", body)["violation"]
            if violation is not None and violation["violation_level"] == "error":
                found[shield] = violation["metadata"]
        return found


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    llama_support.toolchain()
    folder = tmp_path_factory.mktemp("guarded-model")
    probe = fitted(folder / "probe")
    is_trained = SMOLLM2.is_dir()
    model = SMOLLM2 if is_trained else llama_support.build("granitemoe", folder / "model", initializer_range=0.03)
    models_dir = folder / "models"
    models_dir.mkdir()
    assert gguf.main([str(model), str(models_dir / "served.gguf"), "--type", "q8_0"]) == 0
    content = yaml.safe_load((RUN_CONFIGS / "guarded.yaml").read_text(encoding="utf-8"))
    content["providers"]["safety"][0]["config"]["state_dir"] = str(folder / "guard")  # not the home folder's
    config = folder / "guarded.yaml"
    config.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    with serve_models.serving(models_dir, 0, most=1, context=512, threads=1) as url:
        env = {"MOE_PROBE": str(probe.folder), "MOE_RULES": str(RUN_CONFIGS / "shields" / "tools.yaml"),
               "LLAMA_CPP_URL": f"{url}/v1", "OMP_NUM_THREADS": "1"}  # fmt: skip
        with serving(config, folder / "state", "/v1/safety/health", env) as server:
            until = time.monotonic() + LIMIT_S
            while httpx.get(f"{server.url}/v1/safety/health", timeout=60).json()["scorer"] != "ready":
                assert time.monotonic() < until, server.log.read_text(errors="replace")[-3000:]
                time.sleep(0.2)
            yield Running(server, probe, is_trained)


@pytest.mark.wide
def test_a_conversation_goes_on_until_a_shield_stops_it(running: Running) -> None:
    (model,) = [each["id"] for each in httpx.get(f"{running.server.url}/v1/models", timeout=60).json()["data"]
                if each["id"].endswith("served")]  # fmt: skip
    messages: list[Any] = [{"role": "user", "content": running.probe.plain}]
    assert running.stopped_by(messages, "one") == {}, "the question may be asked"
    asked = {"model": model, "messages": messages, "max_tokens": 16, "temperature": 0}
    (choice,) = running.ask("chat/completions", asked)["choices"]
    answer = choice["message"]["content"]
    assert answer.strip(), "the file's model has answered"
    again = running.ask("chat/completions", asked)["choices"][0]["message"]["content"]
    assert again == answer, "greedy"
    if running.is_trained:
        assert any(word.isalpha() for word in answer.split())
    messages.append({"role": "assistant", "content": answer})
    assert "tools" not in running.stopped_by(messages, "one"), "an answer without a tool call"

    function = {"name": "read_file", "arguments": json.dumps({"path": "/etc/passwd"})}
    call = {"id": "call-1", "type": "function", "function": function}
    called = [*messages, {"role": "assistant", "content": None, "tool_calls": [call]}]
    found = running.stopped_by(called, "two")
    assert found["tools"]["rule"] == "tools.read_file.rules.0.inside"
    assert found["session"]["rule"] == "max_score", "a refused call alone is over the session's limit"

    flagged: list[Any] = [{"role": "user", "content": running.probe.flagged}]
    rules = []
    for _ in range(9):
        found = running.stopped_by(flagged, "three")
        assert found["refused"]["score"] > found["refused"]["threshold"], "the model is not asked"
        rules.append(found["session"]["rule"])
    assert rules[-1] in ("max_sum", "max_score"), "what was said before counts"
    plain: list[Any] = [{"role": "user", "content": running.probe.plain}]
    assert set(running.stopped_by(plain, "three")) == {"session"}, "the session stays refused"
    assert running.stopped_by(plain, "four") == {}, "another one goes on"
