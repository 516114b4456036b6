"""Ollama: a template that renders like the tokenizer's, and a push that reports every failure."""

import hashlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llama_stack_provider_moe.compute.export.go_template import UnsupportedTemplate, read_turns
from llama_stack_provider_moe.compute.export.ollama import modelfile, push, read_chat
from llama_stack_provider_moe.compute.models.chat_templates import NAMED
from llama_stack_provider_moe.errors import ExportError, InvalidInput
from llama_stack_provider_moe.spec.destinations import HubPush, OllamaServer
from tests.support import tiny_models
from tests.support.go_text import render
from tests.support.ollama_server import State, ollama

DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are \"kind\" {{ '{{' }}.<|im_end|>\n{% endif %}"
    + tiny_models.CHATML
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '<|header|>\n\n' + m.content | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|header|>\n\n' }}{% endif %}"
)
INSTRUCT = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if loop.first and sys is defined %}{{ sys + '\n\n' }}{% endif %}{{ m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<' + m.role + '>' + m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEMPLATES = {
    **NAMED,
    "default system": DEFAULT_SYSTEM,
    "headers": HEADERS,
    "instruct": INSTRUCT,
    "no system": NO_SYSTEM,
}


def said(shape: str) -> list[dict[str, str]]:
    """`suau`: a conversation, of contents that no derivation has seen."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [
        {"role": roles[letter], "content": f'{i}: {{{{ .Role }}}} "so" \\ said\n{letter}'}
        for i, letter in enumerate(shape)
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_go_template_renders_like_the_tokenizers(name: str) -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    turns = read_turns(tokenizer)
    assert len(turns.notes) == (1 if name == "no system" else 0)
    for shape in ("u", "uau", "uauauau", *(() if name == "no system" else ("su", "suau", "suauauau"))):
        expected = tokenizer.apply_chat_template(said(shape), tokenize=False, add_generation_prompt=True)
        assert render(turns.go(), said(shape)) == expected, shape
    # An answer that was begun goes on: nothing is put behind it.
    assert render(turns.go(), said("ua")).endswith(said("ua")[1]["content"])


def test_a_bos_token_of_the_tokenizer_is_not_added_twice() -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = "{{ bos_token }}" + NO_SYSTEM
    assert read_turns(tokenizer).before["", "user"] == "<|im_start|><user>"  # no text of it begins so by itself
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    assert read_turns(tokenizer).before["", "user"] == "<user>"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index ~ m.content }}{% endfor %}",  # counts
        "{{ messages[-1].content }}",  # forgets
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages | length }}",
        "{{ raise_exception('never') }}",
        None,
    ],
)
def test_a_template_that_does_more_is_reported(template: str | None, tmp_path: Path) -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UnsupportedTemplate):
        read_turns(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    chat = read_chat(tmp_path)
    assert chat.template is None
    assert "no TEMPLATE" in chat.notes[0]
    text = modelfile(tmp_path / "m.gguf", tmp_path)
    assert 'TEMPLATE """' not in text
    assert text.startswith("# no TEMPLATE: ")


def test_the_modelfile(model: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0]}))
    assert modelfile(model / "tiny-q8_0.gguf", model) == (
        "FROM ./tiny-q8_0.gguf\n"
        'TEMPLATE """{{ $last := "" }}{{ range .Messages }}'
        '{{ if eq .Role "system" }}{{ "<|im_start|>system\\n" }}{{ .Content }}'
        '{{ else if eq .Role "user" }}{{ if eq $last "" }}{{ "<|im_start|>user\\n" }}{{ else if eq $last "assistant" }}'
        '{{ "<|im_end|>\\n<|im_start|>user\\n" }}{{ else }}{{ "<|im_end|>\\n<|im_start|>user\\n" }}{{ end }}'
        "{{ .Content }}"
        '{{ else if eq .Role "assistant" }}{{ "<|im_end|>\\n<|im_start|>assistant\\n" }}{{ .Content }}'
        '{{ end }}{{ $last = .Role }}{{ end }}{{ if ne $last "assistant" }}'
        '{{ "<|im_end|>\\n<|im_start|>assistant\\n" }}'
        '{{ end }}"""\n'
        'PARAMETER stop "<|im_end|>"\n'
        'PARAMETER stop "<|pad|>"\n'
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a tokenizer; what else a model has is not read."""
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """Three chunks and a bit."""
    path = tmp_path / "tiny-q8_0.gguf"
    path.write_bytes(b"GGUF" + bytes(range(256)) * 12_500)
    return path


@pytest.fixture
def server() -> Iterator[tuple[str, State]]:
    with ollama() as running:
        yield running


def test_a_push(server: tuple[str, State], gguf: Path, model: Path) -> None:
    url, state = server
    told: list[str] = []
    found = push(gguf, model, OllamaServer(name="me/tiny:q8", url=url + "/"), told.append)
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    assert state.blobs == {f"sha256:{digest}": gguf.read_bytes()}
    assert state.lengths == [str(gguf.stat().st_size)]  # streamed, with a length that is known
    made = state.models["me/tiny:q8"]
    assert made["files"] == {"tiny-q8_0.gguf": f"sha256:{digest}"}
    assert made["template"] == read_chat(model).template
    assert made["parameters"] == {"stop": ["<|im_end|>"]}
    assert (found.sent, found.sha256, found.version, found.template) == (True, digest, "0.33.0", True)
    assert found.statuses[-1] == "success"
    assert told[0] == f"ollama: {found.bytes:,} of {found.bytes:,} bytes sent"
    assert told[-1] == "ollama: success"
    # Again: the file is there.
    again = push(gguf, model, OllamaServer(name="me/tiny:q8", url=url), told.append)
    assert not again.sent
    assert len(state.lengths) == 1


REFUSED = {"error": "no space left on device"}


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ({("GET", "/api/version"): (500, "gone")}, "refused asking for its version with 500"),
        ({("GET", "/api/version"): (200, {"detail": "hello"})}, "is not an Ollama server"),
        ({("HEAD", "/api/blobs"): (503, None)}, "refused asking for the file with 503"),
        ({("POST", "/api/blobs"): (507, REFUSED)}, "refused sending .* 507: 'no space|connection while sending"),
        ({("POST", "/api/create"): (400, {"error": "invalid model name"})}, "400: 'invalid model name'"),
        ({("POST", "/api/show"): (404, {"error": "model 'tiny' not found"})}, "404: \"model 'tiny' not found\""),
        ({("GET", "/api/version"): (302, None)}, "a redirect while asking for its version; redirects are not followed"),
    ],
)  # fmt: skip
def test_refusals_are_reported(
    server: tuple[str, State], gguf: Path, model: Path, answers: dict[tuple[str, str], tuple[int, Any]], told: str
) -> None:
    url, state = server
    state.answers = answers
    state.redirect_to = f"{url}/api/version" if "redirect" in told else None
    with pytest.raises(ExportError, match=told):
        push(gguf, model, OllamaServer(name="tiny", url=url))
    if "redirect" in told:
        assert state.asked == ["GET /api/version"]


@pytest.mark.parametrize(
    ("statuses", "told"),
    [
        ([{"status": "parsing GGUF"}, {"error": "unknown type"}], "could not create the model: 'unknown type'"),
        ([{"status": "parsing GGUF"}], "before it created the model; its last status was 'parsing GGUF'"),
        ([], "it sent no status"),
        ([{"status": "parsing GGUF"}, "hang up"], "broke the connection while creating .* after 'parsing GGUF'"),
        ([b"<html>\n"], "a status that is not JSON: b'<html>'"),
        ([b"x" * 3_000_000], "a status of more than 1,048,576 bytes"),
        ([["status"]], "could not create the model"),
    ],
)  # fmt: skip
def test_a_creation_that_does_not_end_well(
    server: tuple[str, State], gguf: Path, model: Path, statuses: list[Any], told: str
) -> None:
    url, state = server
    state.statuses = statuses
    with pytest.raises(ExportError, match=told):
        push(gguf, model, OllamaServer(name="tiny", url=url))


def test_an_upload_that_breaks_off_and_the_next_try(server: tuple[str, State], gguf: Path, model: Path) -> None:
    url, state = server
    state.hang_up_after = 1000
    with pytest.raises(ExportError, match=r"connection while sending tiny-q8_0.gguf, [\d,]+ of 3,200,004 bytes"):
        push(gguf, model, OllamaServer(name="tiny", url=url))
    assert not state.models
    state.hang_up_after = None
    assert push(gguf, model, OllamaServer(name="tiny", url=url)).sent


def test_a_file_that_changes_meanwhile(
    server: tuple[str, State], gguf: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_stack_provider_moe.compute.export.ollama._sha256", lambda path: "0" * 64)
    with pytest.raises(ExportError, match="400: 'digest mismatch"):
        push(gguf, model, OllamaServer(name="tiny", url=server[0]))


def test_a_server_that_uses_another_template(server: tuple[str, State], gguf: Path, model: Path) -> None:
    url, state = server
    state.keeps_template = False
    with pytest.raises(ExportError, match=r"does not use the model's template: '\{\{ \.Prompt"):
        push(gguf, model, OllamaServer(name="tiny", url=url))


def test_no_server(gguf: Path, model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound, not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ExportError, match=r"no server answers .*; start it with `ollama serve`"):
            push(gguf, model, OllamaServer(name="tiny", url=url))
    with pytest.raises(InvalidInput, match="gguf"):
        push(tmp_path / "missing.gguf", model, OllamaServer(name="tiny"))
    with pytest.raises(ExportError, match=r"tokenizer in .* can't be loaded"):
        push(gguf, tmp_path / "nothing", OllamaServer(name="tiny"))


@pytest.mark.parametrize("name", ["tiny", "tiny:q8_0", "me/tiny", "registry.here:5000/me/tiny.v1:latest", "_a/b-c"])
def test_names_of_ollama(name: str) -> None:
    assert OllamaServer(name=name).name == name


@pytest.mark.parametrize(
    "name", ["", "-tiny", "a b", "a/b/c/d", "a.b/c", "tiny:", "tiny:a/b", "x" * 81, "tiny@sha256:ab", "ti\n"]
)
def test_names_that_ollama_would_refuse(name: str) -> None:
    with pytest.raises(ValidationError, match="name"):
        OllamaServer(name=name)


@pytest.mark.parametrize(
    "url",
    ["", "ftp://h", "file:///h", "http://", "http://u:p@h", "http://h/x", "http://h?x", "http://h:99999", "http://h:0"],
)
def test_invalid_addresses(url: str) -> None:
    with pytest.raises(ValidationError, match="url"):
        OllamaServer(name="tiny", url=url)


@pytest.mark.parametrize(
    "repo_id", ["me", "me/", "/x", "a/b/c", "me/a--b", "me/a..b", "me/x.git", "me/x-", "me/x.", "me/a b"]
)
def test_repositories_that_the_hub_would_refuse(repo_id: str) -> None:
    with pytest.raises(ValidationError, match="repo_id"):
        HubPush(repo_id=repo_id)
    assert HubPush(repo_id="me/granite-3.0_x").private
