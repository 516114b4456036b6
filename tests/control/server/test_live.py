"""Tests a real `llama stack run run_configs/quickstart.yaml` with httpx and llama-stack-client 0.6.1.

Training processes are tiny fakes. `test_e2e` has jobs that really train, and the errors that only the training process
can find (a hub model that does not exist, DoRA on a family with experts).
"""

import json
import sqlite3
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from llama_stack_client import APIStatusError

from llama_stack_provider_moe.jobdir.folder import JobFolder
from tests.support.bad_inputs import (
    BODIES,
    DATASETS,
    DPO,
    GOOD_BODIES,
    JOBS,
    PAIRS,
    REQUESTS,
    SFT,
    WORDS,
    Bad,
    BadRequest,
)
from tests.support.host_harness import QUICKSTART, RUN_CONFIGS, Server, run_config, serving, tiny_interpreter
from tests.support.jobs_support import wait_for
from tests.support.live_folders import everything

pytestmark = pytest.mark.e2e

TEMPLATES = sorted((RUN_CONFIGS.parent / "job_templates").glob("*.json"))
CAUSAL = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
# Heavy libraries, by the files that a process maps once it has loaded them.
HEAVY = ("libtorch", "/torch/", "/triton/", "/tokenizers/", "/safetensors/", "/bitsandbytes/")


