"""Shields on each host, with a real probe, its scorer process, two users, and the clients of Llama Stack and OpenAI."""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import psutil
import pytest
import yaml
from llama_stack_client import BadRequestError, LlamaStackClient

from llama_stack_provider_moe.control.cli.hosts import HOSTS, HostName
from tests.support.authority import authority
from tests.support.chat_server import MODEL, Chat, chatting
from tests.support.cli_support import moe_train
from tests.support.free_ports import free_port
from tests.support.guard_probe import TinyProbe, fitted
from tests.support.host_harness import API, RUN_CONFIGS, Server, hub_cache, serving
from tests.support.other_hosts import ALL, HostUnderTest, hosts, required

pytestmark = pytest.mark.e2e

USERS = {name: {"principal": name, "attributes": {"roles": ["user"]}} for name in ("alice", "bob")}
LIMIT_S = 300.0
SESSION = {"type": "trajectory", "shields": ["refused", "tools"], "half_life_s": 3600, "max_sum": 1.2}


class Running(NamedTuple):
    """A server on a host, its probe and its model."""

    host: HostUnderTest
    server: Server
    probe: TinyProbe
    chat: Chat

    @property
    def is_ogx(self) -> bool:
        return self.host.name is HostName.OGX

    def http(self, user: str = "alice") -> httpx.Client:
        headers = {"Authorization": f"Bearer {user}"}
        return httpx.Client(base_url=self.server.url + "/v1", headers=headers, timeout=120)

    def openai(self, user: str = "alice") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.server.url + "/v1", api_key=user, max_retries=0, timeout=120)

    def flags(self, shield_id: str, messages: list[Any], user: str = "alice", session: str = "") -> Any:
        body: dict[str, Any] = {"shield_id": shield_id, "messages": messages}
        if session:
            body["metadata"] = {"session_id": session}
        with self.http(user) as http:
            answer = http.post("/safety/run-shield", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["violation"]


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> TinyProbe:
    return fitted(tmp_path_factory.mktemp("probe"))


def config_of(host: HostUnderTest, folder: Path, endpoint: str, chat: Chat) -> Path:
    """The run config for the host, with another model, users, and a lower limit of a session."""
    is_ogx = host.name is HostName.OGX
    path = RUN_CONFIGS / ("ogx_guarded.yaml" if is_ogx else "guarded.yaml")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    talker = {"provider_id": "talk", "provider_type": "remote::openai",
              "config": {"api_key": "none", "base_url": f"{chat.url}/v1"}}  # fmt: skip
    content["providers"]["inference"] = [talker]
    content["server"]["auth"] = {"provider_config": {"type": "custom", "endpoint": endpoint}}
    ours = content["providers"]["safety"][0]["config"]
    ours["scorer"] = {"python": sys.executable, "ping_s": 0.2}  # the host's environment has no torch
    ours["state_dir"] = str(folder / "guard")
    ours["rules"]["default"] = str(RUN_CONFIGS / "shields" / "tools.yaml")
    if is_ogx:
        ours["shields"]["session"] = SESSION
        content["providers"]["responses"][0]["config"]["moderation_headers"] = {"Authorization": "Bearer alice"}
    else:
        del content["registered_resources"]["models"]
        (session,) = [each for each in content["registered_resources"]["shields"] if each["shield_id"] == "session"]
        session["params"] = SESSION
    ours["feedback"] = {"consent": True, "folder": str(folder / "flagged")}
    changed = folder / path.name
    changed.write_text(yaml.safe_dump(_with_training(content, host, folder), sort_keys=False), encoding="utf-8")
    return changed


def _with_training(content: dict[str, Any], host: HostUnderTest, folder: Path) -> dict[str, Any]:
    """The same server with the provider that trains, as the run config for the host has it."""
    about = HOSTS[host.name]
    plain = yaml.safe_load((RUN_CONFIGS / f"{about.server}.yaml").read_text(encoding="utf-8"))
    providers = {**plain["providers"], **content["providers"]}
    trains = providers["post_training"][0]["config"]
    trains |= {"state_dir": str(folder / "moe"), "feedback": {"consent": True, "folder": str(folder / "flagged")},
               "supervisor": {"start": False}}  # fmt: skip
    trains["child_env"] = {**trains.get("child_env", {}), "HF_HUB_CACHE": str(hub_cache(folder / "hub", "owner/name"))}
    apis = folder / "apis"
    apis.mkdir()
    for each in ("external_apis", "external_apis_guarded") if about.is_external else ():
        for file in (RUN_CONFIGS / each).iterdir():
            if each != "external_apis_guarded" or host.name is HostName.OGX:
                shutil.copy(file, apis)
    more = {"external_apis_dir": str(apis)} if about.is_external else {}
    return {**content, "apis": sorted({*plain["apis"], *content["apis"]}), "providers": providers, **more}


@pytest.fixture(scope="module", params=hosts(HostName.OGX))
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, probe: TinyProbe
) -> Iterator[Running]:
    host = required(request.param)
    folder = tmp_path_factory.mktemp("guarded")
    with chatting() as chat, authority(USERS) as endpoint:
        port = free_port()
        env = {"MOE_PROBE": str(probe.folder), "MOE_PORT": str(port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        config = config_of(host, folder, endpoint, chat)
        health = "/v1/safety/health"
        with serving(config, folder / "state", health, env, command=host.command, port=port) as server:
            made = Running(host, server, probe, chat)
            wait_ready(made)
            yield made


def health(running: Running) -> Any:
    return httpx.get(f"{running.server.url}/v1/safety/health", timeout=60).json()


def wait_ready(running: Running) -> None:
    until = time.monotonic() + LIMIT_S
    while (found := health(running))["scorer"] != "ready":
        assert time.monotonic() < until, found
        time.sleep(0.2)
    assert found["probes"] == ["refused"]


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def calling(name: str, arguments: Any) -> list[Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return [*said("go"), {"role": "assistant", "content": None, "tool_calls": [
        {"id": "call-1", "type": "function", "function": function}]}]  # fmt: skip


def test_shields_are_listed_and_run_with_llama_stacks_client(running: Running) -> None:
    if running.host.name is HostName.LLAMA_STACK_0_7:
        pytest.skip("0.7.3 refuses the client of 0.6.1 by its version")
    client = LlamaStackClient(base_url=running.server.url, api_key="alice", max_retries=0, timeout=120)
    assert {each.identifier for each in client.shields.list()} == {"tools", "refused", "session"}
    safety = client.safety
    assert safety.run_shield(shield_id="refused", messages=said(running.probe.plain)).violation is None
    violation = safety.run_shield(shield_id="refused", messages=said(running.probe.flagged)).violation
    assert violation is not None
    assert (violation.violation_level, violation.metadata["rule"]) == ("error", "threshold")
    score, threshold = violation.metadata["score"], violation.metadata["threshold"]
    assert isinstance(score, float)
    assert isinstance(threshold, float)
    assert score > threshold
    assert safety.run_shield(shield_id="tools", messages=calling("search", {"query": "a"})).violation is None
    violation = safety.run_shield(shield_id="tools", messages=calling("read_file", {"path": "/etc/passwd"})).violation
    assert violation is not None
    assert violation.metadata["rule"] == "tools.read_file.rules.0.inside"
    with pytest.raises(BadRequestError, match="0 messages"):
        safety.run_shield(shield_id="tools", messages=[])
    assert safety.run_shield(shield_id="tools", messages=said("hi")).violation is None, "the connection still works"


def test_moderations_with_openais_client(running: Running) -> None:
    client = running.openai()
    found = client.moderations.create(input=[running.probe.plain, running.probe.flagged])
    assert [each.flagged for each in found.results] == [False, True]
    assert found.model == "refused", "the default"
    (result,) = client.moderations.create(input=running.probe.flagged, model="refused").results
    assert result.categories.to_dict()["refused"] is True
    assert result.category_scores.to_dict()["refused"] > 0.5  # type: ignore[operator]
    for model in ("tools", "nobody"):
        with pytest.raises(openai.BadRequestError):
            client.moderations.create(input="a", model=model)


def test_a_session_of_each_user(running: Running) -> None:
    score = running.flags("refused", said(running.probe.flagged))["metadata"]["score"]
    turns = int(SESSION["max_sum"] / score) + 1  # type: ignore[operator]
    rules: dict[str, list[str]] = {"alice": [], "bob": []}
    for _ in range(turns):
        for user, found in rules.items():
            found.append(running.flags("session", said(running.probe.flagged), user, "one")["metadata"]["rule"])
    assert rules == {user: ["threshold"] * (turns - 1) + ["max_sum"] for user in rules}
    over = running.flags("session", said(running.probe.flagged), "alice", "one")["metadata"]
    assert over["pushed_by"]["shield_id"] == "refused"
    assert over["turns"] == turns + 1
    assert running.flags("session", said(running.probe.flagged), "bob", "two")["metadata"]["rule"] == "threshold"
    with running.http() as http:
        body = {"shield_id": "session", "messages": said("hi")}
        assert http.post("/safety/run-shield", json=body).status_code == 400, "no session"
        assert http.post("/safety/run-shield", json=body, headers={"X-Moe-Session": "three"}).status_code == 200
        data = "X-OGX-Provider-Data" if running.is_ogx else "X-LlamaStack-Provider-Data"
        for more, headers, says in (
            ({"metadata": "x"}, {}, "metadata: 'x' is not valid"),
            ({"metadata": {"session_id": 5}}, {}, "metadata.session_id: 5 is not valid"),
            ({}, {data: '{"moe_session": 5}'}, "moe_session of the provider data: 5 is not valid; expected text"),
        ):
            answer = http.post("/safety/run-shield", json=body | more, headers=headers)
            assert (answer.status_code, says in answer.text) == (400, True), answer.text


def test_without_a_token_nothing_is_checked(running: Running) -> None:
    for path, body in (("safety/run-shield", {}), ("moderations", {"input": "a"})):
        assert httpx.post(f"{running.server.url}/v1/{path}", json=body, timeout=60).status_code == 401
    assert httpx.get(f"{running.server.url}/v1/shields", timeout=60).status_code == 401


def test_hostile_requests_leave_the_connection_and_the_server_alone(running: Running) -> None:
    hostile = [b"", b"{", b"[" * 300_000, b'{"shield_id": "tools", "messages": [7]}', b'{"shield_id": 1}',
               b'{"shield_id": "nobody", "messages": []}', b"\xff"]  # fmt: skip
    with running.http() as http:
        for content in hostile:
            answer = http.post("/safety/run-shield", content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == 400, answer.text
            assert set(answer.json()) == {"error"}
        large = [*said("x" * (1 << 20)), *calling("search", {"query": "y" * (900 << 10)})]
        answer = http.post("/safety/run-shield", json={"shield_id": "tools", "messages": large})
        assert answer.json()["violation"]["metadata"]["rule"] == "tools.search.parameters.maxLength"
    began = psutil.Process(running.server.process.pid).cpu_times().user
    with running.http() as http:
        for _ in range(20):
            assert http.post("/safety/run-shield", json={"shield_id": "tools", "messages": []}).status_code == 400
    # The host's own route would render 20 tracebacks of three seconds each.
    assert psutil.Process(running.server.process.pid).cpu_times().user - began < 10


def test_shields_are_registered_over_the_api(running: Running) -> None:
    if running.is_ogx:
        pytest.skip("OGX has no registry of shields; those of the configuration are all there are")
    with running.http() as http:
        for params, says in (
            ({"type": "rep_monitor", "probe": "other"}, "params.probe: 'other' is not valid"),
            ({"type": "tool_guard", "rules": "/etc/passwd"}, "params.rules: '/etc/passwd' is not valid"),
            ({"type": "trajectory", "shields": ["nobody"], "max_sum": 1}, "shield_id: 'nobody' is not valid"),
            ({"type": "trajectory", "shields": ["session"], "max_sum": 1}, "tool_guard or rep_monitor"),
        ):
            body = {"shield_id": "new", "provider_id": "moe-guard", "params": params}
            answer = http.post("/shields", json=body)
            assert (answer.status_code, says in answer.text) == (400, True), answer.text
        for ids, says in (
            ({"shield_id": ""}, "shield_id: '' is not valid"),
            ({"shield_id": "a b"}, "shield_id: 'a b' is not valid"),
            ({"shield_id": "new", "provider_shield_id": "refused"}, "provider_shield_id: 'refused' is not valid"),
        ):
            answer = http.post("/shields", json={**ids, "provider_id": "moe-guard", "params": {"type": "tool_guard"}})
            assert (answer.status_code, says in answer.text) == (400, True), answer.text
        body = {"shield_id": "new", "provider_id": "moe-guard", "params": {"type": "rep_monitor", "probe": "refused",
                "level": "warn"}}  # fmt: skip
        assert http.post("/shields", json=body).status_code == 200
        assert running.flags("new", said(running.probe.flagged))["violation_level"] == "warn"
        assert http.delete("/shields/new").status_code == 200
        gone = http.post("/safety/run-shield", json={"shield_id": "new", "messages": said("hi")})
        assert gone.status_code == 400


def test_the_command_line_tries_a_conversation(running: Running, tmp_path: Path) -> None:
    file = tmp_path / "conversation.json"
    file.write_text(json.dumps({"messages": said(running.probe.flagged)}))
    words = ["guard", "run", str(file), "--url", running.server.url, "--api-key", "alice", "--session", "cli"]
    done = moe_train(*words, "--json")
    assert done.code == 1, done.err
    levels = {each["shield_id"]: each["violation"] and each["violation"]["violation_level"]
              for each in done.document["verdicts"]}  # fmt: skip
    assert levels == {"tools": None, "refused": "error", "session": "error"}
    file.write_text(json.dumps(said(running.probe.plain)))
    assert moe_train(*words, "--shield", "refused").code == 0


def test_responses_stop_at_a_shield(running: Running) -> None:
    """On OGX with guardrails: at the input before the model is asked, and at an output before it is sent."""
    if not running.is_ogx:
        pytest.skip("Llama Stack's own agents name shields; its responses are not part of this run config")
    client, chat = running.openai(), running.chat
    model = f"talk/{MODEL}"

    def ask(text: str, guardrails: bool = True) -> Any:
        (item,) = client.responses.create(model=model, input=text, extra_body={"guardrails": guardrails}).output
        return item.content[0]  # type: ignore[union-attr]

    chat.answer = running.probe.plain
    before = len(chat.asked)
    assert ask(running.probe.plain).text.strip() == running.probe.plain
    assert len(chat.asked) == before + 1
    refusal = ask(running.probe.flagged)
    assert (refusal.type, refusal.refusal) == ("refusal", "Content blocked by safety guardrails (flagged for: refused)")
    assert len(chat.asked) == before + 1, "the model was not asked"
    assert ask(running.probe.flagged, guardrails=False).text.strip() == running.probe.plain
    chat.answer = running.probe.flagged
    stream = client.responses.create(
        model=model, input=running.probe.plain, stream=True, extra_body={"guardrails": True}
    )
    events = list(stream)
    first_end = next(each for each in events if each.type == "response.completed")
    assert first_end.response.output[0].content[0].type == "refusal"  # type: ignore[union-attr]
    assert running.probe.flagged not in " ".join(each.to_json() for each in events), "the text is never sent"
    with pytest.raises(openai.InternalServerError):  # OGX 1.5.0 ends such a response twice, and refuses its own answer
        ask(running.probe.plain)


def test_each_user_trains_on_what_was_flagged_of_them(running: Running) -> None:
    """A data set and a job of the conversations that shields flagged; another user finds nothing of them."""
    calls = calling("read_file", {"path": "/etc/secret-of-alice"})
    assert running.flags("tools", calls, "alice") is not None
    api = f"{running.server.url}{API}"
    job = {"recipe": "sft", "model": "owner/name", "data": {"dataset_id": "feedback:answered"},
           "options": {"validation_split": 0}}  # fmt: skip
    with httpx.Client(base_url=api, headers={"Authorization": "Bearer alice"}, timeout=120) as alice:
        until = time.monotonic() + LIMIT_S
        while not alice.get("/feedback").json()["answered"]:
            assert time.monotonic() < until
            time.sleep(0.1)
        made = alice.post("/feedback", json={"name": "bad-calls", "only": "answered", "shield": "tools"})
        assert made.status_code == 200, made.text
        rows = alice.get("/datasets/bad-calls/rows").json()["rows"]
        said = [row["messages"][-1]["tool_calls"][0]["function"]["arguments"] for row in rows]
        assert '{"path": "/etc/secret-of-alice"}' in said
        created = alice.post("/jobs", json=job)
        assert created.status_code == 200, created.text
        source = alice.get(f"/jobs/{created.json()['job_uuid']}").json()["sources"]["train"]
        assert (source["kind"], source["rows"]) == ("flagged conversations", alice.get("/feedback").json()["answered"])
    with httpx.Client(base_url=api, headers={"Authorization": "Bearer bob"}, timeout=120) as bob:
        assert bob.post("/feedback", json={"name": "x", "only": "answered"}).status_code == 404
        assert bob.post("/feedback", json={"name": "x", "everybody": True}).status_code == 403
        assert bob.get("/datasets/bad-calls").status_code == 404
        assert bob.post("/jobs", json=job).status_code == 400


# The next scorer imports its libraries anew, 30 s of processor time: `make test` sees that on one host.
@pytest.mark.parametrize(
    "running", [pytest.param(host, marks=[] if host is ALL[-1] else [pytest.mark.wide]) for host in ALL],
    ids=lambda host: host.name, indirect=True,
)  # fmt: skip
def test_a_scorer_that_is_gone_blocks_and_comes_back(running: Running) -> None:
    children = psutil.Process(running.server.process.pid).children(recursive=True)
    scorers = [each for each in children if "compute.probing.scorer" in " ".join(each.cmdline())]
    assert scorers, [each.cmdline() for each in children]
    os.kill(scorers[0].pid, 9)
    found = running.flags("refused", said(running.probe.plain))
    assert (found["metadata"]["rule"], found["metadata"]["failed"]) == ("on_failure", "down")
    assert running.flags("tools", said("hi")) is None, "other shields go on"
    until = time.monotonic() + LIMIT_S
    while running.flags("refused", said(running.probe.plain)) is not None:
        assert time.monotonic() < until, health(running)
        time.sleep(0.5)
    wait_ready(running)


def test_the_start_says_what_was_configured(running: Running) -> None:
    log = " ".join(running.server.log.read_text(errors="replace").split())
    assert "moe-guard: without a score: block; rules: default; probes: refused;" in log
    assert running.probe.flagged not in log, "nothing of a conversation is in the log"


@pytest.mark.parametrize("host", hosts(HostName.OGX))
def test_a_wrong_configuration_ends_the_start(host: HostUnderTest, tmp_path: Path) -> None:
    """Without a choice of `on_failure`, and with a probe that is none."""
    required(host)
    name = "ogx_guarded.yaml" if host.name is HostName.OGX else "guarded.yaml"
    content = yaml.safe_load((RUN_CONFIGS / name).read_text(encoding="utf-8"))
    if host.name is HostName.OGX:
        content["external_apis_dir"] = str(RUN_CONFIGS / "external_apis_guarded")
    del content["providers"]["safety"][0]["config"]["on_failure"]
    path = tmp_path / name
    path.write_text(yaml.safe_dump(content))
    env = {"MOE_PROBE": str(tmp_path)}
    start = serving(path, tmp_path / "state", "/v1/safety/health", env, command=host.command)
    with pytest.raises(AssertionError, match="on_failure: is missing") as ended, start:
        pass
    assert "Traceback" not in str(ended.value)


@pytest.mark.parametrize("host", hosts(HostName.OGX))
def test_rules_alone_need_no_model_and_no_probe(host: HostUnderTest, tmp_path: Path) -> None:
    required(host)
    name = HOSTS[host.name].guarded[1]
    done = moe_train("init", str(tmp_path / "new"), "--server", name, "--host", host.name)
    assert done.code == 0, done.err
    start = serving(tmp_path / "new" / f"{name}.yaml", tmp_path / "state", "/v1/safety/health", command=host.command)
    with start as server:
        found = httpx.get(f"{server.url}/v1/safety/health", timeout=60).json()
        assert (found["status"], found["scorer"]) == ("ok", "none")
        for path, code in (("/etc/passwd", 1), ("/srv/docs/a.txt", 0)):
            file = tmp_path / "conversation.json"
            file.write_text(json.dumps(calling("read_file", {"path": path})))
            assert moe_train("guard", "run", str(file), "--url", server.url).code == code
