"""A GGUF file -> a model of an Ollama server: the Modelfile, and the same over its HTTP API.

    HEAD /api/blobs/sha256:...   is the file there already?
    POST /api/blobs/sha256:...   the file, from disk; 201, or 400 where the digest is another
    POST /api/create             name, files, template, parameters; a line of JSON a status, up to `success`
    POST /api/show               what it now has: the template that was sent

Read off Ollama 0.33's sources (server/create.go, server/routes.go, template/template.go); the sequence is the same in
docs/api.md since 0.5.5. From 0.30 on it runs models by llama.cpp's server and, where it holds no Go template, by the
GGUF's own chat template; before, it needs a Go template. One goes along wherever it can be had: without one `create`
takes the nearest of those it knows, if it is near.
"""

import hashlib
import ipaddress
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, Field
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llama_stack_provider_moe.errors import ExportError, InvalidInput, shorten
from llama_stack_provider_moe.export.go_template import Irregular, Turns, read_turns
from llama_stack_provider_moe.spec.destinations import OllamaServer

Say = Callable[[str], None]
_CHUNK = 1 << 20
_TOLD_EVERY_S = 5.0
_LINE_LIMIT = 1 << 20  # bytes of one status
# Seconds. Ollama answers nothing while it hashes and copies a file, which takes minutes of a large one.
TIMEOUT = httpx.Timeout(600.0, connect=10.0, pool=10.0)


@dataclass(frozen=True)
class Chat:
    """How Ollama is to talk to a model.

    Attributes:
        template: a Go template; None: the tokenizer's can't be had as one.
        stop: texts that end an answer.
        own: the tokenizer's chat template, which the GGUF carries.
        notes: for a person.
    """

    template: str | None
    stop: tuple[str, ...]
    own: str | None
    notes: tuple[str, ...]


class OllamaResult(BaseModel):
    """What an Ollama server now has."""

    name: str
    url: str
    version: str = Field(description="Of the server.")
    sha256: str = Field(description="Of the GGUF file.")
    bytes: int
    sent: bool = Field(description="False: the server had the file already.")
    template: bool = Field(description="Whether it chats by our template; false: by the GGUF's own.")
    stop: list[str]
    statuses: list[str] = Field(description="What the server said while it made the model.")
    notes: list[str]

    def text(self) -> str:
        """For a person."""
        how = f"{self.bytes:,} bytes sent" if self.sent else "its file was there already"
        return "\n".join([f"{self.name} on {self.url} (Ollama {self.version}): {how}", *self.notes])


def read_chat(model: Path) -> Chat:
    """Template and stop texts of a model's folder, from its tokenizer and generation config.

    Raises:
        ExportError: the tokenizer can't be loaded, or nothing ends an answer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ExportError(
            f"ollama: the tokenizer in {model} can't be loaded: {' '.join(str(error).split())}"
        ) from error
    turns: Turns | None = None
    notes: tuple[str, ...]
    try:
        turns = read_turns(tokenizer)
        notes = turns.notes
    except Irregular as error:
        notes = (
            f"no TEMPLATE: {error}. Ollama from 0.30 on runs the GGUF's own chat template; an older one needs a "
            "TEMPLATE of yours",
        )
    stop = _stop_texts(tokenizer, model, turns)
    if not stop:
        raise ExportError(f"ollama: the tokenizer in {model} has no token that ends an answer")
    template = None if turns is None else turns.go()
    if template is not None and '"""' in template:
        raise ExportError('ollama: the chat template has """ in it, which ends a TEMPLATE in a Modelfile')
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    return Chat(template, stop, own, notes)


def modelfile(gguf: Path, model: Path) -> str:
    """The text of a Modelfile beside `gguf`, for `ollama create NAME -f Modelfile`.

    Args:
        gguf: the file; named by its name alone.
        model: Hugging Face folder that it was made of.

    Raises:
        ExportError: see `read_chat`.
    """
    chat = read_chat(model)
    lines = [f"# {note}" for note in chat.notes] + [f"FROM ./{gguf.name}"]
    if chat.template is not None:
        lines.append(f'TEMPLATE """{chat.template}"""')
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in chat.stop]
    return "\n".join(lines) + "\n"


