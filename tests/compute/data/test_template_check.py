"""The process that renders samples for a server: its answers, what it imports, and its ends."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from llama_stack_provider_moe.compute.data import template_check
from llama_stack_provider_moe.compute.data.rendering import Renderer, Unrenderable
from tests.support.template_tokenizers import byte_level, of_template, published
from tests.support.tiny_models import CHATML

USER_FIRST = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('the user begins') }}{% endif %}" + CHATML
# The sandbox allows no range of more than 100,000 numbers.
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" + CHATML
GREEDY = "{% set text = 'x' * 9999999999 %}{{ text }}" + CHATML
SPECIALS = ["<|im_start|>", "<|im_end|>"]
RENDERING = {"turns": "all", "reasoning": "keep", "special_tokens": "text"}
ASKED, SAID = ({"role": role, "content": role} for role in ("user", "assistant"))
GOOD, BAD = [ASKED, SAID], [SAID, ASKED, SAID]


class Process:
    """The process under test."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", template_check.__name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.line() == {"ready": True}

    def line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def send(self, folder: Path, kind: str, rows: list[Any], template: str | None = None, limit_s: float = 60) -> None:
        parts = {"train": {"kind": kind, "rows": list(enumerate(rows, start=1))}}
        request = {
            "model": str(folder), "name": "mine", "chat_template": template, "rendering": RENDERING,
            "limit_s": limit_s, "parts": parts,
        }  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def ask(self, folder: Path, kind: str, rows: list[Any], template: str | None = None) -> dict[str, Any]:
        self.send(folder, kind, rows, template)
        return self.line()


@contextmanager
def started() -> Iterator[Process]:
    made = Process()
    with made.process:
        try:
            yield made
        finally:
            made.process.kill()


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    with started() as made:
        yield made


def saved(folder: Path, template: str | None) -> Path:
    byte_level(template, SPECIALS, eos_token="<|im_end|>").save_pretrained(folder)
    return folder


def talk(messages: list[Any], **more: Any) -> dict[str, Any]:
    return {"messages": messages, **more}


REFUSED = "the chat template refuses the conversation (the user begins)"
PAIR = {"prompt": [ASKED], "chosen": [SAID], "rejected": [{**SAID, "content": "no"}]}


@pytest.mark.parametrize(
    ("kind", "rows", "found"),
    [
        ("learnt", [talk(GOOD), talk(BAD), talk(GOOD)], [[2, "messages", REFUSED]]),
        ("pair", [PAIR, {**PAIR, "prompt": [SAID, ASKED]}], [[2, "chosen", f"message 3: {REFUSED}"]]),
        ("break", [talk(GOOD), talk(BAD)], [[2, "messages", f"message 3: {REFUSED}"]]),
        ("prompt", [talk([ASKED]), talk([SAID, ASKED])], [[2, "messages", REFUSED]]),
        ("whole", [talk([ASKED]), talk(GOOD), talk(BAD), talk([SAID, ASKED])],
         [[3, "messages", REFUSED], [4, "messages", REFUSED]]),
    ],
)  # fmt: skip
def test_rows_are_rendered_as_their_kind_is(
    process: Process, tmp_path: Path, kind: str, rows: list[Any], found: list[Any]
) -> None:
    answer = process.ask(saved(tmp_path, USER_FIRST), kind, rows)
    assert answer == {"problems": [["train", *each] for each in found]}


def test_an_answer_may_have_several_turns(process: Process, tmp_path: Path) -> None:
    several = {**PAIR, "rejected": [SAID, ASKED, SAID]}
    assert process.ask(saved(tmp_path, CHATML), "pair", [several])["problems"] == []


