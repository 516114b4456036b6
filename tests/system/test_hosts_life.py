"""On each host: files of every form and of any size, also in S3; restarts; open streams when a server ends.

`make test-hosts` runs it; training processes are tiny fakes.
"""

import gzip
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import psutil
import pytest

from llama_stack_provider_moe.control.cli.hosts import HOSTS
from tests.support.bad_inputs import WORDS
from tests.support.cli_support import moe_train
from tests.support.free_ports import free_port
from tests.support.host_harness import Server, serving, tiny_interpreter
from tests.support.jobs_support import wait_for
from tests.support.live_folders import contents
from tests.support.other_hosts import ALL, POLICY, HostUnderTest, required, serving_on, upload
from tests.support.s3_server import AWS, s3

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

__all__ = ["s3"]  # a fixture
BODY: dict[str, Any] = {"recipe": "sft", "model": "owner/name"}
JSONL = "".join(json.dumps(row) + "\n" for row in WORDS).encode()
CSV = ("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in WORDS)).encode()
LARGE_BYTES, MOST_GROWTH_BYTES = 400 << 20, 120 << 20


@pytest.fixture(scope="module", params=ALL, ids=lambda host: host.name)
def host(request: pytest.FixtureRequest) -> HostUnderTest:
    return required(request.param)


def provider(folder: Path) -> dict[str, Any]:
    return {"training_python": tiny_interpreter(folder), "supervisor": {"poll_s": 0.1}}


@pytest.fixture(scope="module")
def server(host: HostUnderTest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("life")
    with serving_on(host, folder, provider(folder)) as running:
        yield running


def validated(server: Server, dataset_id: str) -> httpx.Response:
    with server.http() as http:
        return http.post("/jobs/validate", json={**BODY, "data": {"dataset_id": dataset_id}})


def test_the_files_of_init_start_a_server(host: HostUnderTest, tmp_path: Path) -> None:
    assert moe_train("init", str(tmp_path / "new folder"), "--host", host.name).code == 0
    config = tmp_path / "new folder" / f"{HOSTS[host.name].server}.yaml"
    with serving(config, tmp_path / "state", command=host.command) as server, server.http() as http:
        assert http.get("/jobs").json() == {"data": [], "has_more": False}


@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.jsonl", JSONL), ("rows", gzip.compress(JSONL)), ("rows.CSV", CSV), ("rows.csv.gz", gzip.compress(CSV))],
)
def test_a_file_of_every_form(server: Server, host: HostUnderTest, name: str, content: bytes) -> None:
    answer = validated(server, upload(server, host, content, name))
    assert (answer.status_code, answer.json().get("train_rows")) == (200, len(WORDS)), answer.text


def test_what_is_wrong_with_a_file_is_named(server: Server, host: HostUnderTest) -> None:
    bad = upload(server, host, JSONL + b"\n{'prompt': 1}\n")
    answer = validated(server, bad)
    assert answer.status_code == 400
    assert f"dataset '{bad}': 1 problem(s)" in answer.text
    assert f"row {len(WORDS) + 1}: line {len(WORDS) + 2}: " in answer.text
    for content, says in ((b"\n\n", "a file with rows; this one is empty"), (b"PAR1....", "this is a Parquet file")):
        answer = validated(server, upload(server, host, content))
        assert answer.status_code == 400
        assert "data.dataset_id: 'file-" in answer.json()["error"]["message"]
        assert says in answer.json()["error"]["message"]
    for missing in ("file-" + "0" * 32, "host:file-" + "0" * 32):
        answer = validated(server, missing)
        assert (answer.status_code, "was uploaded to this server" in answer.text) == (404, True), answer.text
    other = validated(server, "words")  # localfs of OGX calls such an id invalid
    assert other.status_code == 404, other.text


def large(path: Path) -> int:
    """A file of `LARGE_BYTES`; its number of rows."""
    row = json.dumps({"prompt": "a" * 4000, "completion": "b" * 4000}).encode() + b"\n"
    with path.open("wb") as file:
        for _ in range(LARGE_BYTES // len(row) // 64):
            file.write(row * 64)
    return LARGE_BYTES // len(row) // 64 * 64


def growth_while_reading(server: Server, dataset_id: str, rows: int) -> int:
    """Bytes by which the server's memory grows at most while a job is made of a large file."""
    process = psutil.Process(server.process.pid)
    before = most = process.memory_info().rss
    done: list[httpx.Response] = []
    with server.http(timeout_s=600) as http:
        body = {**BODY, "job_uuid": f"large-{time.monotonic_ns()}", "data": {"dataset_id": dataset_id}}
        asking = threading.Thread(target=lambda: done.append(http.post("/jobs", json=body)))
        asking.start()
        slowest = 0.0
        with server.http() as other:
            while asking.is_alive():
                began = time.monotonic()
                assert other.get("/health").status_code == 200
                slowest = max(slowest, time.monotonic() - began)
                most = max(most, process.memory_info().rss)
                time.sleep(0.05)
        asking.join()
        assert done[0].status_code == 200, done[0].text
        assert http.get(f"/jobs/{done[0].json()['job_uuid']}").json()["sources"]["train"]["rows"] == rows
    assert slowest < 5, "the server answers others meanwhile"
    return most - before


def test_a_large_file_does_not_fill_the_memory(server: Server, host: HostUnderTest, tmp_path: Path) -> None:
    validated(server, upload(server, host, JSONL))  # what the first read of a file loads
    large_id = upload(server, host, JSONL)
    rows = large(server.state_dir / "host-files" / large_id)  # the host's upload itself reads a file whole
    grown = growth_while_reading(server, large_id, rows)
    assert grown < MOST_GROWTH_BYTES, f"{grown / 2**20:.0f} MB"


def test_files_in_s3(host: HostUnderTest, s3: str, tmp_path: Path) -> None:
    config = {
        "bucket_name": "bucket", "region": "us-east-1", "endpoint_url": s3, "aws_access_key_id": "key",
        "aws_secret_access_key": "secret", "metadata_store": {"table_name": "s3_files", "backend": "sql_default"},
    }  # fmt: skip
    stack = {"providers": {"files": [{"provider_id": "s3", "provider_type": "remote::s3", "config": config}]}}
    client = boto3.client("s3", endpoint_url=s3, aws_access_key_id="key", aws_secret_access_key="secret",
                          region_name="us-east-1")  # fmt: skip
    with serving_on(host, tmp_path, provider(tmp_path), stack, env=AWS) as server:
        small = upload(server, host, JSONL)
        assert validated(server, small).json()["train_rows"] == len(WORDS)
        rows = large(tmp_path / "large")
        client.upload_file(str(tmp_path / "large"), "bucket", small)
        grown = growth_while_reading(server, small, rows)
        assert grown < MOST_GROWTH_BYTES, f"{grown / 2**20:.0f} MB"
        client.delete_object(Bucket="bucket", Key=small)
        assert validated(server, small).status_code in (404, 503)


def test_a_model_of_the_hosts_inference_is_refused_as_one(host: HostUnderTest, tmp_path: Path) -> None:
    """The registry of models knows it, although its inference server is not there."""
    nobody = {"api_key": "none", "base_url": f"http://127.0.0.1:{free_port()}/v1"}
    # Llama Stack names a model by its provider's name for it, OGX by the id that is given here.
    model = {"model_id": "nobody/llama3.2:3b", "provider_id": "nobody", "provider_model_id": "llama3.2:3b",
             "model_type": "llm"}  # fmt: skip
    stack = {
        "providers": {"inference": [{"provider_id": "nobody", "provider_type": "remote::openai", "config": nobody}]},
        "registered_resources": {"models": [model]},
    }
    rows = ["datasetio"] if host.has_datasets else []
    stack["apis"] = [*rows, "files", "inference", "post_training"]  # type: ignore[assignment]
    given = provider(tmp_path) | {"child_env": {"HF_HUB_OFFLINE": "1"}}
    with serving_on(host, tmp_path, given, stack) as server, server.http() as http:
        served = [each["id"] for each in httpx.get(f"{server.url}/v1/models", timeout=60).json()["data"]]
        assert served == ["nobody/llama3.2:3b"]
        for name in (*served, "llama3.2:3b"):
            body = {"recipe": "sft", "model": name, "data": {"dataset_id": "words"}}
            answer = http.post("/jobs", json=body)
            assert answer.status_code == 400, answer.text
            assert f"model: {name!r} is not valid" in answer.text
            assert "the host's inference serves a model of that name, but a job needs weights" in answer.text
        assert "inference" not in http.post("/jobs", json={**BODY, "data": {"dataset_id": "words"}}).text


def test_a_job_outlives_its_server(host: HostUnderTest, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with serving_on(host, tmp_path, provider(tmp_path)) as first, first.http() as http:
        file_id = upload(first, host, JSONL)
        body = {**BODY, "job_uuid": "slow-one", "data": {"dataset_id": file_id}}
        assert http.post("/jobs", json=body).status_code == 200
        wait_for(lambda: (state / "jobs" / "slow-one" / "output.log").exists())
        first.process.terminate()
        first.process.wait(timeout=60)
        events = (state / "jobs" / "slow-one" / "events.jsonl").stat().st_size
        wait_for(lambda: (state / "jobs" / "slow-one" / "events.jsonl").stat().st_size > events)  # it goes on
        with serving_on(host, tmp_path, provider(tmp_path)) as second, second.http() as again:
            assert again.get("/jobs/slow-one/status").json()["status"] == "in_progress"
            assert validated(second, file_id).json()["train_rows"] == len(WORDS)
            assert again.post("/jobs/slow-one/cancel").status_code == 200
            wait_for(lambda: again.get("/jobs/slow-one/status").json()["status"] == "cancelled")


def test_a_server_ends_although_streams_are_open(host: HostUnderTest, tmp_path: Path) -> None:
    with serving_on(host, tmp_path, provider(tmp_path)) as server, server.http() as http:
        body = {**BODY, "job_uuid": "slow-one", "data": {"dataset_id": upload(server, host, JSONL)}}
        assert http.post("/jobs", json=body).status_code == 200
        wait_for(lambda: (server.state_dir / "jobs" / "slow-one" / "output.log").exists())
        with http.stream("GET", "/jobs/slow-one/logs", params={"follow": True}) as answer:
            lines = answer.iter_lines()
            assert "hello from the child" in next(line for line in lines if line.startswith("data:"))
            began = time.monotonic()
            server.process.terminate()
            assert not any("event: end" in line for line in lines), "the job continues"
        server.process.wait(timeout=30)
        assert time.monotonic() - began < 20


def test_several_processes_of_a_server_have_one_store(host: HostUnderTest, tmp_path: Path) -> None:
    """Each process would have its own jobs if they were in memory."""
    stack = {"server": {"workers": 2}}
    with serving_on(host, tmp_path, provider(tmp_path), stack) as server:
        processes = psutil.Process(server.process.pid).children(recursive=True)
        assert len([each for each in processes if "spawn_main" in " ".join(each.cmdline())]) == 2
        file_id = upload(server, host, JSONL)
        ids = [f"job-{number}" for number in range(4)]
        for job_id in ids:  # each connection is accepted by one of the processes
            body = {**BODY, "job_uuid": job_id, "data": {"dataset_id": file_id}}
            with server.http() as http:
                assert http.post("/jobs", json=body).status_code == 200
        for _ in range(8):
            with server.http() as http:
                assert {each["job_uuid"] for each in http.get("/jobs").json()["data"]} == set(ids)
        with server.http() as http:
            wait_for(lambda: all(each["status"] == "completed" for each in http.get("/jobs").json()["data"]))


def test_an_api_key_is_a_user_and_never_stored(host: HostUnderTest, tmp_path: Path) -> None:
    """OGX makes every key an administrator; with one tenant for all, an administrator reaches everything."""
    if not host.has_tenants:
        pytest.skip("this host has no local_api_key")
    keys = ["key-of-one-person", "key-of-another"]
    auth = {"provider_config": {"type": "local_api_key", "api_keys": keys}, "access_policy": POLICY}
    stack = {"server": {"auth": auth, "tenancy": {"mode": "single", "default_tenant_id": "everybody"}}}
    with serving_on(host, tmp_path, {**provider(tmp_path), "prometheus": True}, stack) as server:
        one, other = (server.http(token=key) for key in keys)
        with one, other, server.http(token="key-of-nobody") as nobody:
            body = {**BODY, "job_uuid": "mine", "data": {"dataset_id": "words"}}
            assert one.put("/datasets/words", content=JSONL).status_code == 200
            assert one.post("/jobs", json=body).status_code == 200
            assert other.post("/jobs", json={**body, "job_uuid": "theirs"}).status_code == 404, "its own data sets"
            assert [each.get("/jobs/mine").status_code for each in (one, other, nobody)] == [200, 200, 401]
            assert [each.get("/metrics").status_code for each in (one, other, nobody)] == [200, 200, 401]
        state = server.state_dir
        found = {path: content for path, content in contents(state)
                 if "jobs" in path.parts or path.name.startswith("jobs.db")}  # fmt: skip
        assert len(found) > 3
        assert not [path for path, content in found.items() if b"key-of" in content]
