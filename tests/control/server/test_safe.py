"""Tests that a job's output and links harm neither a browser, a terminal nor the machine."""

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama_stack_provider_moe.control.cli import screen, views
from llama_stack_provider_moe.control.server import safe_json, stream
from llama_stack_provider_moe.control.server.routes import PREFIX
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.jobdir.folder import Artifact, JobFolder
from llama_stack_provider_moe.jobdir.state import JobState
from tests.support.host_support import ask, folder_of, over_http, serving_in_process, submit

SECRET = "do not show"
# Control sequences of terminals (also without an escape character), text direction marks, and HTML.
NASTY = {
    "colour": ("\x1b[31mred\x1b[0m", "red"),
    "clear": ("a\x1b[2J\x1b[Hb", "ab"),
    "title": ("\x1b]0;owned\x07text", "text"),
    "clipboard": ("\x1b]52;c;cm0gLXJmIH4=\x1b\\text", "text"),
    "link": ("\x1b]8;;http://evil.test\x1b\\here\x1b]8;;\x1b\\", "here"),
    "8-bit CSI": ("\x9b31mred", "red"),
    "device control": ("\x1bPq#0\x1b\\text", "text"),
    "bell and backspace": ("a\x07\x08b", "a\ufffd\ufffdb"),
    "turned around": ("\u202egnp.exe", "\ufffdgnp.exe"),
    "half a sequence": ("\x1b]0;no end", "0;no end"),
    "script": ("<script>alert(1)</script>&lt;", "<script>alert(1)</script>&lt;"),
    "separators": ("a\u2028b\u2029c", "a\ufffdb\ufffdc"),
    "not UTF-8": ("caf\udce9", "caf\ufffd"),
}
PRINTED = "\n".join(text for text, _ in NASTY.values()).encode("utf-8", "surrogateescape") + b"\n"
HARMLESS = [harmless for _, harmless in NASTY.values()]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path_factory.mktemp("safe")) as made, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "POLL_S", 0.02)
        yield made


@pytest.fixture(scope="module")
def talker(service: PostTrainingService) -> str:
    """A job that printed harmful text and then failed."""
    job_id = submit(service, job_uuid="talker", data={"dataset_id": "good"})
    folder_of(service, job_id).output.write_bytes(PRINTED)
    service.store.move(job_id, JobState.FAILED, "it said <b>so</b> & ended\x7f")
    return job_id


def shows_nothing_but_text(body: bytes) -> bool:
    """No byte that controls a terminal or begins a tag, and no character outside ASCII."""
    return body.isascii() and not set(body) & ({*range(32), 0x7F, *b"<>&"} - {*b"\n"})


def test_log_lines_as_json(service: PostTrainingService, talker: str) -> None:
    answer = ask(service, "GET", f"/jobs/{talker}/logs")
    assert answer.json()["log_lines"] == HARMLESS
    assert shows_nothing_but_text(answer.content)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_log_lines_as_events(service: PostTrainingService, talker: str) -> None:
    with over_http(service) as url:
        answer = httpx.get(url + PREFIX + f"/jobs/{talker}/logs", params={"follow": True}, timeout=60)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert shows_nothing_but_text(answer.content)
    data = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert [line for each in data for line in each.get("log_lines", [])] == HARMLESS


def test_other_answers_with_text_of_callers_or_jobs(service: PostTrainingService, talker: str) -> None:
    for path in (f"/jobs/{talker}", f"/jobs/{talker}/status", "/jobs"):
        assert shows_nothing_but_text(ask(service, "GET", path).content), path
    assert ask(service, "GET", f"/jobs/{talker}").json()["reason"] == "it said <b>so</b> & ended\x7f", (
        "the content is unchanged"
    )
    whole = {"recipe": "sft", "model": "<script>\x9b2J", "data": {"dataset_id": "größe \u202e<img>"}}
    for body in (whole, whole | {"model": "owner/name"}, {"recipe": "<b>\x1b[2J"}, {"<i>": 1}):
        answer = ask(service, "POST", "/jobs", json=body)
        assert answer.status_code in (400, 404)
        assert shows_nothing_but_text(answer.content), answer.text
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_safe_json_keeps_the_content() -> None:
    content = {"a<b>&c": ["\x7f\x00\x9b\ud83d\ude00", "größe", "\\u003c", 'quote " \\', 1e-9, None, True]}
    assert json.loads(safe_json.dumps(content)) == json.loads(json.dumps(content))
    assert shows_nothing_but_text(safe_json.dumps(content).encode())