def push(
    gguf: Path, model: Path, server: OllamaServer, say: Say = print, transport: httpx.BaseTransport | None = None
) -> OllamaResult:
    """Make a model of `gguf` on an Ollama server; one of the same name is replaced once all is there.

    Args:
        gguf: the file.
        model: Hugging Face folder that it was made of.
        server: name and address.
        say: told what is sent, and the server's own statuses.
        transport: for another way than the network.

    Raises:
        InvalidInput: `gguf` is no file.
        ExportError: no such server; it refused; it broke off; it does not have what was sent. A file that is there
            whole is not sent again by the next try.
    """
    if not gguf.is_file():
        raise InvalidInput("gguf", str(gguf), "a GGUF file")
    chat, digest, size = read_chat(model), _sha256(gguf), gguf.stat().st_size
    here = is_loopback(server.url)
    # A proxy of the environment is not for this machine; a redirect would carry the model to who knows where.
    with httpx.Client(
        base_url=server.url, timeout=TIMEOUT, follow_redirects=False, trust_env=not here, transport=transport
    ) as client:
        version = _version(client, server.url)
        sent = not _has(client, digest)
        if sent:
            _send(client, gguf, digest, size, say)
        body: dict[str, Any] = {
            "model": server.name, "files": {gguf.name: f"sha256:{digest}"}, "parameters": {"stop": [*chat.stop]},
        }  # fmt: skip
        if chat.template is not None:
            body["template"] = chat.template
        statuses = _create(client, body, say)
        ours = _check(client, server.name, chat)
    return OllamaResult(
        name=server.name, url=server.url, version=version, sha256=digest, bytes=size, sent=sent, template=ours,
        stop=[*chat.stop], statuses=statuses, notes=[*chat.notes],
    )  # fmt: skip


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _stop_texts(tokenizer: PreTrainedTokenizerBase, model: Path, turns: Turns | None) -> tuple[str, ...]:
    """End tokens of tokenizer and generation config, and the special token that ends an assistant's turn."""
    found = [str(tokenizer.eos_token)] if tokenizer.eos_token else []
    try:
        told = json.loads((model / "generation_config.json").read_bytes()).get("eos_token_id")
    except FileNotFoundError:
        told = None
    ids = [told] if isinstance(told, int) else told or []
    found += [str(tokenizer.convert_ids_to_tokens(one)) for one in ids]
    special = sorted((str(token) for token in tokenizer.added_tokens_encoder), key=len, reverse=True)
    after = "" if turns is None else turns.after_answer().lstrip()
    found += [token for token in special if after.startswith(token)][:1]
    return tuple(dict.fromkeys(found))


def _version(client: httpx.Client, url: str) -> str:
    with _talking("asking for its version", f"; start it with `ollama serve`, or give the right url ({url})"):
        answer = client.get("/api/version")
    _require(answer, (200,), "asking for its version")
    try:
        return str(answer.json()["version"])
    except (ValueError, KeyError, TypeError):
        raise ExportError(f"ollama: what answers at {url} is no Ollama server: {shorten(answer.text, 120)}") from None


def _has(client: httpx.Client, digest: str) -> bool:
    with _talking("asking for the file"):
        answer = client.head(f"/api/blobs/sha256:{digest}")
    _require(answer, (200, 404), "asking for the file")
    return answer.status_code == 200


def _send(client: httpx.Client, gguf: Path, digest: str, size: int, say: Say) -> None:
    progress = _Progress(gguf, size, say)
    with _talking(lambda: f"sending {gguf.name}, {progress.done:,} of {size:,} bytes"):
        answer = client.post(
            f"/api/blobs/sha256:{digest}", content=progress.chunks(), headers={"Content-Length": str(size)}
        )
    _require(answer, (200, 201), f"sending {gguf.name}")


