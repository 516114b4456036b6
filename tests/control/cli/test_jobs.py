"""`moe-train` and what a job produces: following its output, downloading its files, resuming and deleting it.

Spoken to is our own router behind uvicorn, without a host; what a server of ours never does is staged.
"""

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from llama_stack_provider_moe.client.pull import PART, Puller
from llama_stack_provider_moe.client.sse import Event, events
from llama_stack_provider_moe.control.cli.client import Client
from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.follow import Follower
from llama_stack_provider_moe.control.server import stream
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.errors import InvalidInput, ServerLost, ServerRefused
from llama_stack_provider_moe.jobdir.checkpoint_index import STATE, write_checksums
from llama_stack_provider_moe.jobdir.experts_backend import read_override
from llama_stack_provider_moe.jobdir.folder import Artifact
from llama_stack_provider_moe.jobdir.state import JobState
from tests.support.cli_support import moe_train
from tests.support.free_ports import free_port
from tests.support.host_support import folder_of, over_http, serving_in_process, submit

WEIGHTS = bytes(range(256)) * 4000


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path_factory.mktemp("cli")) as made, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "POLL_S", 0.02)
        yield made


@pytest.fixture(scope="module")
def url(service: PostTrainingService) -> Iterator[str]:
    with over_http(service) as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_TRAIN_URL", found)
        yield found


def ended(service: PostTrainingService, state: JobState = JobState.COMPLETED) -> str:
    job_id = submit(service)
    service.store.move(job_id, JobState.IN_PROGRESS)
    service.store.move(job_id, state, reason="so be it")
    return job_id


def with_artifacts(service: PostTrainingService, job_id: str) -> Path:
    """Create a completed job with an adapter and a checkpoint; return the folder of the checkpoint."""
    root = service.config.jobs_dir / job_id
    found = []
    for name, kind in (("artifacts/adapter", "adapter"), ("checkpoints/epoch-1", "checkpoint")):
        path = root / name
        (path / "deep").mkdir(parents=True)
        (path / "weights.bin").write_bytes(WEIGHTS)
        (path / "deep" / "größe 1.txt").write_text("deep")
        (path / "empty").touch()
        write_checksums(path, 1)
        found.append(Artifact(identifier=f"{job_id}/{path.name}", kind=kind, path=str(path), epoch=1, step=1,
                              created_at=datetime.now(UTC), bytes=1))  # type: ignore[arg-type]  # fmt: skip
    service.store.move(job_id, JobState.IN_PROGRESS)
    service.store.move(job_id, JobState.COMPLETED, artifacts=tuple(found))
    return root / "checkpoints" / "epoch-1"


# Output.


def test_output_is_followed_to_the_end(service: PostTrainingService, url: str) -> None:
    job_id = ended(service, JobState.FAILED)
    folder_of(service, job_id).output.write_text("".join(f"line {number}\n" for number in range(500)) + "last words")
    code, out, _ = moe_train("logs", job_id, "--follow", "--tail", "1000")
    assert (code, out.splitlines()[0], out.splitlines()[-1]) == (Exit.FAILED, "line 0", "last words")
    assert len(out.splitlines()) == 501
    _, out, _ = moe_train("logs", job_id, "--follow", "--tail", "1", "--json")
    assert [json.loads(line)["log_lines"] for line in out.splitlines()] == [["last words"]]


def test_a_restart_of_the_server_loses_and_repeats_no_line(service: PostTrainingService) -> None:
    job_id, port = submit(service), free_port()
    output = folder_of(service, job_id).output
    notes: list[str] = []
    seen: list[str] = []
    text = ""
    with Client(f"http://127.0.0.1:{port}") as client:
        pieces = Follower(client, job_id, notes.append, poll_s=0.05, patience_s=60).output(None)
        for life in range(3):
            text += f"life {life}\nmore of {life}\nhalf of "
            output.write_text(text)
            with over_http(service, port):
                seen += next(pieces)["log_lines"]
            with pytest.raises(ServerLost):
                client.health()
            text += f"{life}\n"
            output.write_text(text)
        service.store.move(job_id, JobState.FAILED, reason="so be it")
        with over_http(service, port):
            seen += [line for piece in pieces for line in piece["log_lines"]]
    assert seen == text.splitlines()


def staged(*answers: httpx.Response | Exception) -> tuple[Client, list[httpx.Request]]:
    """A server that gives one of `answers` per request."""
    waiting, asked = list(answers), []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        given = waiting.pop(0)
        if isinstance(given, Exception):
            raise given
        return given

    return Client("http://example.test", None, httpx.MockTransport(answer)), asked


def sent(*blocks: str) -> httpx.Response:
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, text="".join(f"{b}\n\n" for b in blocks))