@pytest.mark.parametrize("nasty", NASTY)
def test_a_terminal_gets_only_text(nasty: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also with another server, which cleans nothing."""
    said, harmless = NASTY[nasty]
    shown = screen.Screen(as_json=False)
    shown.print([said])
    shown.say(said)
    shown.note(said)
    shown.error(None, said, 1)
    told = capsys.readouterr()
    assert told.out.splitlines() == [harmless] * 2
    assert told.err.splitlines() == [harmless, f"moe-train: {harmless}"]
    screen.Screen(as_json=True).document({"log_lines": [said]})
    assert capsys.readouterr().out.isascii()


def test_a_progress_bar_gets_only_text() -> None:
    updates: list[dict[str, Any]] = []

    class Progress:
        """Takes what rich would draw, which lets escapes through."""

        def add_task(self, *_: Any, **__: Any) -> int:
            return 0

        def update(self, _: int, **fields: Any) -> None:
            updates.append(fields)

    bar = views.Bar(screen.Screen(as_json=False), Progress())  # type: ignore[arg-type]
    evil = "\x1b]0;owned\x07\x1b[2J"
    resources = {"stage": evil + "training", "step": evil + "1", "max_steps": 2, "metrics": {"loss": evil + "NaN"}}
    bar.show({"job_uuid": "j", "status": "in_progress", "resources_allocated": resources, "checkpoints": []})
    assert (updates[0]["description"], updates[0]["steps"], updates[0]["figures"]) == ("training", "1 of 2", "loss NaN")


# Links.


@pytest.fixture
def linked(service: PostTrainingService) -> str:
    return submit(service)


@pytest.mark.parametrize("name", ["output", "events", "spec", "resolved", "manifest"])
def test_a_linked_file_of_a_job_is_not_read(service: PostTrainingService, linked: str, name: str) -> None:
    folder = folder_of(service, linked)
    path: Path = getattr(folder, name)
    path.unlink(missing_ok=True)
    outside = service.config.state_dir.parent / f"outside-{name}"
    outside.write_text(SECRET)
    os.symlink(outside, path)
    for route in ("", "/status", "/logs", "/logs?follow=true", "/events", "/metrics", "/artifacts"):
        answer = ask(service, "GET", f"/jobs/{linked}{route}")
        assert SECRET not in answer.text, route
        assert answer.status_code == 403, route
        assert answer.json()["error"]["message"].startswith(f"{path.name} of job {linked!r} is a link"), route
    assert linked in ask(service, "GET", "/jobs").text, "the list still has the job"
    service.store.request_cancel(linked, None)
    assert ask(service, "DELETE", f"/jobs/{linked}").status_code == 200, "the job can be deleted"
    assert outside.read_text() == SECRET


def with_checkpoint(service: PostTrainingService, job_id: str, checkpoint: Path) -> None:
    artifact = Artifact(
        identifier=f"{job_id}/{checkpoint.name}", kind="checkpoint", path=str(checkpoint), epoch=1, step=1,
        created_at=datetime.now(UTC), bytes=1,
    )  # fmt: skip
    service.store.move(job_id, JobState.IN_PROGRESS)
    service.store.move(job_id, JobState.COMPLETED, artifacts=(artifact,))


@pytest.mark.parametrize("swapped", ["checkpoint_dir", "its folder", "the checkpoint"])
def test_a_checkpoint_dir_that_became_a_link_is_not_deleted(
    service: PostTrainingService, swapped: str, tmp_path: Path
) -> None:
    """Other users may write there, because an allowed root is shared."""
    job_id = submit(service, checkpoint_dir="shared/" + swapped.replace(" ", "-"))
    spec = JobFolder(service.config.jobs_dir / job_id).read_spec()
    assert spec.checkpoint_dir is not None
    shared = Path(spec.checkpoint_dir)
    checkpoint = shared / job_id / "epoch-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text("mine")
    with_checkpoint(service, job_id, checkpoint)
    file = f"/jobs/{job_id}/artifacts/epoch-1/weights"
    assert ask(service, "GET", file).text == "mine"
    size = ask(service, "GET", f"/jobs/{job_id}").json()["resources_allocated"]["disk_bytes"]

    link = {"checkpoint_dir": shared, "its folder": shared / job_id, "the checkpoint": checkpoint}[swapped]
    target = tmp_path / "theirs"
    link.rename(tmp_path / "moved")
    theirs = target / checkpoint.relative_to(link)
    theirs.mkdir(parents=True)
    (theirs / "weights").write_text(SECRET * 100)
    os.symlink(target, link)
    for path in (file, f"/jobs/{job_id}/artifacts/epoch-1"):
        answer = ask(service, "GET", path)
        assert (answer.status_code, SECRET in answer.text) == (404, False)
    if swapped != "checkpoint_dir":  # that link leads to a real folder of the job's name
        after = ask(service, "GET", f"/jobs/{job_id}").json()["resources_allocated"]["disk_bytes"]
        assert after < size, "its size does not count"
