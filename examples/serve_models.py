"""Serves every GGUF file of a folder, each by its name, with OpenAI's chat API: the inference behind `serving:`.

    $ python examples/serve_models.py /srv/models --port 8080

`llama-server` does this by itself (`--models-dir`); if it is on the PATH (or --llama-server names it), this program
becomes it. Otherwise it starts one server of the package `xllamacpp` (the extra `serve`) for each model that is asked
for, keeps at most --most of them, and stops the one that was not used for longest. It listens on 127.0.0.1 without
authentication, until Ctrl-C.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from examples.serve_gguf import READY_WITHIN_S, ServingFailed, llama_cpp

BODY_LIMIT_BYTES = 64 << 20
LISTS = ("/models", "/v1/models")
CHATS = ("/v1/chat/completions", "/v1/completions", "/chat/completions", "/completions")


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        text: for the person who sent the request.
    """

    def __init__(self, status: HTTPStatus, text: str) -> None:
        self.status = status
        super().__init__(text)


@dataclass
class Loaded:
    """A model that is served, or about to be.

    Attributes:
        version: which file it was started with.
        url: of its server; "" until it is ready.
        users: requests that it is answering.
        used_at: monotonic time of the last one.
        stack: ends its server.
    """

    version: tuple[int, int, int]
    url: str = ""
    users: int = 0
    used_at: float = 0.0
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


class Models:
    """The models of a folder.

    Args:
        folder: has the files.
        state: folder for logs.
        most: largest number of models in memory.
        context: largest number of tokens in a conversation.
        threads: number of threads of each model.
    """

    def __init__(self, folder: Path, state: Path, most: int, context: int, threads: int) -> None:
        self._folder, self._state, self._most = folder, state, most
        self._context, self._threads = context, threads
        self._loaded: dict[str, Loaded] = {}
        self._changed = threading.Condition()

    def names(self) -> list[str]:
        """Return the names of all models; the server of one whose file is gone or new is stopped."""
        found = sorted(path.stem for path in self._folder.glob("*.gguf") if not path.name.startswith("."))
        with self._changed:
            for name in [name for name, each in self._loaded.items() if not each.users and each.url]:
                if self._version(name) != self._loaded[name].version:
                    self._stop(name)
        return found

    @contextlib.contextmanager
    def serving(self, name: str) -> Iterator[str]:
        """Yield the address of a model's server, which stays until the block ends.

        Args:
            name: of the model.

        Raises:
            Refused: there is no such model, or its server can't be started.
        """
        loaded = self._taken(name)
        try:
            yield loaded.url
        finally:
            with self._changed:
                loaded.users -= 1
                loaded.used_at = time.monotonic()
                self._changed.notify_all()

    def close(self) -> None:
        """Stop all servers."""
        with self._changed:
            for name in list(self._loaded):
                self._stop(name)

    def _taken(self, name: str) -> Loaded:
        until = time.monotonic() + READY_WITHIN_S
        while True:
            if name not in self.names():  # a name is never made into a path before this
                raise Refused(HTTPStatus.NOT_FOUND, f"there is no model {name!r}")
            with self._changed:
                loaded = self._loaded.get(name)
                if loaded is not None and loaded.url:
                    loaded.users += 1
                    return loaded
                if loaded is None and self._made_room():
                    version = self._version(name)
                    if version is None:
                        continue
                    loaded = self._loaded[name] = Loaded(version)
                    break
                if not self._changed.wait(timeout=until - time.monotonic()) and time.monotonic() > until:
                    raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "all models are busy; try again")
        return self._started(name, loaded)

    def _started(self, name: str, loaded: Loaded) -> Loaded:
        try:
            url = loaded.stack.enter_context(
                llama_cpp(self._folder / f"{name}.gguf", self._state, self._context, self._threads, alias=name)
            )
        except ServingFailed as failure:
            with self._changed:
                del self._loaded[name]
                self._changed.notify_all()
            raise Refused(HTTPStatus.INTERNAL_SERVER_ERROR, str(failure)) from failure
        with self._changed:
            loaded.url, loaded.users = url, 1
            self._changed.notify_all()
        return loaded

    def _made_room(self) -> bool:
        if len(self._loaded) < self._most:
            return True
        idle = [name for name, each in self._loaded.items() if each.url and not each.users]
        if not idle:
            return False
        self._stop(min(idle, key=lambda name: self._loaded[name].used_at))
        return True

    def _stop(self, name: str) -> None:
        self._loaded.pop(name).stack.close()
        self._changed.notify_all()

    def _version(self, name: str) -> tuple[int, int, int] | None:
        try:
            found = (self._folder / f"{name}.gguf").stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns


