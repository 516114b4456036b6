"""Create a model on an Ollama server from a GGUF file: write a Modelfile, or use the server's HTTP API.

    HEAD /api/blobs/sha256:...   whether the server has the file
    POST /api/blobs/sha256:...   the file, from disk; 201, or 400 if the digest differs
    POST /api/create             name, files, template, parameters; one line of JSON per status, until `success`
    POST /api/show               the template that the server now has

This follows the sources of Ollama 0.33 (server/create.go, server/routes.go, template/template.go); docs/api.md has had
the same sequence since 0.5.5. From 0.30 on Ollama runs models with llama.cpp's server and, without a Go template, uses
the GGUF's own chat template; older versions need a Go template. One is sent whenever possible: without one, `create`
takes the nearest template that it knows, if one is near.
"""

import hashlib
import ipaddress
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, Field
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.export.go_template import Turns, UnsupportedTemplate, read_turns
from llama_stack_provider_moe.compute.models.chat_templates import default_template
from llama_stack_provider_moe.errors import ExportError, InvalidInput, shorten
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.ground.small_files import check_ids, read_object
from llama_stack_provider_moe.spec.destinations import OllamaServer

Say = Callable[[str], None]
_CHUNK = 1 << 20
_REPORT_EVERY_S = 5.0
_LINE_LIMIT = 1 << 20  # bytes per status
# Seconds. Ollama does not answer while it hashes and copies a file, which takes minutes for a large one.
TIMEOUT = httpx.Timeout(600.0, connect=10.0, pool=10.0)


@dataclass(frozen=True)
class Chat:
    """Chat settings of a model in Ollama.

    Attributes:
        template: a Go template; None: the tokenizer's template can't be translated.
        stop: texts that end an answer.
        own: the tokenizer's chat template, which the GGUF contains.
        notes: remarks for the user.
    """

    template: str | None
    stop: tuple[str, ...]
    own: str | None
    notes: tuple[str, ...]


class OllamaResult(BaseModel):
    """The result of a push to an Ollama server."""

    name: str
    url: str
    version: str = Field(description="Version of the server.")
    sha256: str = Field(description="Digest of the GGUF file.")
    bytes: int
    sent: bool = Field(description="False: the server had the file already.")
    template: bool = Field(description="Whether it uses our template; false: it uses the GGUF's own.")
    stop: list[str]
    statuses: list[str] = Field(description="Statuses of the server while it created the model.")
    notes: list[str]

    def text(self) -> str:
        """The result in words."""
        how = f"{self.bytes:,} bytes sent" if self.sent else "the server had the file already"
        return "\n".join([f"{self.name} on {self.url} (Ollama {self.version}): {how}", *self.notes])


def read_chat(model: Path) -> Chat:
    """Template and stop texts for a model's folder, from its tokenizer and generation config.

    Raises:
        ExportError: the tokenizer can't be loaded, or has no token that ends an answer.
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
    except UnsupportedTemplate as error:
        notes = (
            f"no TEMPLATE: {error}. Ollama 0.30 and later uses the GGUF's own chat template; for an older version "
            "write a TEMPLATE yourself",
        )
    stop = _stop_texts(tokenizer, model, turns)
    if not stop:
        raise ExportError(f"ollama: the tokenizer in {model} has no token that ends an answer")
    template = None if turns is None else turns.go()
    if template is not None and '"""' in template:
        raise ExportError('ollama: the chat template contains """, which ends a TEMPLATE in a Modelfile')
    own = default_template(tokenizer)
    return Chat(template, stop, own, notes)


def modelfile(gguf: Path, model: Path) -> str:
    """The text of a Modelfile beside `gguf`, for `ollama create NAME -f Modelfile`.

    Args:
        gguf: the file; the Modelfile contains only its name.
        model: Hugging Face folder that it was made from.

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
    """Create a model from `gguf` on an Ollama server; it replaces a model of the same name when complete.

    Args:
        gguf: the file.
        model: Hugging Face folder that it was made from.
        server: name and address.
        say: gets a line about what is sent, and each status of the server.
        transport: replaces the network.

    Raises:
        InvalidInput: `gguf` is not a file.
        ExportError: the server does not exist, refuses, breaks the connection, or lacks what was sent. If it has the
            complete file, the next attempt does not send it again.
    """
    if not gguf.is_file():
        raise InvalidInput("gguf", str(gguf), "a GGUF file")
    chat, digest, size = read_chat(model), _sha256(gguf), gguf.stat().st_size
    here = is_loopback(server.url)
    # A proxy from the environment must not be used for this machine; a redirect could send the model anywhere.
    with httpx.Client(
        base_url=server.url, timeout=TIMEOUT, follow_redirects=False, trust_env=not here, transport=transport
    ) as client:
        version = _version(client, server.url)
        sent = not _has(client, digest)
        if sent:
            _send(client, gguf, digest, size, say)
        body: dict[str, object] = {
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
    """Whether an address is on this machine."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _stop_texts(tokenizer: PreTrainedTokenizerBase, model: Path, turns: Turns | None) -> tuple[str, ...]:
    """End tokens of the tokenizer and generation config, and the special token that ends an assistant's turn."""
    found = [str(tokenizer.eos_token)] if tokenizer.eos_token else []
    path = model / "generation_config.json"
    try:
        ids = check_ids(path, read_object(path), "eos_token_id")
    except FileNotFoundError:
        ids = []
    found += [str(tokenizer.convert_ids_to_tokens(one)) for one in ids]
    special = sorted((str(token) for token in tokenizer.added_tokens_encoder), key=len, reverse=True)
    after = "" if turns is None else turns.after_answer().lstrip()
    found += [token for token in special if after.startswith(token)][:1]
    return tuple(dict.fromkeys(found))