def model_at(folder: Path, config: dict[str, Any], *files: str) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", *files):
        (folder / name).write_text("{}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("live")
    provider = {
        "training_python": tiny_interpreter(folder),
        "supervisor": {"poll_s": 0.1},
        # Destinations in the templates, so that they are valid here; no job of these tests uses them.
        "unsloth_python": sys.executable,
        "executors": {"ray": {"address": "http://127.0.0.1:8265"}},
    }
    config = run_config(QUICKSTART, folder, provider=provider)
    with serving(config, folder / "state") as running:
        for dataset_id, rows in DATASETS.items():
            running.register(dataset_id, rows)
        models = running.config().models_dir
        model_at(models / "causal", CAUSAL, "model.safetensors")
        model_at(models / "masked", {"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "model.safetensors")
        model_at(models / "pickled", CAUSAL, "pytorch_model.bin")
        model_at(models / "adapter", CAUSAL, "adapter_config.json", "adapter_model.safetensors")
        model_at(folder / "outside" / "causal", CAUSAL, "model.safetensors")
        yield running


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


@pytest.fixture(scope="module")
def taken(http: httpx.Client) -> str:
    """The id of a job that has completed."""
    body = GOOD_BODIES[JOBS] | {"job_uuid": "taken"}
    assert http.post(JOBS, json=body).json() == {"job_uuid": "taken"}
    assert ended(http, "taken")["status"] == "completed"
    return "taken"


def ended(http: httpx.Client, job_id: str) -> dict[str, Any]:
    """All details of a job, once it has ended."""

    def look() -> dict[str, Any] | None:
        job: dict[str, Any] = http.get(f"/jobs/{job_id}").json()
        return job if job["completed_at"] else None

    job = wait_for(look)
    assert job is not None
    return job


def port(answer: httpx.Response) -> int:
    """Our end of the connection that `answer` came over: another one, another number."""
    address: tuple[str, int] = answer.extensions["network_stream"].get_extra_info("client_addr")
    return address[1]


def message(answer: httpx.Response) -> str:
    """The text of an error, which must have exactly this shape."""
    content = answer.json()
    assert list(content) == ["error"], content
    assert list(content["error"]) == ["message"]
    text: str = content["error"]["message"]
    return text


def kept(state_dir: Path) -> dict[str, int]:
    """Every file and folder of the state folder with its size, but for databases and the processes' own logs."""
    found = {}
    for path, stats in everything(state_dir):
        name = str(path.relative_to(state_dir))
        if ".db" not in name and name not in ("server.log", "supervisor.log"):
            found[name] = stats.st_size if stat.S_ISREG(stats.st_mode) else -1
    return found


# First the idle server, before any job has started a supervisor.


def test_healthy_and_without_torch(server: Server, http: httpx.Client) -> None:
    health = http.get("/health").json()
    assert (health["status"], health["store"], health["supervisor"]) == ("ok", "ok", "none")
    assert set(health["jobs"].values()) == {0}
    mapped = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "pydantic_core" in mapped, "this must be the server process"
    assert not [name for name in HEAVY if name in mapped]


def assert_idle(pid: int, wakes_per_s: float) -> None:
    """Check that the process sleeps most of the time and is not woken too often.

    A busy loop never sleeps, and one with a short poll wakes up too often. Processor time is not a measure here: a
    virtual machine on a busy host charges stolen time to running processes.
    """
    process = psutil.Process(pid)
    wakes, began = process.num_ctx_switches().voluntary, time.monotonic()
    time.sleep(5)
    rate = (process.num_ctx_switches().voluntary - wakes) / (time.monotonic() - began)
    assert 0.5 < rate < wakes_per_s


def test_an_idle_server_sleeps(server: Server) -> None:
    assert_idle(server.process.pid, wakes_per_s=25)  # uvicorn looks at its flags ten times a second


def test_an_idle_supervisor_sleeps(server: Server, taken: str) -> None:
    holder = wait_for(lambda: _supervisor(server))
    assert holder is not None
    assert_idle(holder, wakes_per_s=60)  # `poll_s` is 0.1 here


def _supervisor(server: Server) -> int | None:
    from llama_stack_provider_moe.control.store.store import JobStore

    store = JobStore(server.config().url)
    try:
        holder = store.live_supervisor()
        return None if holder is None else holder.pid
    finally:
        store.close()


# Good requests.


def test_old_and_new_routes_give_the_same_answers(http: httpx.Client, taken: str) -> None:
    for what in ("status", "artifacts"):
        new, old = http.get(f"/jobs/{taken}/{what}"), http.get(f"/job/{what}", params={"job_uuid": taken})
        assert (new.status_code, old.status_code) == (200, 200)
        assert new.json() == old.json()
        assert new.json()["checkpoints"], "the comparison needs a checkpoint"
    for path, query in ((f"/jobs/{taken}/cancel", {}), ("/job/cancel", {"job_uuid": taken})):
        answer = http.post(path, params=query)
        assert answer.status_code == 409
        assert message(answer) == message(http.post("/job/cancel", json={"job_uuid": taken}))


def test_the_clients_calls(server: Server, taken: str) -> None:
    api = server.client().alpha.post_training
    status = api.job.status(extra_query={"job_uuid": taken})
    assert (status.job_uuid, status.status) == (taken, "completed")
    assert status.resources_allocated["percent"] == 100
    artifacts = api.job.artifacts(extra_query={"job_uuid": taken})
    assert [each.identifier for each in artifacts.checkpoints] == [each.identifier for each in status.checkpoints]
    assert taken in [job.job_uuid for job in api.job.list()]
    with pytest.raises(APIStatusError, match="pass extra_query=") as caught:
        api.job.status()
    assert caught.value.status_code == 400


def test_the_clients_submissions_with_our_blocks(server: Server, http: httpx.Client) -> None:
    api = server.client().alpha.post_training
    extra = {"moe": {"router_z_loss_coef": 0.01}, "options": {"seed": 7}}
    api.supervised_fine_tune(**GOOD_BODIES[SFT] | {"job_uuid": "by-sft", "extra_body": extra})
    api.preference_optimize(**GOOD_BODIES[DPO] | {"job_uuid": "by-dpo", "extra_body": extra})
    for job_id, recipe in (("by-sft", "sft"), ("by-dpo", "dpo")):
        job = ended(http, job_id)
        assert (job["status"], job["recipe"], job["model"]) == ("completed", recipe, "owner/name")
        spec = job["spec"]
        assert (spec["options"]["seed"], spec["moe"]["router_z_loss_coef"]) == (7, 0.01)
        assert spec["training"]["dtype"] == "fp32", "the default comes from the run YAML"
        rows = JobFolder(Path(job["folder"])).train_rows.read_text().splitlines()
        assert len(rows) == len(WORDS if recipe == "sft" else PAIRS)


def test_job_details_and_output(http: httpx.Client, taken: str) -> None:
    job = http.get(f"/jobs/{taken}").json()
    assert job["spec"]["data"]["dataset_id"] == "words"
    assert job["attempts"] == 1
    assert [each["kind"] for each in job["checkpoints"]] == ["adapter"]
    logs = http.get(f"/jobs/{taken}/logs").json()
    assert logs["log_lines"] == ["hello from the child"]
    rest = http.get(f"/jobs/{taken}/logs", params={"offset": logs["next_offset"]}).json()
    assert (rest["log_lines"], rest["next_offset"]) == ([], logs["next_offset"])


def test_jobs_come_in_pages(http: httpx.Client, taken: str) -> None:
    ids = [job["job_uuid"] for job in http.get("/jobs").json()["data"]]
    paged: list[str] = []
    while True:
        page = http.get("/jobs", params={"limit": 1} | ({"after": paged[-1]} if paged else {})).json()
        paged += [job["job_uuid"] for job in page["data"]]
        if not page["has_more"]:
            break
    assert paged == ids
    assert taken in ids


@pytest.mark.parametrize("old_route", [False, True], ids=["new", "old"])
def test_cancel_of_a_running_and_of_a_waiting_job(http: httpx.Client, old_route: bool) -> None:
    names = [f"slow-{old_route}", f"slow-waits-{old_route}"]

    def cancel(job_id: str) -> httpx.Response:
        if old_route:
            return http.post("/job/cancel", json={"job_uuid": job_id})
        return http.post(f"/jobs/{job_id}/cancel")

    for name in names:
        assert http.post(JOBS, json=GOOD_BODIES[JOBS] | {"job_uuid": name}).status_code == 200
    running = wait_for(lambda: http.get(f"/jobs/{names[0]}/status").json()["resources_allocated"]["step"])
    assert 0 < running < 2000
    waiting = http.get(f"/jobs/{names[1]}/status").json()
    assert (waiting["status"], waiting["resources_allocated"]["queue_position"]) == ("scheduled", 1)
    for name in reversed(names):
        assert cancel(name).status_code == 200
        assert cancel(name).status_code == 200, "a second request changes nothing"
    assert http.get(f"/jobs/{names[1]}/status").json()["status"] == "cancelled", "at once"
    stopped = ended(http, names[0])
    assert stopped["status"] == "cancelled"
    assert [each["kind"] for each in stopped["checkpoints"]] == ["checkpoint"], "the job keeps its checkpoint"


def test_validation_returns_the_job_and_creates_nothing(server: Server, http: httpx.Client) -> None:
    before = kept(server.state_dir), http.get("/jobs").json()
    answer = http.post("/jobs/validate", json=GOOD_BODIES[JOBS] | {"model": "causal"}).json()
    assert answer["train_rows"] == len(WORDS)
    assert answer["spec"]["model"] == str(server.config().models_dir / "causal")
    assert answer["spec"]["options"]["max_grad_norm"] == 1.0
    assert (kept(server.state_dir), http.get("/jobs").json()) == before


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_templates_validate_on_the_server(http: httpx.Client, server: Server, path: Path) -> None:
    body = json.loads(path.read_text(encoding="utf-8"))
    # The names in a template are placeholders for the user's names.
    if body["recipe"] in ("export", "ablation"):  # everything is valid except the job, which only the user's server has
        answer = http.post("/jobs/validate", json=body)
        named = body["of" if body["recipe"] == "export" else "measurements"]
        assert (answer.status_code, message(answer)) == (404, f"job {named!r} does not exist")
        return
    if body["recipe"] in ("playground", "mix"):  # they read no rows
        answer = http.post("/jobs/validate", json=body)
        assert (answer.status_code, answer.json()["rows"]) == (200, {})
        return
    compares = body["recipe"] in ("routing_analysis", "ablation_measure", "probe")
    if compares:
        body["data"]["sets"] = dict.fromkeys(body["data"]["sets"], "words")
        if body["recipe"] == "probe":  # it needs more rows than these tests have
            answer = http.post("/jobs/validate", json=body)
            assert answer.status_code == 400, answer.text
            assert "expected at least 30 rows" in message(answer)
            return
    else:
        registered = {"dpo": "pairs", "kto": "thumbs", "reward": "pairs"}.get(body["recipe"], "words")
        part = "calibration" if body["recipe"] == "surgery" else "train"
        domains = {f"{part}-{each['name']}": each for each in body["data"].get("domains", ())}
        sets = {
            **(domains or {part: body["data"]}),
            **{name: body.get("circuit_breaker", {}).get(name) for name in ("retain", "safe")},
        }
        sets = {name: data for name, data in sets.items() if data is not None}
        for data in sets.values():
            data["dataset_id"] = registered
        asked: dict[str, str] = {}
        if "eval" in body:
            asked = {"refuse": "words", "safe": "words", "retain": "words", "scenarios": "scenarios"}
            body["eval"] |= {f"{name}_dataset_id": dataset_id for name, dataset_id in asked.items()}
            body["eval"]["judge"]["labelled_dataset_id"] = asked["labelled"] = "judged"
    answer = http.post("/jobs/validate", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["spec"]["model"] == body["model"]
    rows = answer.json()["rows"]
    if compares:
        assert rows == {f"set-{name}": len(WORDS) for name in body["data"]["sets"]}
    else:
        named = dict.fromkeys(sets, registered) | {f"eval-{name}": dataset_id for name, dataset_id in asked.items()}
        assert rows == {name: len(DATASETS[dataset_id]) for name, dataset_id in named.items()}
        train_rows = sum(count for name, count in rows.items() if name.partition("-")[0] == "train")
        assert answer.json()["train_rows"] == train_rows


# Bad requests: status and text are right, nothing is created, and the connection stays open.


def refused(server: Server, http: httpx.Client, request: httpx.Request, status: int, text: str) -> None:
    """Check that `request` gets this answer, changes nothing, and keeps its connection open."""
    before = kept(server.state_dir), http.get("/jobs")
    answer = http.send(request)
    after = kept(server.state_dir), http.get("/jobs")
    assert answer.status_code == status, answer.text
    assert text in message(answer)
    assert len(message(answer)) < 4000, "an error must not contain a data set"
    assert after[0] == before[0]
    assert after[1].json() == before[1].json()
    assert port(before[1]) == port(answer) == port(after[1]), "the connection was dropped"


@pytest.mark.parametrize("bad", BODIES, ids=lambda bad: bad.name)
def test_bad_bodies(server: Server, http: httpx.Client, taken: str, bad: Bad) -> None:
    body = bad.body(models=str(server.config().models_dir), outside=str(server.state_dir.parent / "outside"))
    content = json.dumps(body)  # httpx's own `json=` refuses NaN
    headers = {"content-type": "application/json"}
    request = http.build_request("POST", bad.route.split()[0], content=content, headers=headers)
    refused(server, http, request, bad.status, bad.text)


@pytest.mark.parametrize("bad", REQUESTS, ids=lambda bad: bad.name)
def test_bad_requests(server: Server, http: httpx.Client, taken: str, bad: BadRequest) -> None:
    headers = {} if bad.content is None else {"content-type": bad.content_type}
    request = http.build_request(bad.method, bad.path, content=bad.content, headers=headers)
    refused(server, http, request, bad.status, bad.text)


def test_good_bodies_are_good(http: httpx.Client) -> None:
    """Otherwise a bad body might be refused for a different reason."""
    for route, body in GOOD_BODIES.items():
        job = body | {"job_uuid": "good-" + route.strip("/").replace(" ", "-")}
        answer = http.post(route.split()[0], json=job)
        assert answer.status_code == 200, answer.text
        assert ended(http, job["job_uuid"])["status"] == "completed"


def test_an_unexpected_exception_becomes_an_answer(server: Server, http: httpx.Client, taken: str) -> None:
    """Break a table in the store; an unreadable value in a row would not raise an exception."""

    def alter(words: str) -> None:
        with closing(sqlite3.connect(server.config().state_dir / "jobs.db")) as database, database:
            database.execute(f"ALTER TABLE moe_jobs RENAME COLUMN {words}")

    alter("recipe TO receipt")
    try:
        before = http.get("/health")
        answer = http.get(f"/jobs/{taken}")
        assert answer.status_code == 500
        assert message(answer) == "the server failed on an unexpected error; see the server's log"
        wait_for(lambda: "no such column" in server.log.read_text(errors="replace"))
    finally:
        alter("receipt TO recipe")
    assert http.get(f"/jobs/{taken}").status_code == 200
    assert port(before) == port(answer) == port(http.get("/health"))
