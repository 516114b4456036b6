"""One job that really trains, owners, tenants and the access policy, on each host (`tests.support.other_hosts`).

On OGX every user has a tenant; two tenants have a user of the same name.
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest

from llama_stack_provider_moe.control.cli.hosts import HostName
from tests.support import tiny_models
from tests.support.authority import authority
from tests.support.bad_inputs import WORDS
from tests.support.host_harness import Server
from tests.support.other_hosts import POLICY, HostUnderTest, hosts, register, required, serving_on, upload

pytestmark = pytest.mark.e2e

FINE_TUNING = "/v1/fine_tuning"
LIMIT_S = 800.0  # a process that imports torch and trl, on cores that others use too
JSONL = "".join(json.dumps(row) + "\n" for row in WORDS).encode()


def user(principal: str, tenant: str, role: str = "user") -> dict[str, Any]:
    return {"principal": principal, "tenant": tenant, "attributes": {"roles": [role]}}


USERS = {
    "alice": user("alice", "red"),
    "bob": user("bob", "red"),
    "carol": user("carol", "red"),
    "root": user("root", "red", "admin"),
    "blue-alice": user("alice", "blue"),
    "blue-root": user("root", "blue", "admin"),
}


class Running(NamedTuple):
    """A server on a host, and a client for each user by token."""

    host: HostUnderTest
    server: Server
    clients: dict[str, httpx.Client]

    def strangers(self) -> list[str]:
        """Who may not know of Alice's jobs. Without tenants both Alices are one, and both administrators too."""
        return ["bob", "carol", *(["blue-alice", "blue-root"] if self.host.has_tenants else [])]

    def owners(self) -> list[str]:
        """Users without a role, who own what they make."""
        return ["alice", "bob", "carol", *(["blue-alice"] if self.host.has_tenants else [])]


@pytest.fixture(scope="module", params=hosts(HostName.LLAMA_STACK_0_7))
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    host = required(request.param)
    folder = tmp_path_factory.mktemp("host")
    provider = {
        "training_python": sys.executable,  # the host's environment has no torch
        "child_env": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        "prometheus": True,
        "supervisor": {"poll_s": 0.2},
    }
    with authority(USERS) as endpoint:
        auth: dict[str, Any] = {"provider_config": {"type": "custom", "endpoint": endpoint}, "access_policy": POLICY}
        server: dict[str, Any] = {"auth": auth}
        if host.has_tenants:
            auth["provider_config"]["tenant_field"] = "tenant"
            server["tenancy"] = {"mode": "multi"}
        with serving_on(host, folder, provider, {"server": server}) as made:
            tiny_models.build("granitemoe", made.state_dir / "models" / "tiny")
            clients = {token: made.http(token=token) for token in USERS}
            yield Running(host, made, clients)
            for client in clients.values():
                client.close()


@pytest.fixture(scope="module")
def file_id(running: Running) -> str:
    return upload(running.server, running.host, JSONL, token="alice")


@pytest.fixture(scope="module")
def job(running: Running, file_id: str) -> str:
    """Alice's job, which has trained on a file that she uploaded to the host."""
    body = {
        "recipe": "sft", "model": "tiny", "job_uuid": "alices-own", "data": {"dataset_id": file_id},
        "training": {"n_epochs": 1, "batch_size": 8, "gradient_accumulation_steps": 1}, "adapter": {"rank": 2},
        "options": {"max_length": 64},
    }  # fmt: skip
    alice = running.clients["alice"]
    answer = alice.post("/jobs", json=body)
    assert answer.status_code == 200, answer.text
    until = time.monotonic() + LIMIT_S
    while not alice.get("/jobs/alices-own").json()["completed_at"]:
        assert time.monotonic() < until, "the job does not end"
        time.sleep(0.5)
    return "alices-own"


def test_a_job_trains_on_a_file_of_the_host(running: Running, job: str, file_id: str) -> None:
    alice = running.clients["alice"]
    found = alice.get(f"/jobs/{job}").json()
    assert found["status"] == "completed", found.get("reason")
    assert found["sources"]["train"] == {"kind": "host file", "id": file_id, "version": None, "rows": len(WORDS)}
    assert "adapter" in [each["kind"] for each in found["checkpoints"]]
    files = alice.get(f"/jobs/{job}/artifacts/adapter").json()["files"]
    (weights,) = [each for each in files if each["path"] == "adapter_model.safetensors"]
    assert len(alice.get(f"/jobs/{job}/artifacts/adapter/{weights['path']}").content) == weights["bytes"]


def test_nobody_else_finds_anything(running: Running, job: str) -> None:
    nothing = {"error": {"message": f"job {job!r} does not exist"}}
    for token in running.strangers():
        client = running.clients[token]
        assert client.get("/jobs").json() == {"data": [], "has_more": False}, token
        for path in ("", "/status", "/artifacts", "/artifacts/adapter", "/logs", "/logs?follow=true", "/events"):
            answer = client.get(f"/jobs/{job}{path}")
            assert (answer.status_code, answer.json()) == (404, nothing), f"{token} {path}"
        for path in ("cancel", "resume"):
            assert client.post(f"/jobs/{job}/{path}").status_code == 404, f"{token} {path}"
        assert client.delete(f"/jobs/{job}").status_code == 404, token
    with running.server.http() as nobody:
        assert nobody.get("/health").status_code == 200
        for path in ("/jobs", f"/jobs/{job}", "/metrics", "/datasets", running.server.url + FINE_TUNING):
            assert nobody.get(path).status_code == 401, path


