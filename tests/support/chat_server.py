"""A small server with OpenAI's chat completions, whole and as a stream, which answers what the test says."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "talker"


@dataclass
class Chat:
    """What the server answers, and what it was asked.

    Attributes:
        answer: the text of each answer.
        delay_s: seconds before each answer.
        asked: the bodies of the requests for answers.
        url: without a path.
    """

    answer: str = "Paris."
    delay_s: float = 0.0
    asked: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    chat: Chat

    def log_message(self, *_: Any) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        models = [{"id": MODEL, "object": "model", "created": 1, "owned_by": "test"}]
        self._send(json.dumps({"object": "list", "data": models}).encode(), "application/json")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.chat.asked.append(body)
        time.sleep(self.chat.delay_s)
        about = {"id": "chat-1", "created": 1, "model": MODEL}
        if not body.get("stream"):
            message = {"role": "assistant", "content": self.chat.answer}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            whole = {**about, "object": "chat.completion", "choices": [choice], "usage": usage}
            self._send(json.dumps(whole).encode(), "application/json")
            return
        words = [f"{word} " for word in self.chat.answer.split()]
        deltas = [{"role": "assistant", "content": ""}, *({"content": word} for word in words), {}]
        lines = []
        for number, delta in enumerate(deltas):
            end = "stop" if number == len(deltas) - 1 else None
            choice = {"index": 0, "delta": delta, "finish_reason": end}
            lines.append(json.dumps({**about, "object": "chat.completion.chunk", "choices": [choice]}))
        self._send("".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]).encode(), "text/event-stream")

    def _send(self, content: bytes, media_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def chatting(port: int = 0) -> Iterator[Chat]:
    """The server until the block ends; port 0: any."""
    chat = Chat()
    server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"chat": chat}))
    chat.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
