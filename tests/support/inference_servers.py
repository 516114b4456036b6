"""Small servers that keep the protocols of llama.cpp's router and of vLLM, or fail on request."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class State:
    """What a server has, what it was asked, and how it fails.

    Attributes:
        folder: of llama.cpp's router, whose files are its models once `reload` is asked for.
        listed: its models.
        bases: the models that vLLM runs: `id`, `root`.
        adapters: folders of vLLM's adapters by name.
        asked: method and path of each request.
        answers: (method, start of a path) -> (status, body) instead of the right answer.
    """

    folder: Path | None = None
    listed: set[str] = field(default_factory=set)
    bases: list[dict[str, str]] = field(default_factory=list)
    adapters: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    answers: dict[tuple[str, str], tuple[int, Any]] = field(default_factory=dict)

    def models(self) -> list[dict[str, Any]]:
        """The entries of `GET /v1/models`."""
        bases = [{"object": "model", "parent": None, **each} for each in self.bases]
        base = self.bases[0]["id"] if self.bases else None
        loras = [{"id": name, "root": path, "parent": base} for name, path in self.adapters.items()]
        return [*bases, *loras, *({"id": name, "object": "model"} for name in sorted(self.listed))]

    def reload(self) -> None:
        """Read the folder again, as the router does for `?reload=1`."""
        if self.folder is not None:
            self.listed = {path.stem for path in self.folder.glob("*.gguf")}


class _Handler(BaseHTTPRequestHandler):
    state: State

    def log_message(self, *_: Any) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        if self.instead():
            return
        if self.path == "/models?reload=1":
            self.state.reload()
        self.answer(200, {"object": "list", "data": self.state.models()})

    def do_POST(self) -> None:
        if self.instead():
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/load_lora_adapter":
            self.load(body["lora_name"], body["lora_path"])
        elif self.path == "/v1/unload_lora_adapter":
            gone = self.state.adapters.pop(body["lora_name"], None)
            self.answer(200 if gone else 404, "Success" if gone else {"error": {"message": "not found", "code": 404}})
        elif body["model"] in {each["id"] for each in self.state.models()}:
            message = {"role": "assistant", "content": "Yes"}
            self.answer(200, {"object": "chat.completion", "choices": [{"index": 0, "message": message}]})
        else:
            self.answer(404, {"error": {"message": f"model '{body['model']}' not found", "code": 404}})

    def load(self, name: str, path: str) -> None:
        if name in self.state.adapters:
            message = f"The lora adapter '{name}' has already been loaded."
            self.answer(400, {"error": {"message": message, "type": "InvalidUserInput", "param": None, "code": 400}})
        elif not (Path(path) / "adapter_config.json").is_file():
            self.answer(404, {"error": {"message": f"No adapter found for {path}", "code": 404}})
        else:
            self.state.adapters[name] = path
            self.answer(200, f"Success: LoRA adapter '{name}' added successfully.")

    def instead(self) -> bool:
        self.state.asked.append(f"{self.command} {self.path}")
        for (method, path), (status, body) in self.state.answers.items():
            if method == self.command and self.path.startswith(path):
                self.answer(status, body)
                return True
        return False

    def answer(self, status: int, body: Any) -> None:
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def inference(folder: Path | None = None) -> Iterator[tuple[str, State]]:
    """A server's address and its state.

    Args:
        folder: of llama.cpp's router; None for vLLM.
    """
    state = State(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"state": state}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
