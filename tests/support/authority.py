"""The endpoint that a host with `custom` authentication asks who a token belongs to."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Authority(BaseHTTPRequestHandler):
    users: Mapping[str, Mapping[str, Any]]

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        user = self.users.get(asked["api_key"])
        content = json.dumps({**(user or {}), "message": "known" if user else "unknown"}).encode()
        self.send_response(200 if user else 403)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def authority(users: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The endpoint's URL; `users` are its answers by token."""
    handler = type("Authority", (_Authority,), {"users": users})
    endpoint = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=endpoint.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{endpoint.server_port}/"
    finally:
        endpoint.shutdown()
        thread.join()
        endpoint.server_close()
