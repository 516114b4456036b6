"""A receiver of webhooks on this machine, which answers as a test wants."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Hooks:
    """What came, and what is answered: one status after the other, the last one again and again."""

    url: str = ""
    answers: list[int] = field(default_factory=lambda: [204])
    location: str = ""
    body: bytes = b""
    received: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    taken: list[bool] = field(default_factory=list)  # of each answer: whether the sender read it to its end


@contextmanager
def hook_server() -> Iterator[Hooks]:
    """A receiver that listens until the end."""
    hooks = Hooks()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            hooks.received.append((self.path, dict(self.headers), body))
            status = hooks.answers.pop(0) if len(hooks.answers) > 1 else hooks.answers[0]
            self.send_response(status)
            if hooks.location:
                self.send_header("location", hooks.location)
            self.send_header("content-length", str(len(hooks.body)))
            self.end_headers()
            try:
                self.wfile.write(hooks.body)
                hooks.taken.append(True)
            except OSError:  # the sender has read enough
                hooks.taken.append(False)
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    hooks.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hooks
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