def test_nobody_else_finds_anything_by_openais_routes(running: Running, job: str) -> None:
    url = running.server.url + FINE_TUNING
    own = running.clients["alice"].get(f"{url}/jobs/ftjob-{job}").json()
    assert (own["status"], len(own["result_files"])) == ("succeeded", 1)
    file = f"{url}/files/{own['result_files'][0]}"
    assert running.clients["alice"].get(f"{file}/content").status_code == 200
    for token in running.strangers():
        client = running.clients[token]
        assert client.get(f"{url}/jobs").json()["data"] == [], token
        for path in ("", "/events", "/checkpoints"):
            answer = client.get(f"{url}/jobs/ftjob-{job}{path}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), f"{token} {path}"
        for path in ("cancel", "pause", "resume"):
            assert client.post(f"{url}/jobs/ftjob-{job}/{path}").status_code == 404, f"{token} {path}"
        assert [client.get(each).status_code for each in (file, f"{file}/content")] == [404, 404], token


def test_an_administrator_reaches_the_jobs_of_the_tenant(running: Running, job: str) -> None:
    root = running.clients["root"]
    assert [each["job_uuid"] for each in root.get("/jobs").json()["data"]] == [job]
    assert root.get("/jobs", params={"after": job}).json()["data"] == []
    assert root.get(f"/jobs/{job}/status").json()["status"] == "completed"
    assert root.post(f"/jobs/{job}/cancel").status_code == 409
    # The figures count the jobs of every tenant.
    expected = 403 if running.host.has_tenants else 200
    assert (root.get("/metrics").status_code, running.clients["bob"].get("/metrics").status_code) == (expected, 403)


def validated(running: Running, token: str, dataset_id: str) -> httpx.Response:
    body = {"recipe": "sft", "model": "tiny", "data": {"dataset_id": dataset_id}}
    return running.clients[token].post("/jobs/validate", json=body)


def test_rows_of_every_kind_are_their_owners_alone(running: Running, file_id: str) -> None:
    alice = running.clients["alice"]
    assert alice.put("/datasets/hers", content=JSONL).status_code == 200
    kinds = {file_id: "host file", f"host:{file_id}": "host file", "hers": "data", "data:hers": "data"}
    if running.host.has_datasets:
        register(running.server, running.host, "registered", WORDS, token="alice")
        kinds |= {"registered": "host data set", "host:registered": "host data set"}
    for dataset_id, kind in kinds.items():
        answer = validated(running, "alice", dataset_id)
        assert answer.status_code == 200, answer.text
        assert answer.json()["sources"]["train"]["kind"] == kind
        assert answer.json()["train_rows"] == len(WORDS)
        for token in running.strangers():
            answer = validated(running, token, dataset_id)
            assert answer.status_code == 404, f"{token} {dataset_id}: {answer.text}"
    for token in running.strangers():
        assert running.clients[token].get("/datasets").json()["data"] == []
        assert running.clients[token].put("/datasets/hers", content=JSONL * 2).json()["is_new"], "the name is free"
    assert alice.get("/datasets/hers").json()["versions"][0]["rows"] == len(WORDS)


def test_principals_are_stored_as_hashes(running: Running, job: str) -> None:
    for path in running.server.state_dir.glob("jobs.db*"):
        assert b"alice" not in path.read_bytes().replace(b"alices-own", b""), path


def test_each_owner_sees_the_own_jobs_alone(running: Running, job: str) -> None:
    """Three owners, and on a host with tenants a fourth, who has the name of the first."""
    made: dict[str, str] = {}
    for token in running.owners():
        client = running.clients[token]
        assert client.put("/datasets/own", content=JSONL).status_code == 200
        body = {"recipe": "sft", "model": "tiny", "data": {"dataset_id": "own"}, "adapter": {"rank": 2}}
        made[token] = client.post("/jobs", json=body).json()["job_uuid"]
        assert client.post(f"/jobs/{made[token]}/cancel").status_code == 200
    for token in running.owners():
        client = running.clients[token]
        seen = {each["job_uuid"] for each in client.get("/jobs").json()["data"]}
        assert seen == {made[token], *([job] if token == "alice" else [])}, token
        listed = client.get(running.server.url + FINE_TUNING + "/jobs").json()["data"]
        assert {each["id"] for each in listed} == {f"ftjob-{name}" for name in seen}, token
        for other in made.values():
            expected = 200 if other == made[token] else 404
            assert client.get(f"/jobs/{other}/status").status_code == expected, f"{token} {other}"


def test_the_dashboard_is_public_and_its_data_are_not(running: Running) -> None:
    with httpx.Client(base_url=running.server.url, timeout=60) as nobody:
        for path in ("/moe", "/moe/jobs/any", "/moe/compare", "/moe/data/any", "/moe/new", "/moe/static/app.css"):
            answer = nobody.get(path)
            assert answer.status_code == 200, f"{path}: {answer.text}"
            assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert nobody.get("/moe/static/no.js").status_code == 404
        for path in ("/jobs", "/overview", "/figures?jobs=any", "/templates", "/schema"):
            assert nobody.get(f"/v1alpha/post-training{path}").status_code == 401, path
    assert running.clients["alice"].get("/overview").status_code == 200