class Handler(BaseHTTPRequestHandler):
    """One request."""

    models: Models

    def log_message(self, *_: Any) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        """Answer with the list of models, or that the server is well."""
        path = self.path.partition("?")[0]
        if path in LISTS:
            models = [{"id": name, "object": "model", "owned_by": "llamacpp"} for name in self.models.names()]
            self._answer(HTTPStatus.OK, {"object": "list", "data": models})
        elif path == "/health":
            self._answer(HTTPStatus.OK, {"status": "ok"})
        elif path == "/props":  # OGX looks here whether this is llama.cpp's server
            self._answer(HTTPStatus.OK, {"role": "router", "default_generation_settings": {}})
        else:
            self._refuse(Refused(HTTPStatus.NOT_FOUND, f"there is no {path}"))

    def do_POST(self) -> None:
        """Pass the request on to the server of its model."""
        try:
            path = self.path.partition("?")[0]
            if path not in CHATS:
                raise Refused(HTTPStatus.NOT_FOUND, f"there is no {path}")
            body = self._body()
            with self.models.serving(_model_in(body)) as url:
                self._pass_on(url + path, body)
        except Refused as refused:
            self._refuse(refused)

    def _body(self) -> bytes:
        length = self.headers["Content-Length"] or ""
        if not length.isdecimal():
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "a body needs a Content-Length")
        if int(length) > BODY_LIMIT_BYTES:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body may have {BODY_LIMIT_BYTES:,} bytes")
        return self.rfile.read(int(length))

    def _pass_on(self, url: str, body: bytes) -> None:
        headers = {"Content-Type": "application/json"}
        begun = False
        try:
            with httpx.stream("POST", url, content=body, headers=headers, timeout=None, trust_env=False) as answer:
                self.send_response(answer.status_code)
                self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
                self.end_headers()  # HTTP/1.0: the answer ends with the connection, streamed or not
                begun = True
                for piece in answer.iter_bytes():
                    self.wfile.write(piece)
                    self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):  # the client has left; the block above stops the answer
            return
        except httpx.TransportError as error:
            if not begun:
                raise Refused(HTTPStatus.BAD_GATEWAY, f"the model's server failed ({type(error).__name__})") from error

    def _refuse(self, refused: Refused) -> None:
        kind = "invalid_request_error" if refused.status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
        self._answer(refused.status, {"error": {"message": str(refused), "type": kind, "code": refused.status.value}})

    def _answer(self, status: HTTPStatus, content: dict[str, object]) -> None:
        text = json.dumps(content).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)


def _model_in(body: bytes) -> str:
    try:
        content = json.loads(body)
    except ValueError:
        raise Refused(HTTPStatus.BAD_REQUEST, "the body is not JSON") from None
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, str):
        raise Refused(HTTPStatus.BAD_REQUEST, "the body has no `model`")
    return model


@contextlib.contextmanager
def serving(folder: Path, port: int, most: int, context: int, threads: int) -> Iterator[str]:
    """Serve a folder from this process; yield the address.

    Args:
        folder: has the GGUF files.
        port: to listen on; 0: any that is free.
        most: largest number of models in memory.
        context: largest number of tokens in a conversation.
        threads: number of threads of each model.
    """
    with tempfile.TemporaryDirectory(prefix="moe-serving-") as state:
        models = Models(folder, Path(state), most, context, threads)
        server = ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (Handler,), {"models": models}))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
            models.close()


def main() -> int:
    """Serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(
        description="Serve every GGUF file of a folder.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder with the GGUF files")
    parser.add_argument("--port", type=int, default=8080, help="port to listen on, on 127.0.0.1")
    parser.add_argument("--most", type=int, default=2, help="largest number of models in memory")
    parser.add_argument("--context", type=int, default=2048, help="largest number of tokens in a conversation")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="number of threads of each model")
    parser.add_argument(
        "--llama-server", type=Path, help="program of llama.cpp's server; None: from the PATH, else xllamacpp"
    )
    given = parser.parse_args()
    if not given.folder.is_dir():
        print(f"serve_models: {given.folder} is not a folder", file=sys.stderr)
        return 1
    found = given.llama_server or shutil.which("llama-server")
    if found is not None:
        command = [
            str(found), "--models-dir", str(given.folder), "--models-max", str(given.most), "--host", "127.0.0.1",
            "--port", str(given.port), "-c", str(given.context), "-t", str(given.threads),
        ]  # fmt: skip
        os.execv(command[0], command)
    ends = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # the threads of the server inherit it
    with serving(given.folder, given.port, given.most, given.context, given.threads) as url:
        print(f"{url} serves {given.folder}", flush=True)
        signal.sigwait(ends)
    return 0


if __name__ == "__main__":
    sys.exit(main())
