"""Shared by the tests of `control.server`: a service without a server, and its routes in this process."""

import asyncio
import functools
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import unquote_to_bytes

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from llama_stack.core.datatypes import User
from llama_stack.core.request_headers import RequestProviderDataContext
from llama_stack_api import DatasetNotFoundError
from opentelemetry.metrics import Meter
from starlette.routing import Route, compile_path

from llama_stack_provider_moe.control.server import compat
from llama_stack_provider_moe.control.server.routes import PREFIX, create_router
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec.server_config import ProviderConfig, SupervisorConfig
from tests.support.host_harness import hub_cache
from tests.support.jobs_support import wait_for

ROWS = [{"prompt": f"Question {number}?", "completion": f"Answer {number}."} for number in range(12)]
BODY: dict[str, Any] = {"recipe": "sft", "model": "owner/name", "data": {"dataset_id": "good"}}


class Datasets:
    """The host's data sets; it calls `during` while one is read."""

    def __init__(self) -> None:
        bad = [dict(row) for row in ROWS]
        del bad[3]["prompt"]
        self.rows = {"good": ROWS, "bad": bad, "one": ROWS[:1]}
        self.during: Callable[[], Any] = lambda: None

    async def get_dataset(self, request: Any) -> SimpleNamespace:
        """Answer as the host's registry does."""
        self.during()
        if request.dataset_id not in self.rows:
            raise DatasetNotFoundError(request.dataset_id)
        source = SimpleNamespace(type="rows", rows=self.rows[request.dataset_id])
        return SimpleNamespace(provider_id="localfs", source=source)


@contextmanager
def serving_in_process(
    folder: Path,
    datasets: Datasets | None = None,
    meter: Meter | None = None,
    served: object | None = None,
    **settings: Any,
) -> Iterator[PostTrainingService]:
    """A service on `folder` that starts no supervisor, on a host with the API `served` for models if it is given.

    `settings` change the configuration of the service.
    """
    settings = {"child_env": {"HF_HUB_CACHE": str(hub_cache(folder / "hub", "owner/name"))}, **settings}
    config = ProviderConfig(state_dir=folder / "state", supervisor=SupervisorConfig(start=False), **settings)
    deps = {compat.Api.datasets: datasets or Datasets()} | ({} if served is None else {compat.Api.models: served})
    made = PostTrainingService(config, deps, meter=meter)
    asyncio.run(made.initialize())
    yield made
    asyncio.run(made.shutdown())
    if (application := _applications.pop(made, None)) is not None:
        _free_applications.append(application)


@contextmanager
def caller(principal: str, **attributes: list[str]) -> Iterator[None]:
    """Inside, requests come from `principal`, as the host's middleware would set it."""
    with RequestProviderDataContext({}, User(principal=principal, attributes=attributes)):
        yield


def submit(service: PostTrainingService, **changes: Any) -> str:
    """Submit a job; returns its id."""
    return asyncio.run(service.submit(BODY | changes)).job_uuid


def folder_of(service: PostTrainingService, job_id: str) -> JobFolder:
    """Where a job of `service` keeps its files."""
    return JobFolder(service.config.jobs_dir / job_id)


def app_of(service: PostTrainingService) -> FastAPI:
    """The routes of `service` without a host; the same for all calls until the service's end."""
    if service not in _applications:
        made = next((each for each in _free_applications if each.suits(service)), None)
        if made is None:
            made = Application(service)
        else:
            _free_applications.remove(made)
            made.service = weakref.ref(service)
        _applications[service] = made
    return _applications[service].app


class Application:
    """The routes, which take a second of processor time to make, and the service that answers them now.

    Whatever the routes keep of a service when they are made is looked up again each time they use it. What they read
    of its configuration then is in `read`: they suit a service with the same values.
    """

    def __init__(self, service: PostTrainingService) -> None:
        self.service = weakref.ref(service)
        self.read: dict[str, object] = {}
        self.is_made = False
        self.app, router = FastAPI(), create_router(cast(PostTrainingService, _Part(self, ())))
        self.app.router.routes.extend(router.routes)  # `include_router` would build each of them again
        self.app.state.routes = frozenset(
            (method, route.path)
            for route in router.routes
            if isinstance(route, Route)
            for method in route.methods or ()
        )
        self.is_made = True

    def suits(self, service: PostTrainingService) -> bool:
        """Whether these routes are those of `service`."""
        return all(getattr(service.config, name) == value for name, value in self.read.items())


