"""A small server with the part of the hub's API that a push of small files and a read of one file need."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_test"


@dataclass
class State:
    """The hub's content, and how it fails."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    commits: int = 0
    asked: list[str] = field(default_factory=list)
    answers: dict[str, int] = field(default_factory=dict)  # end of a path -> status instead of the right answer
    loses: str | None = None  # a file that it accepts but does not keep
    renamed: dict[str, str] = field(default_factory=dict)  # old name of a repository -> new one


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    state: State

    def log_message(self, *_: Any) -> None:
        """Log nothing."""

    def answer(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def refused(self, path: str) -> bool:
        self.state.asked.append(f"{self.command} {path}")
        for end, status in self.state.answers.items():
            if path.endswith(end):
                self.answer(status, {"error": "as it was told"})
                return True
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
            return True
        return False

    def info(self, repo: str) -> dict[str, Any]:
        files = self.state.repos[repo]
        return {
            "id": repo, "modelId": repo, "private": self.state.private[repo], "sha": f"{self.state.commits:040x}",
            "siblings": [{"rfilename": name, "size": len(content)} for name, content in files.items()],
        }  # fmt: skip

    def do_HEAD(self) -> None:
        """`/{repo}/resolve/main/{file}`; the hub does not show whether a file exists that the user may not read."""
        path = urlsplit(self.path).path
        self.state.asked.append(f"HEAD {path}")
        repo, _, name = path.removeprefix("/").partition("/resolve/main/")
        told = next((status for end, status in self.state.answers.items() if path.endswith(end)), None)
        may = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        self.send_response(told or self._found(repo, name, may))
        if repo in self.state.renamed:
            self.send_header("Location", f"/{self.state.renamed[repo]}/resolve/main/{name}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _found(self, repo: str, name: str, may: bool) -> int:
        if repo in self.state.renamed:
            return 307
        if repo not in self.state.repos or (self.state.private.get(repo) and not may):
            return 404 if may else 401
        return 200 if name in self.state.repos[repo] else 404

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if self.refused(path):
            return
        repo = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if path.startswith("/api/models/") and repo in self.state.repos:
            self.answer(200, self.info(repo))
        else:
            self.answer(404, {"error": "not found"})

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.refused(path):
            return
        if path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            told = json.loads(body)
            repo = f"{told.get('organization') or 'me'}/{told['name']}"
            if repo in self.state.repos:
                self.answer(409, {"error": "You already created this model repo", "url": f"/{repo}"})
                return
            self.state.repos[repo] = {}
            self.state.private[repo] = told.get("private") is True or told.get("visibility") == "private"
            self.answer(200, {"url": f"http://{self.headers['Host']}/{repo}", "name": repo})
        elif "/preupload/" in path:
            files = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for each in json.loads(body)["files"]]  # fmt: skip
            self.answer(200, {"files": files})
        elif "/commit/" in path:
            repo = "/".join(path.removeprefix("/api/models/").split("/")[:2])
            for line in body.splitlines():
                change = json.loads(line)
                if change["key"] == "file" and change["value"]["path"] != self.state.loses:
                    self.state.repos[repo][change["value"]["path"]] = base64.b64decode(change["value"]["content"])
            self.state.commits += 1
            sha = f"{self.state.commits:040x}"
            self.answer(
                200,
                {"success": True, "commitOid": sha, "commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{sha}"},
            )
        else:
            self.answer(404, {"error": f"not spoken here: {path}"})


@contextmanager
def hub() -> Iterator[tuple[str, State]]:
    """The hub's address and its content."""
    state = State()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"state": state}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
