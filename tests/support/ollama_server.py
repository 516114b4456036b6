"""A small server that follows Ollama's API (0.33) for blobs, models and chats, or fails on request."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class State:
    """The server's content, its requests, and how it fails."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    lengths: list[str | None] = field(default_factory=list)
    # a method and the start of a path -> (status, body) instead of the right answer
    answers: dict[tuple[str, str], tuple[int, Any]] = field(default_factory=dict)
    hang_up_after: int | None = None  # bytes of an upload
    statuses: list[Any] | None = None  # lines of a creation instead of the right ones; bytes are sent unchanged
    keeps_template: bool = True
    redirect_to: str | None = None


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    state: State

    def log_message(self, *_: Any) -> None:
        """Log nothing."""

    def answer(self, status: int, body: Any = None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        if self.state.redirect_to is not None:
            self.send_header("Location", self.state.redirect_to)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def instead(self) -> bool:
        self.state.asked.append(f"{self.command} {self.path.partition('sha256')[0]}")
        for (method, path), (status, body) in self.state.answers.items():
            if method == self.command and self.path.startswith(path):
                self.close_connection = True
                self.answer(status, body)
                return True
        return False

    def do_HEAD(self) -> None:
        if not self.instead():
            self.answer(200 if self.digest() in self.state.blobs else 404)

    def do_GET(self) -> None:
        if not self.instead():
            self.answer(200, {"version": "0.33.0"}) if self.path == "/api/version" else self.answer(404)

    def do_POST(self) -> None:
        if self.instead():
            return
        if self.path.startswith("/api/blobs/"):
            self.take_blob()
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/api/create":
            self.create(body)
        elif self.path == "/v1/chat/completions" and body["model"] in self.state.models:
            self.answer(200, {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Yes"}}]})
        elif (made := self.state.models.get(body["model"])) is None:
            self.answer(404, {"error": f"model '{body['model']}' not found"})
        else:
            self.answer(200, {"template": made.get("template", "{{ .Prompt }}")})

    def do_DELETE(self) -> None:
        if not self.instead():
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(200 if self.state.models.pop(body["model"], None) else 404)

    def digest(self) -> str:
        return self.path.rpartition("/")[2]

    def take_blob(self) -> None:
        self.state.lengths.append(self.headers["Content-Length"])
        size = int(self.headers["Content-Length"])
        if self.state.hang_up_after is not None:
            self.rfile.read(self.state.hang_up_after)
            self.close_connection = True
            self.connection.close()
            return
        content = self.rfile.read(size)
        found = f"sha256:{hashlib.sha256(content).hexdigest()}"
        if found != self.digest():
            self.answer(400, {"error": f'digest mismatch, expected "{self.digest()}", got "{found}"'})
            return
        self.state.blobs[found] = content
        self.answer(201)

    def create(self, body: dict[str, Any]) -> None:
        missing = [digest for digest in body["files"].values() if digest not in self.state.blobs]
        if missing:
            self.answer(500, {"error": f"open {missing[0]}: no such file or directory"})
            return
        lines = self.state.statuses
        if lines is None:
            made = [*body["files"].values(), "config"]
            lines = [{"status": "parsing GGUF"}, *({"status": f"creating new layer {one}"} for one in made)]
            lines += [{"status": "writing manifest"}, {"status": "success"}]
            kept = body if self.state.keeps_template else {**body, "template": "{{ .Prompt }}"}
            self.state.models[body["model"]] = kept
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in lines:
            if line == "hang up":
                self.close_connection = True
                self.connection.close()
                return
            text = line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"
            for part in (text[: len(text) // 2], text[len(text) // 2 :]):  # lines arrive in pieces
                self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")


@contextmanager
def ollama() -> Iterator[tuple[str, State]]:
    """The server's address and its content."""
    state = State()
    handler = type("Bound", (Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # connections are cut on purpose
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