def test_the_verdict_is_the_one_of_training(process: Process, tmp_path: Path) -> None:
    """Every published template: without torch, the process refuses the same rows with the same words."""
    rows = [talk(GOOD), talk(BAD), talk([*GOOD, *GOOD]), talk([{"role": "system", "content": "be brief"}, *GOOD])]
    refused = 0
    for name, text in published().items():
        folder, tokenizer = tmp_path / name, of_template(text)
        tokenizer.save_pretrained(folder)
        expected = reasons(PreTrainedTokenizerFast.from_pretrained(folder), rows)
        refused += len(expected)
        assert process.ask(folder, "learnt", rows) == {"problems": expected}, name
    assert refused >= 5, "some templates want the user first, or no system message"


def reasons(tokenizer: PreTrainedTokenizerFast, rows: list[Any]) -> list[list[Any]]:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    renderer, found = Renderer(tokenizer), []
    for number, row in enumerate(rows, start=1):
        try:
            renderer.row(row)
        except Unrenderable as problem:
            found.append(["train", number, "messages", str(problem)])
    return found


def test_a_model_without_a_template_is_refused_unless_the_job_names_one(process: Process, tmp_path: Path) -> None:
    folder = saved(tmp_path, None)
    assert process.ask(folder, "learnt", [talk(GOOD)])["refused"].startswith("has no chat template")
    assert process.ask(folder, "learnt", [talk(GOOD)], template="chatml") == {"problems": []}


def test_a_changed_template_is_read_again(process: Process, tmp_path: Path) -> None:
    folder = saved(tmp_path, USER_FIRST)
    assert process.ask(folder, "learnt", [talk(BAD)])["problems"]
    saved(tmp_path, CHATML)
    assert process.ask(folder, "learnt", [talk(BAD)]) == {"problems": []}


def test_what_can_not_be_loaded_or_fails_is_unavailable(process: Process, tmp_path: Path) -> None:
    assert "tokenizer can't be loaded" in process.ask(tmp_path / "gone", "learnt", [talk(GOOD)])["unavailable"]
    greedy = process.ask(saved(tmp_path / "greedy", GREEDY), "learnt", [talk(GOOD)])
    assert greedy == {"unavailable": "its chat template failed (MemoryError)"}
    assert process.ask(saved(tmp_path / "good", CHATML), "learnt", [talk(GOOD)]) == {"problems": []}


def test_it_imports_no_torch(process: Process, tmp_path: Path) -> None:
    process.ask(saved(tmp_path, CHATML), "learnt", [talk(GOOD)])
    maps = Path(f"/proc/{process.process.pid}/maps").read_text()
    assert "tokenizers" in maps
    assert "torch" not in maps


def test_it_ends_with_its_server_and_by_its_timer(tmp_path: Path) -> None:
    """Both while a template loops."""
    endless = saved(tmp_path, ENDLESS)
    with started() as first:
        first.send(endless, "learnt", [talk(GOOD)])
        assert first.process.stdin is not None
        first.process.stdin.close()
        assert first.process.wait(60) == 0
    with started() as second:
        second.send(endless, "learnt", [talk(GOOD)], limit_s=0.2)
        assert second.process.wait(60) == -signal.SIGALRM


def alone(prepared: str) -> subprocess.CompletedProcess[bytes]:
    """The process that nobody asks, its input open, after `prepared`."""
    code = f"import sys\nimport {template_check.__name__} as it\n{prepared}\nit.main()"
    reading, writing = os.pipe()
    with os.fdopen(reading), os.fdopen(writing, "wb"):
        return subprocess.run(
            [sys.executable, "-c", code], stdin=reading, capture_output=True, timeout=120, check=False
        )


def test_it_ends_when_nobody_asks() -> None:
    ended = alone("it.IDLE_S = 0.1")
    assert (ended.returncode, ended.stdout) == (0, b'{"ready": true}\n')


def test_an_environment_without_the_libraries_says_so() -> None:
    ended = alone("sys.modules['trl'] = None")
    assert ended.returncode == 1
    assert "trl" in json.loads(ended.stdout)["unavailable"]