class _Progress:
    """A file's bytes, counted as they are read."""

    def __init__(self, path: Path, size: int, say: Say) -> None:
        self.done = 0
        self._path, self._size, self._say = path, size, say

    def chunks(self) -> Iterator[bytes]:
        told = time.monotonic()
        with self._path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
                self.done += len(chunk)
                if time.monotonic() - told >= _TOLD_EVERY_S or self.done >= self._size:
                    told = time.monotonic()
                    self._say(f"ollama: {self.done:,} of {self._size:,} bytes sent")


def _create(client: httpx.Client, body: dict[str, Any], say: Say) -> list[str]:
    """The statuses, the last of which is `success`."""
    statuses: list[str] = []
    with (
        _talking(lambda: f"making the model, after {statuses[-1]!r}" if statuses else "making the model"),
        client.stream("POST", "/api/create", json=body) as answer,
    ):
        if answer.status_code != 200:
            answer.read()
        _require(answer, (200,), "making the model")
        for line in _lines(answer):
            status = _status(line)
            if not statuses or statuses[-1] != status:
                statuses.append(status)
                say(f"ollama: {status}")
    if not statuses or statuses[-1] != "success":
        last = f"its last word was {shorten(statuses[-1])}" if statuses else "it said nothing"
        raise ExportError(f"ollama: the server ended its answer before the model was made; {last}")
    return statuses


def _lines(answer: httpx.Response) -> Iterator[bytes]:
    rest = b""
    for chunk in answer.iter_bytes():
        *whole, rest = (rest + chunk).split(b"\n")
        if len(rest) > _LINE_LIMIT:
            raise ExportError(f"ollama: the server sent a status of more than {_LINE_LIMIT:,} bytes")
        yield from (line for line in whole if line.strip())
    if rest.strip():
        yield rest


def _status(line: bytes) -> str:
    try:
        told = json.loads(line)
    except ValueError:
        raise ExportError(f"ollama: the server sent a status that is no JSON: {shorten(line, 200)}") from None
    if not isinstance(told, dict) or "error" in told or not isinstance(told.get("status"), str):
        why = told["error"] if isinstance(told, dict) and "error" in told else told
        raise ExportError(f"ollama: the server could not make the model: {shorten(why, 400)}")
    return str(told["status"])


def _check(client: httpx.Client, name: str, chat: Chat) -> bool:
    """Whether the server chats by our template, and not by the GGUF's own.

    Raises:
        ExportError: by another one.
    """
    with _talking("asking what it has"):
        answer = client.post("/api/show", json={"model": name})
    _require(answer, (200,), "asking what it has")
    try:
        template = answer.json().get("template", "")
    except (ValueError, AttributeError):
        raise ExportError(f"ollama: the server told of {name!r} with {shorten(answer.text, 120)}") from None
    if chat.template is not None and template == chat.template:
        return True
    if chat.own is not None and template == chat.own:  # it prefers it where both know tools
        return False
    raise ExportError(
        f"ollama: {name!r} was made, and chats by another template than the model's: {shorten(template, 200)}; "
        + (chat.notes[0] if chat.template is None and chat.notes else "give it the Modelfile's")
    )


@contextmanager
def _talking(what: str | Callable[[], str], hint: str = "") -> Iterator[None]:
    """Turns what the network does into errors that say what was being done."""
    try:
        yield
    except httpx.TransportError as error:
        doing = what if isinstance(what, str) else what()
        why = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            raise ExportError(f"ollama: no server answers ({why}){hint}") from error
        kind = "did not answer in time" if isinstance(error, httpx.TimeoutException) else "broke off"
        raise ExportError(f"ollama: the server {kind} while {doing} ({why})") from error


def _require(answer: httpx.Response, wanted: tuple[int, ...], doing: str) -> None:
    if answer.status_code in wanted:
        return
    if answer.is_redirect:
        raise ExportError(f"ollama: the server answers with a redirect while {doing}; it is not followed")
    try:
        told = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        told = answer.text
    raise ExportError(f"ollama: the server refused {doing} with {answer.status_code}: {shorten(told, 400)}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
