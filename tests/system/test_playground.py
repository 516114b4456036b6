"""A playground of a trained job as two owners see it: a chat through a pipe and in a terminal, restarts, its end."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.control.server.test_owners import ALICE, BOB, POLICY, USERS
from tests.support import tiny_models
from tests.support.authority import authority
from tests.support.cli_support import MOE_TRAIN
from tests.support.host_harness import API, QUICKSTART, run_config, stop_jobs
from tests.support.jobs_support import job_folders
from tests.system.test_chaos import Arena, until

pytestmark = pytest.mark.e2e

LIMIT_S = 900.0
IDLE_S = 30
ROWS = "".join(
    json.dumps({"prompt": f"Write {number} words about friend.", "completion": "The capital of France."}) + "\n"
    for number in range(16)
)
SFT: dict[str, Any] = {
    "recipe": "sft", "model": "granitemoe", "job_uuid": "hers", "data": {"dataset_id": "rows"},
    "training": {"batch_size": 4, "dtype": "fp32"}, "optimizer": {"lr": 5e-2}, "adapter": {"rank": 4, "alpha": 8},
    "options": {"max_length": 64, "validation_split": 0},
}  # fmt: skip


def headers(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_a_playground_from_training_to_its_end() -> None:
    with job_folders() as folder, authority(USERS) as endpoint:
        auth = {"provider_config": {"type": "custom", "endpoint": endpoint}, "access_policy": POLICY}
        config = run_config(
            QUICKSTART, folder, stack={"server": {"auth": auth}},
            provider={
                "child_env": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                "supervisor": {"poll_s": 0.2, "idle_exit_s": 60, "max_concurrent_jobs": 1},
            },
        )  # fmt: skip
        arena = Arena(folder, config)
        # Long answers need room in its positions.
        tiny_models.build("granitemoe", arena.provider.models_dir / "granitemoe", max_position_embeddings=8192)
        arena.start()
        try:
            train(arena)
            job_id = by_pipe(arena)
            is_hers(arena, job_id)
            in_a_terminal(arena)
            while_the_server_restarts(arena)
            ends(arena, job_id)
        finally:
            arena.kill()
            stop_jobs(arena.provider)


def train(arena: Arena) -> None:
    url = f"http://127.0.0.1:{arena.port}{API}"
    httpx.put(f"{url}/datasets/rows", content=ROWS, headers=headers(ALICE), timeout=60).raise_for_status()
    assert arena.ask("POST", "/jobs", json=SFT, headers=headers(ALICE)) is not None

    def is_completed() -> bool:
        found = arena.ask("GET", "/jobs/hers", headers=headers(ALICE))
        assert found is None or found["status"] in ("scheduled", "in_progress", "completed"), found["reason"]
        return found is not None and found["status"] == "completed"

    until(is_completed, "she has trained", LIMIT_S)


def chat(arena: Arena, *words: str, **how: Any) -> "subprocess.Popen[str]":
    environment = {
        **os.environ, "MOE_TRAIN_URL": f"http://127.0.0.1:{arena.port}", "MOE_TRAIN_API_KEY": ALICE, "TERM": "dumb"
    }  # fmt: skip
    command = [*MOE_TRAIN, "chat", "hers", "--idle", str(IDLE_S), *words]
    return subprocess.Popen(command, env=environment, text=True, **how)


def said(arena: Arena, message: str, *words: str) -> tuple[str, str]:
    """The output of a chat through a pipe, and what it said beside it."""
    process = chat(arena, *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(message, timeout=LIMIT_S)
    assert process.returncode == 0, err
    return out, err


def by_pipe(arena: Arena) -> str:
    """A first chat starts the playground, and a second one uses it; the name of the playground."""
    out, _ = said(
        arena, "Write 3 words about friend.\n", "--adapter", "both", "--routing", "--json", "--max-tokens", "6"
    )
    pieces = [json.loads(line) for line in out.splitlines()]
    answers = {piece["side"]: piece for piece in pieces if piece["type"] == "answered"}
    assert list(answers) == ["on", "off"]
    assert answers["on"]["text"] != answers["off"]["text"]
    for side, answer in answers.items():
        routed = [piece for piece in pieces if piece["type"] == "routed" and piece["side"] == side]
        assert len(routed) == answer["tokens"]
    again, err = said(arena, "Write 3 words about friend.\n", "--max-tokens", "6", "--routing")
    assert again.strip().startswith(answers["on"]["text"].strip()[:3]), "the same prompt and seed"
    assert "Experts by use" in again
    assert "tokens/s" in err
    [line] = arena.ask("GET", "/jobs?recipe=playground", headers=headers(ALICE))["data"]
    assert line["model"] == "hers/adapter"
    return str(line["job_uuid"])


def is_hers(arena: Arena, job_id: str) -> None:
    url = f"http://127.0.0.1:{arena.port}{API}/jobs/{job_id}/prompts"
    prompt = {"prompt": "The"}
    for method, path in (("POST", ""), ("GET", ""), ("GET", "/1"), ("GET", "/1?follow=true"), ("DELETE", "/1")):
        answer = httpx.request(method, url + path, json=prompt if method == "POST" else None, headers=headers(BOB))
        assert (answer.status_code, f"job '{job_id}' does not exist" in answer.text) == (404, True), (method, path)
        assert httpx.request(method, url + path).status_code == 401
    body = {"recipe": "playground", "model": "hers"}
    assert httpx.post(url.split("/jobs/")[0] + "/jobs", json=body, headers=headers(BOB)).status_code in (400, 404)


def in_a_terminal(arena: Arena) -> None:
    """Two turns, of which Ctrl-C ends the second one's answer; then Ctrl-D."""
    mine, its = pty.openpty()
    process = chat(arena, "--max-tokens", "1000", "--temperature", "1.5", stdin=its, stdout=its, stderr=its)
    os.close(its)
    seen = ""

    def read_until(pattern: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + LIMIT_S
        while not re.search(pattern, seen):
            assert time.monotonic() < deadline, seen
            seen += os.read(mine, 65536).decode(errors="replace")

    read_until("> ")
    for message in (b"Hello?\n", b"And now?\n"):
        seen = ""
        os.write(mine, message)
        read_until(r"\?\r\n.{20}")
        process.send_signal(signal.SIGINT)
        read_until(r"tokens/s.*\n> ")
    assert "stopped" in seen or "tokens/s\r" in seen, seen
    os.write(mine, b"\x04")
    with contextlib.suppress(OSError):
        while os.read(mine, 65536):
            pass
    assert process.wait(60) == 0
    os.close(mine)


def while_the_server_restarts(arena: Arena) -> None:
    """The answer goes on without the server, and the chat with it once the server is back."""
    words = ("--max-tokens", "1000", "--temperature", "1.5", "--json")
    written = arena.folder / "chat.jsonl"
    with written.open("w") as output:
        process = chat(arena, *words, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write("Write many words.")
    process.stdin.close()
    process.stdin = None
    until(lambda: written.stat().st_size > 0, "the answer has begun", LIMIT_S)
    arena.kill()
    arena.start()
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err
    pieces = [json.loads(line) for line in written.read_text().splitlines()]
    [answered] = [piece for piece in pieces if piece["type"] == "answered"]
    assert "".join(piece["text"] for piece in pieces if piece["type"] == "text") == answered["text"]
    assert pieces[-1] == {"type": "ended", "error": None}


def ends(arena: Arena, job_id: str) -> None:
    def is_over() -> dict[str, Any] | None:
        found = arena.ask("GET", f"/jobs/{job_id}", headers=headers(ALICE))
        return found if found is not None and found["status"] not in ("scheduled", "in_progress") else None

    found = until(is_over, "it ends by itself", LIMIT_S)
    assert isinstance(found, dict)
    assert (found["status"], found["reason"]) == ("completed", None)
    assert found["summary"]["prompts"] >= 6
    prompts = Path(found["folder"]) / "prompts"
    assert (prompts / "closed").exists()
    standing = arena.ask("GET", f"/jobs/{job_id}/prompts", headers=headers(ALICE))
    assert not standing["is_open"]
    assert {line["status"] for line in standing["data"]} == {"answered"}
