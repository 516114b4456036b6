"""Laws of the package's own client, synchronous and asynchronous, against our routes behind uvicorn."""

import asyncio
import hashlib
import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest

from llama_stack_provider_moe.client import AsyncClient, Client, InvalidInput, ServerLost, ServerRefused
from llama_stack_provider_moe.client import patience as patience_of_clients
from llama_stack_provider_moe.client.documents import Status
from llama_stack_provider_moe.client.progress import Line, display_of, words_of
from llama_stack_provider_moe.control.server import stream
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.jobdir.events import EventLog, Step, now
from llama_stack_provider_moe.jobdir.folder import Artifact
from llama_stack_provider_moe.jobdir.state import JobState
from tests.support.free_ports import free_port
from tests.support.host_support import BODY, ROWS, folder_of, over_http, serving_in_process, submit

WEIGHTS = bytes(range(256)) * 4000


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path_factory.mktemp("client")) as made, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "POLL_S", 0.02)
        yield made


@pytest.fixture(scope="module")
def url(service: PostTrainingService) -> Iterator[str]:
    with over_http(service) as found:
        yield found


@pytest.fixture(params=["sync", "async"])
def client(url: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Either client; `call` returns the answer of both."""
    if request.param == "sync":
        with Client(url) as made:
            yield made
        return
    yield Blocking(url)


class Blocking:
    """An `AsyncClient` whose methods block, so that each law is tested on both."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def called(*args: Any, **kwargs: Any) -> Any:
            async with AsyncClient(self._url) as client:
                return await getattr(client, name)(*args, **kwargs)

        return lambda *args, **kwargs: asyncio.run(called(*args, **kwargs))


def completed(service: PostTrainingService) -> str:
    job = submit(service)
    adapter = folder_of(service, job).root / "artifacts" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "weights").write_bytes(WEIGHTS)
    saved = Artifact(
        identifier=f"{job}/adapter", kind="adapter", path=str(adapter), epoch=1, step=2, created_at=now(),
        bytes=len(WEIGHTS),
    )  # fmt: skip
    service.store.move(job, JobState.IN_PROGRESS)
    service.store.move(job, JobState.COMPLETED, artifacts=(saved,))
    return job


def test_both_clients_have_the_same_methods() -> None:
    ours = {name for name in vars(Client) if not name.startswith("_")}
    theirs = {name for name in vars(AsyncClient) if not name.startswith("_")}
    assert ours - theirs == {"words", "push_dataset", "artifact_file"}, "parts of `push` and `download`"
    assert theirs <= ours


def test_a_job_from_validation_to_deletion(client: Any, service: PostTrainingService) -> None:
    assert client.health()["status"] == "ok"
    checked = client.validate(BODY)
    assert checked["train_rows"] == len(ROWS)
    job = client.submit(BODY)["job_uuid"]
    assert client.status(job)["status"] == "scheduled"
    assert client.jobs(limit=1)["data"][0]["job_uuid"] == job
    assert client.quota()["waiting_jobs"]["used"] >= 1
    assert client.quotas()["data"][0]["owner"] == "anonymous"
    client.cancel(job)
    assert client.wait(job, progress=False)["status"] == "cancelled"
    assert client.resume(job) == {"job_uuid": job, "resumes": "from_beginning"}
    client.cancel(job)
    assert client.resume(job, experts_backend="torch")["resumes"] == "from_beginning"
    client.cancel(job)
    assert client.job(job)["spec"]["job_uuid"] == job
    assert client.exports(job)["data"] == []
    assert client.delete(job)["job_uuid"] == job
    with pytest.raises(ServerRefused, match="does not exist") as refused:
        client.status(job)
    assert refused.value.answered == 404