def piece(number: int, *lines: str) -> str:
    return f"id: {number}\ndata: " + json.dumps({"log_lines": lines, "next_offset": number})


END = 'event: end\ndata: {"job_uuid": "j", "status": "completed"}'


def test_a_broken_stream_is_resumed_where_it_ended() -> None:
    server, asked = staged(
        sent(": hello", piece(4, "one")),
        httpx.ConnectError("restarting"),
        httpx.Response(503, text="starting"),
        sent(": hello", piece(8, "two"), ": waiting"),
        sent(END),
    )
    notes: list[str] = []
    pieces = list(Follower(server, "j", notes.append, poll_s=0.001).output(7))
    assert [each["log_lines"] for each in pieces] == [["one"], ["two"]]
    assert [request.headers.get("last-event-id") for request in asked] == [None, "4", "4", "4", "8"]
    assert [request.url.params.get("tail") for request in asked] == ["7", None, None, None, None]
    assert notes[-1] == "the server answers again"


def test_a_server_without_streams_is_polled() -> None:
    status = {"job_uuid": "j", "status": "completed", "resources_allocated": {}, "checkpoints": []}
    log = {"job_uuid": "j", "log_lines": ["one"], "next_offset": 4}
    rest = {"job_uuid": "j", "log_lines": [], "next_offset": 4}
    server, asked = staged(*(httpx.Response(200, json=each) for each in (log, status, log, status, rest)))
    assert [each["log_lines"] for each in Follower(server, "j", print, poll_s=0.001).output(None)] == [["one"]]
    assert asked[-1].url.params["offset"] == "4"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('event: error\ndata: {"error": {"message": "job \'j\' does not exist"}}', "job 'j' does not exist"),
        ("data: [1]", "does not know"),
        ("data: {", "does not know"),
    ],
)
def test_a_stream_that_says_something_else(body: str, says: str) -> None:
    server, _ = staged(sent(body))
    with pytest.raises(ServerRefused, match=says):
        list(Follower(server, "j", print, poll_s=0.001).output(None))


def test_events_out_of_lines() -> None:
    lines = [": comment", "", "id: 3", 'data: {"a":', "data: 1}", "", "", "event: end", 'data:{"b": 2}', "", "data: {}"]
    assert list(events(lines)) == [Event("message", {"a": 1}), Event("end", {"b": 2})]


# Files.


def test_artifacts_are_fetched_whole_and_once(service: PostTrainingService, url: str, tmp_path: Path) -> None:
    with_artifacts(service, submit(service, job_uuid="pulled"))
    into = tmp_path / "new" / "folder"
    code, out, err = moe_train("artifacts", "pulled", "--pull", str(into))
    assert code == Exit.OK
    assert out == "8 files, 2.05 MB, of which 2.05 MB were downloaded now; every checksum is correct\n"
    assert f"{into}/adapter/weights.bin: {len(WEIGHTS)} bytes, verified" in err
    there = sorted(str(path.relative_to(into)) for path in into.rglob("*") if path.is_file())
    names = ["checksums.json", "deep/größe 1.txt", "empty", "weights.bin"]
    assert there == [f"{name}/{file}" for name in ("adapter", "epoch-1") for file in names]
    assert (into / "epoch-1" / "weights.bin").read_bytes() == WEIGHTS
    code, out, _ = moe_train("artifacts", "pulled", "--pull", str(into), "--json")
    files = json.loads(out)["files"]
    assert (code, len(files), sum(file["fetched"] for file in files)) == (Exit.OK, 8, 0)
    assert {file["sha256"] for file in files if file["path"].endswith("bin")} == {hashlib.sha256(WEIGHTS).hexdigest()}


def test_one_of_them_and_none(service: PostTrainingService, url: str, tmp_path: Path) -> None:
    with_artifacts(service, submit(service, job_uuid="several"))
    assert moe_train("artifacts", "several", "--pull", str(tmp_path), "--only", "epoch-1")[0] == Exit.OK
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-1"]
    code, _, err = moe_train("artifacts", "several", "--pull", str(tmp_path), "--only", "none")
    assert (code, "expected an artifact of the job: adapter, epoch-1" in err) == (Exit.REFUSED, True)
    assert moe_train("artifacts", "several", "--only", "epoch-1")[0] == Exit.REFUSED
    assert moe_train("artifacts", ended(service), "--pull", str(tmp_path))[:2] == (Exit.OK, "no artifacts\n")