class _Part:
    """A part of an application's service: that of the service which the application has now."""

    def __init__(self, application: Application, names: tuple[str, ...]) -> None:
        self._application = application
        self._names = names

    def __getattr__(self, name: str) -> Any:
        now = self._now()
        if self._application.is_made:
            return getattr(now, name)
        if self._names == ("config",):
            return self._application.read.setdefault(name, getattr(now, name))
        return _Part(self._application, (*self._names, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._now()(*args, **kwargs)

    def _now(self) -> Any:
        found = self._application.service()
        assert found is not None, "the service of these routes is gone"
        return functools.reduce(getattr, self._names, cast(Any, found))


_applications: "weakref.WeakKeyDictionary[PostTrainingService, Application]" = weakref.WeakKeyDictionary()
_free_applications: list[Application] = []


def ask(service: PostTrainingService, method: str, path: str, **request: Any) -> httpx.Response:
    """The answer of a route; `path` starts after the prefix."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app_of(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test" + PREFIX) as client:
            return await client.request(method, path, **request)

    answer = asyncio.run(send())
    must_be_documented(service, answer)
    return answer


# Routes (method and path) of an application -> its document: pattern, path, and method -> documented statuses. The
# document takes a second of processor time, and is the same for every service with the same routes.
_documents: dict[frozenset[tuple[str, str]], list[tuple[re.Pattern[str], str, dict[str, set[str]]]]] = {}


def must_be_documented(service: PostTrainingService, answer: httpx.Response) -> None:
    """Check that the OpenAPI document lists the status of `answer` for its route."""
    method, path = answer.request.method.lower(), answer.request.url.path
    for pattern, template, operations in _document(app_of(service)):  # in the order in which routes are tried
        if method in operations and pattern.match(path):
            told = f"{answer.status_code} of {template} is not documented"
            assert str(answer.status_code) in operations[method], told
            return
    assert answer.status_code in (404, 405), "there is no such route"


def _document(app: FastAPI) -> list[tuple[re.Pattern[str], str, dict[str, set[str]]]]:
    if app.state.routes not in _documents:
        _documents[app.state.routes] = [
            (
                compile_path(template.replace("{path}", "{path:path}"))[0],
                template,
                {method: set(operation["responses"]) for method, operation in operations.items()},
            )
            for template, operations in app.openapi()["paths"].items()
        ]
    return _documents[app.state.routes]


def get_raw(service: PostTrainingService, path: str) -> httpx.Response:
    """The answer to an unchanged path: httpx would resolve its `..`, but an attacker's client would not."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    raw = (PREFIX + path).encode()
    asyncio.run(app_of(service)(scope_of(raw), receive, send))
    body = b"".join(message.get("body", b"") for message in sent)
    return httpx.Response(sent[0]["status"], headers=sent[0]["headers"], content=body)


def scope_of(raw_path: bytes, query: bytes = b"", method: str = "GET") -> dict[str, Any]:
    """The ASGI scope that uvicorn makes for a request."""
    return {
        "type": "http", "asgi": {"spec_version": "2.3"}, "http_version": "1.1", "method": method, "headers": [],
        "path": unquote_to_bytes(raw_path).decode("utf-8", "replace"), "raw_path": raw_path, "query_string": query,
        "root_path": "", "scheme": "http", "server": ("test", 80), "client": ("test", 1),
    }  # fmt: skip


@contextmanager
def over_http(service: PostTrainingService, port: int = 0) -> Iterator[str]:
    """Serve the routes of `service` on a port of this machine with uvicorn, without a host; yields their URL."""
    config = uvicorn.Config(app_of(service), host="127.0.0.1", port=port, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    # In a thread uvicorn handles no signals, which `compat.is_stopping` reads.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "is_stopping", lambda: server.should_exit)
        try:
            wait_for(lambda: server.started)
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