def test_output_events_and_metrics_of_a_job(client: Any, service: PostTrainingService) -> None:
    job = completed(service)
    folder = folder_of(service, job)
    folder.output.write_text("one\ntwo\n")
    log = EventLog(folder.events)
    for step in (1, 2):
        log.append(Step(step=step, max_steps=2, epoch=step / 2, metrics={"loss": 2.0 - step}))
    log.close()
    assert client.logs(job, tail=1)["log_lines"] == ["two"]
    first = client.events(job, limit=1)
    assert len(first["events"]) == 1
    (second,) = client.events(job, cursor=first["cursor"])["events"]
    assert (first["events"][0]["step"], second["step"]) == (1, 2)
    series = client.metrics(job, names=["loss"], since_step=1)
    assert (series["steps"], series["metrics"]) == ([2], {"loss": [0.0]})


def test_data_sets(client: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    from_file, from_rows = client.push("pushed", file), client.push("pushed", ROWS)
    assert from_file["rows"] == len(ROWS)
    assert from_rows["sha256"] == from_file["sha256"]
    assert "pushed" in [each["name"] for each in client.datasets()["data"]]
    assert client.dataset("pushed")["versions"][0]["sha256"] == from_file["sha256"]
    assert client.profile("pushed", timeout_s=60)["is_ready"]
    assert client.delete_dataset("pushed")["versions"] == [from_file["sha256"]]


def test_rows_that_are_no_json_are_named(client: Any) -> None:
    with pytest.raises(InvalidInput, match=r"row 2 has completion"):
        client.push("bad", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": {1, 2}}])
    with pytest.raises(InvalidInput, match=r"rows\[0\]: 'text' is not valid; expected a dictionary"):
        client.push("bad", ["text"])
    with pytest.raises(ServerRefused, match="row 1: "):
        client.push("bad", [{}])


def test_a_download_is_verified_and_resumed(client: Any, service: PostTrainingService, tmp_path: Path) -> None:
    job = completed(service)
    (found,) = client.download(job, tmp_path, ["adapter"])
    target = tmp_path / "adapter" / "weights"
    assert (Path(found["path"]), found["fetched"]) == (target, len(WEIGHTS))
    assert found["sha256"] == hashlib.sha256(target.read_bytes()).hexdigest()
    assert [each["fetched"] for each in client.download(job, tmp_path)] == [0]
    target.rename(target.with_name("weights.part"))
    with target.with_name("weights.part").open("r+b") as part:
        part.truncate(1000)
    assert [each["fetched"] for each in client.download(job, tmp_path)] == [len(WEIGHTS) - 1000]
    assert target.read_bytes() == WEIGHTS
    with pytest.raises(InvalidInput, match="an artifact of the job: adapter"):
        client.download(job, tmp_path, ["none"])


def test_waiting_shows_each_status_once_and_ends(client: Any, service: PostTrainingService) -> None:
    job, seen = submit(service), []

    def show(status: Status) -> None:
        seen.append(status["status"])
        if seen == ["scheduled"]:
            service.store.move(job, JobState.IN_PROGRESS)
        else:
            service.store.move(job, JobState.FAILED, reason="so be it") if len(seen) == 2 else None

    assert client.wait(job, progress=show, poll_s=0.02)["status"] == "failed"
    assert seen == ["scheduled", "in_progress", "failed"]


def test_waiting_has_a_limit(client: Any, service: PostTrainingService) -> None:
    job = submit(service)
    with pytest.raises(TimeoutError, match=rf"job '{job}' has not ended within 0.1 seconds"):
        client.wait(job, progress=False, timeout_s=0.1, poll_s=0.02)


def test_a_server_that_restarts_is_waited_for(service: PostTrainingService) -> None:
    job, port = submit(service), free_port()
    asked = threading.Event()
    result: list[Status] = []
    with over_http(service, port) as url:
        client = Client(url)
        waiting = threading.Thread(
            target=lambda: result.append(client.wait(job, progress=lambda _: asked.set(), poll_s=0.02))
        )
        waiting.start()
        assert asked.wait(60)
    service.store.request_cancel(job, None)
    with over_http(service, port):
        waiting.join(60)
    client.close()
    assert result[0]["status"] == "cancelled"


def test_a_server_that_stays_away_is_given_up(service: PostTrainingService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience_of_clients.Patience.__init__, "__defaults__", (0.2, None))
    job, port = submit(service), free_port()
    with over_http(service, port) as url:
        client = Client(url)
        stop = threading.Event()
        failed: list[Exception] = []

        def wait() -> None:
            try:
                client.wait(job, progress=lambda _: stop.set(), poll_s=0.02)
            except ServerLost as error:
                failed.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        assert stop.wait(60)
    waiting.join(60)
    assert len(failed) == 1
    client.close()


def test_no_server_is_an_error_at_once(tmp_path: Path) -> None:
    with Client(f"http://127.0.0.1:{free_port()}") as client, pytest.raises(ServerLost, match="no server answers"):
        client.wait("job", progress=False)


def test_errors_name_what_the_caller_gave() -> None:
    with pytest.raises(InvalidInput, match=r"^url: 'nowhere' is not valid"):
        Client("nowhere")
    with pytest.raises(InvalidInput, match=r"^api_key: "):
        AsyncClient("http://127.0.0.1", api_key="ключ")
    answer = httpx.MockTransport(lambda _: httpx.Response(401, json={"error": {"message": "who are you?"}}))
    refused = pytest.raises(ServerRefused, match=r"who are you\?; give api_key")
    with Client("http://127.0.0.1", transport=answer) as client, refused:
        client.health()


def test_following_the_output_without_blocking(service: PostTrainingService, url: str) -> None:
    job = submit(service)
    service.store.move(job, JobState.IN_PROGRESS)
    folder_of(service, job).output.write_text("one\n")

    async def followed() -> list[str]:
        lines: list[str] = []
        async with AsyncClient(url) as client:
            async for event in client.follow(job):
                lines += event.data.get("log_lines", [])  # type: ignore[arg-type]
                if event.name == "end":
                    break
                if lines == ["one"]:
                    with folder_of(service, job).output.open("a") as output:
                        output.write("two\n")
                if lines == ["one", "two"]:
                    service.store.move(job, JobState.COMPLETED)
        return lines

    assert asyncio.run(followed()) == ["one", "two"]


# What a person sees.

RUNS: Any = {
    "job_uuid": "j", "status": "in_progress",
    "resources_allocated": {
        "stage": "training", "step": 5, "max_steps": 10, "metrics": {"loss": 1.5}, "eta_s": 12.3
    },
}  # fmt: skip


def test_a_status_in_words() -> None:
    assert words_of(RUNS) == "job j: in progress, training, step 5 of 10, loss 1.5, 12 s left"
    failed: Any = {"job_uuid": "j", "status": "failed", "resources_allocated": {"reason": "out of\x1b[2Jmemory"}}
    assert words_of(failed) == "job j: failed, out of [2Jmemory"
    assert words_of(failed | {"resources_allocated": None}) == "job j: failed"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_one_line_and_a_file_few() -> None:
    terminal, file = Terminal(), io.StringIO()
    for out in (terminal, file):
        line = Line(out)
        for step in range(100):
            progress = {"stage": "training", "step": step, "max_steps": 100}
            line.show(RUNS | {"resources_allocated": progress})
        line.close()
    assert terminal.getvalue().count("\n") == 1
    assert terminal.getvalue().count("\r") == 100
    assert file.getvalue().count("\n") == 10
    assert "\x1b" not in file.getvalue()


def test_a_notebook_has_one_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    display = ModuleType("IPython.display")
    handle = SimpleNamespace(update=drawn.append)
    display.HTML = str  # type: ignore[attr-defined]

    def draw(shown: str, display_id: bool) -> SimpleNamespace:
        drawn.append(shown)
        return handle

    display.display = draw  # type: ignore[attr-defined]
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    with display_of(True) as show:
        show(RUNS)
        show(RUNS)
        show(RUNS | {"job_uuid": "<b>"})
    assert len(drawn) == 2
    assert '<progress max=1 value="0.5000">' in drawn[0]
    assert "&lt;b&gt;" in drawn[1]


def test_nothing_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    with display_of(False) as show:
        show(RUNS)
    assert capsys.readouterr() == ("", "")


def test_importing_the_client_is_light() -> None:
    code = (
        "import sys, llama_stack_provider_moe.client as _; "
        "print([each for each in ('torch', 'sqlalchemy', 'fastapi', 'typer') if each in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