@pytest.mark.parametrize(
    ("had", "fetched"),
    [
        (WEIGHTS[:1000], len(WEIGHTS) - 1000),  # interrupted
        (WEIGHTS, 0),  # interrupted just before it was renamed
        (b"", len(WEIGHTS)),
        (
            b"?" * 1000,
            2 * len(WEIGHTS) - 1000,
        ),  # of another run: the whole file is downloaded again
        (WEIGHTS + b"?", len(WEIGHTS)),
    ],
)
def test_an_interrupted_download_is_resumed(
    service: PostTrainingService, url: str, tmp_path: Path, had: bytes, fetched: int
) -> None:
    job_id = submit(service)
    with_artifacts(service, job_id)
    part = tmp_path / "adapter" / f"weights.bin{PART}"
    part.parent.mkdir()
    part.write_bytes(had)
    with Client(url) as client:
        files = list(Puller(client, job_id, tmp_path, print).pull(["adapter"]))
    [weights] = [file for file in files if file["path"].endswith("weights.bin")]
    assert weights["fetched"] == fetched
    assert Path(weights["path"]).read_bytes() == WEIGHTS
    assert not part.exists()


def test_a_file_that_is_damaged_on_the_server_is_refused(
    service: PostTrainingService, url: str, tmp_path: Path
) -> None:
    checkpoint = with_artifacts(service, submit(service, job_uuid="broken"))
    (checkpoint / "weights.bin").write_bytes(WEIGHTS[:-1] + b"?")
    code, _, err = moe_train("artifacts", "broken", "--pull", str(tmp_path))
    assert (code, "weights.bin of epoch-1 is damaged on the server" in err) == (Exit.REFUSED, True)
    assert not list((tmp_path / "epoch-1").rglob("weights*"))
    assert (tmp_path / "adapter" / "weights.bin").exists()


@pytest.mark.parametrize("path", ["../evil", "/etc/evil", "a/../../evil", "", ".", "a\0b"])
def test_a_server_can_write_nowhere_else(tmp_path: Path, path: str) -> None:
    listed = {"checkpoints": [{"identifier": "j/adapter"}]}
    files = {"files": [{"path": path, "bytes": 1, "sha256": "0" * 64}]}
    server, asked = staged(httpx.Response(200, json=listed), httpx.Response(200, json=files))
    with pytest.raises(ServerRefused, match="leads out of the folder"):
        list(Puller(server, "j", tmp_path / "in", print).pull([]))
    assert not list(tmp_path.iterdir())
    assert len(asked) == 2


def test_a_folder_that_can_not_be_written(service: PostTrainingService, url: str, tmp_path: Path) -> None:
    job_id = submit(service)
    with_artifacts(service, job_id)
    (tmp_path / "adapter").write_text("a file in the way")
    with Client(url) as client, pytest.raises(InvalidInput, match="--pull"):
        list(Puller(client, job_id, tmp_path, print).pull(["adapter"]))


# Resume and delete.


def test_resume_and_rm(service: PostTrainingService, url: str) -> None:
    job_id = ended(service, JobState.CANCELLED)
    path = folder_of(service, job_id).root / "checkpoints" / "step-3"
    path.mkdir(parents=True)
    (path / STATE).write_text("{}")
    write_checksums(path, 3)
    code, out, err = moe_train("resume", job_id)
    assert (code, out) == (Exit.OK, f"job {job_id} is scheduled again; it resumes from its last whole checkpoint\n")
    assert f"moe-train status {job_id} --watch" in err
    code, out, _ = moe_train("rm", job_id, "--json")
    assert (code, out) == (Exit.REFUSED, "")
    assert moe_train("cancel", job_id)[0] == Exit.OK
    assert (
        moe_train("resume", job_id, "--json")[1]
        == json.dumps({"job_uuid": job_id, "resumes": "from_checkpoint"}, indent=2) + "\n"
    )
    assert moe_train("cancel", job_id)[0] == Exit.OK
    assert moe_train("resume", job_id, "--experts-backend", "cuda")[0] == Exit.REFUSED
    assert moe_train("resume", job_id, "--experts-backend", "torch")[0] == Exit.OK
    override = read_override(folder_of(service, job_id))
    assert override is not None
    assert override.experts_backend == "torch"
    assert moe_train("cancel", job_id)[0] == Exit.OK
    code, out, _ = moe_train("status", job_id)
    assert (code, "on disk" in out) == (Exit.CANCELLED, True)
    assert moe_train("rm", job_id) == (Exit.OK, f"job {job_id} is deleted\n", "")
    assert moe_train("status", job_id)[0] == Exit.REFUSED
    other = ended(service)
    assert json.loads(moe_train("rm", other, "--json")[1]) == {
        "job_uuid": other,
        "kept": [],
        "exports": [],
        "broken": [],
        "withdrawn": None,
    }