def _version(client: httpx.Client, url: str) -> str:
    with _network_errors("asking for its version", f"; start it with `ollama serve`, or give the right url ({url})"):
        answer = client.get("/api/version")
    _require(answer, (200,), "asking for its version")
    try:
        return str(answer.json()["version"])
    except (ValueError, KeyError, TypeError):
        raise ExportError(f"ollama: {url} is not an Ollama server; it answered {shorten(answer.text, 120)}") from None


def _has(client: httpx.Client, digest: str) -> bool:
    with _network_errors("asking for the file"):
        answer = client.head(f"/api/blobs/sha256:{digest}")
    _require(answer, (200, 404), "asking for the file")
    return answer.status_code == 200


def _send(client: httpx.Client, gguf: Path, digest: str, size: int, say: Say) -> None:
    progress = _Progress(gguf, size, say)
    with _network_errors(lambda: f"sending {gguf.name}, {progress.done:,} of {size:,} bytes"):
        answer = client.post(
            f"/api/blobs/sha256:{digest}", content=progress.chunks(), headers={"Content-Length": str(size)}
        )
    _require(answer, (200, 201), f"sending {gguf.name}")


class _Progress:
    """The bytes of a file, counted as they are read."""

    def __init__(self, path: Path, size: int, say: Say) -> None:
        self.done = 0
        self._path, self._size, self._say = path, size, say

    def chunks(self) -> Iterator[bytes]:
        reported = time.monotonic()
        with liveness.stage("sending to Ollama", self._size, "bytes") as counter, self._path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
                self.done += len(chunk)
                counter.at(self.done)
                if time.monotonic() - reported >= _REPORT_EVERY_S or self.done >= self._size:
                    reported = time.monotonic()
                    self._say(f"ollama: {self.done:,} of {self._size:,} bytes sent")


def _create(client: httpx.Client, body: dict[str, object], say: Say) -> list[str]:
    """Create the model; return the statuses, the last of which is `success`."""
    statuses: list[str] = []
    with (
        _network_errors(lambda: f"creating the model, after {statuses[-1]!r}" if statuses else "creating the model"),
        client.stream("POST", "/api/create", json=body) as answer,
    ):
        if answer.status_code != 200:
            answer.read()
        _require(answer, (200,), "creating the model")
        for line in liveness.counted("waiting for Ollama to create the model", _lines(answer), unit="statuses"):
            status = _status(line)
            if not statuses or statuses[-1] != status:
                statuses.append(status)
                say(f"ollama: {status}")
    if not statuses or statuses[-1] != "success":
        last = f"its last status was {shorten(statuses[-1])}" if statuses else "it sent no status"
        raise ExportError(f"ollama: the server ended its answer before it created the model; {last}")
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
        status = json.loads(line)
    except ValueError:
        raise ExportError(f"ollama: the server sent a status that is not JSON: {shorten(line, 200)}") from None
    if not isinstance(status, dict) or "error" in status or not isinstance(status.get("status"), str):
        why = status["error"] if isinstance(status, dict) and "error" in status else status
        raise ExportError(f"ollama: the server could not create the model: {shorten(why, 400)}")
    return str(status["status"])


def _check(client: httpx.Client, name: str, chat: Chat) -> bool:
    """Whether the server uses our template (true) or the GGUF's own (false).

    Raises:
        ExportError: it uses another template.
    """
    with _network_errors("asking what it has"):
        answer = client.post("/api/show", json={"model": name})
    _require(answer, (200,), "asking what it has")
    try:
        template = answer.json().get("template", "")
    except (ValueError, AttributeError):
        raise ExportError(f"ollama: the server described {name!r} as {shorten(answer.text, 120)}") from None
    if chat.template is not None and template == chat.template:
        return True
    if chat.own is not None and template == chat.own:  # preferred by Ollama if both support tools
        return False
    raise ExportError(
        f"ollama: {name!r} was created, but does not use the model's template: {shorten(template, 200)}; "
        + (chat.notes[0] if chat.template is None and chat.notes else "give it the template in the Modelfile")
    )


@contextmanager
def _network_errors(what: str | Callable[[], str], hint: str = "") -> Iterator[None]:
    """Turn network errors into errors that say what was being done."""
    try:
        yield
    except httpx.TransportError as error:
        doing = what if isinstance(what, str) else what()
        why = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            raise ExportError(f"ollama: no server answers ({why}){hint}") from error
        kind = "did not answer in time" if isinstance(error, httpx.TimeoutException) else "broke the connection"
        raise ExportError(f"ollama: the server {kind} while {doing} ({why})") from error


def _require(answer: httpx.Response, wanted: tuple[int, ...], doing: str) -> None:
    if answer.status_code in wanted:
        return
    if answer.is_redirect:
        raise ExportError(f"ollama: the server answers with a redirect while {doing}; redirects are not followed")
    try:
        why = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        why = answer.text
    raise ExportError(f"ollama: the server refused {doing} with {answer.status_code}: {shorten(why, 400)}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with liveness.stage(f"hashing {path.name}", path.stat().st_size, "bytes") as counter, path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            counter.advance(len(chunk))
    return digest.hexdigest()
