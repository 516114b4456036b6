"""Routes that a host gets from a table at its start, and that are built by the first request."""

import asyncio
import inspect
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from llama_stack.core.server.fastapi_router_registry import get_router_routes

import llama_stack_provider_moe
from llama_stack_provider_moe.control.server import compat
from llama_stack_provider_moe.control.server.late_routes import Later, LateRouter, Row, rows_of
from llama_stack_provider_moe.control.server.late_service import LateService
from llama_stack_provider_moe.control.server.route_table import PREFIXES, rows
from llama_stack_provider_moe.control.server.routes import PREFIX, create_router
from llama_stack_provider_moe.errors import InvalidConfig
from llama_stack_provider_moe.spec.server_config import ProviderConfig, SupervisorConfig
from tests.contracts import route_table


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LateService]:
    """The provider as a host makes it, after its start."""
    config = ProviderConfig(
        state_dir=tmp_path_factory.mktemp("late") / "state", supervisor=SupervisorConfig(start=False)
    )
    made = asyncio.run(llama_stack_provider_moe.get_provider_impl(config, {}))
    yield made
    asyncio.run(made.shutdown())


@pytest.mark.parametrize("prometheus", [False, True])
def test_the_table_is_of_these_routes(prometheus: bool) -> None:
    assert rows(prometheus) == route_table.real(prometheus), "run `python -m tests.contracts.route_table`"


def test_the_table_is_the_generated_one() -> None:
    assert route_table.FILE.read_text(encoding="utf-8") == route_table.text()


def test_a_host_reads_paths_and_who_may_see_them_without_building_a_route(provider: LateService) -> None:
    fresh = LateRouter(*_never_built(), PREFIXES)
    host = FastAPI()
    host.include_router(fresh)
    found = get_router_routes(fresh)
    assert rows_of(fresh) == rows(prometheus=False)
    assert all(isinstance(route, APIRoute) and route.endpoint is not None for route in found)
    public = {route.path for route in found if (route.openapi_extra or {}).get(compat.PUBLIC_ROUTE_KEY)}
    assert f"{PREFIX}/health" in public
    assert f"{PREFIX}/jobs" not in public

    async def others() -> list[int]:
        async with _client(host) as client:
            return [(await client.get(path)).status_code for path in ("/v1/health", "/", "/v2/jobs")]

    assert asyncio.run(others()) == [404, 404, 404], "requests to the host's own routes pass by"


def test_the_document_is_that_of_the_routes_themselves(provider: LateService) -> None:
    late, usual = FastAPI(), FastAPI()
    late.include_router(provider.router())
    usual.include_router(create_router(provider.service()))
    assert late.openapi() == usual.openapi()


def test_requests_get_what_the_routes_themselves_answer(provider: LateService) -> None:
    late, usual = FastAPI(), FastAPI()
    late.include_router(provider.router())
    usual.include_router(create_router(provider.service()))
    asked: list[tuple[str, str, Any]] = [
        ("GET", f"{PREFIX}/health", None), ("GET", f"{PREFIX}/jobs", None), ("GET", f"{PREFIX}/jobs/none/status", None),
        ("GET", f"{PREFIX}/jobs?wrong=1", None), ("POST", f"{PREFIX}/jobs", {"recipe": "wrong"}),
        ("PUT", f"{PREFIX}/health", None), ("GET", f"{PREFIX}/nothing", None), ("GET", f"{PREFIX}/health/", None),
        ("GET", "/v1/post-training/job/status", None), ("GET", "/v1/fine_tuning/jobs", None), ("GET", "/moe", None),
        ("GET", "/moe/static/none", None),
    ]  # fmt: skip

    async def answers(host: FastAPI) -> list[tuple[int, bytes]]:
        async with _client(host) as client:
            got = [await client.request(method, path, json=body) for method, path, body in asked]
            return [(each.status_code, each.content) for each in got]

    assert asyncio.run(answers(late)) == asyncio.run(answers(usual))


def test_other_requests_are_answered_while_the_routes_are_built() -> None:
    built = threading.Event()
    table = [Row("/ours", ("GET",), "ours")]

    def build() -> APIRouter:
        assert built.wait(30)
        return _small_router()

    host = FastAPI()
    host.include_router(LateRouter(Later(build, table), table, ("/ours",)))
    host.get("/theirs")(lambda: "theirs")

    async def run() -> tuple[list[httpx.Response], httpx.Response]:
        async with _client(host) as client:
            waiting = [asyncio.create_task(client.get("/ours")) for _ in range(3)]
            theirs = await client.get("/theirs")
            assert not any(each.done() for each in waiting)
            built.set()
            return await asyncio.gather(*waiting), theirs

    ours, theirs = asyncio.run(run())
    assert [each.json() for each in ours] == [{"answer": 1}] * 3, "built once"
    assert theirs.json() == "theirs"


def test_a_client_that_leaves_does_not_stop_the_building() -> None:
    begun, built = threading.Event(), threading.Event()

    def build() -> APIRouter:
        begun.set()
        assert built.wait(30)
        return _small_router()

    later = Later(build, [Row("/ours", ("GET",), "ours")])

    async def run() -> None:
        leaves, stays = (asyncio.create_task(later.router_from_thread()) for _ in range(2))
        await asyncio.to_thread(begun.wait)
        leaves.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaves
        built.set()
        assert await stays is later.router()

    asyncio.run(run())


def test_a_failure_is_told_and_tried_again() -> None:
    failures = [MemoryError("once")]

    def build() -> APIRouter:
        if failures:
            raise failures.pop()
        return _small_router()

    later = Later(build, [Row("/ours", ("GET",), "ours")])
    with pytest.raises(MemoryError, match="once"):
        later.router()
    assert len(later.router().routes) == 1


def test_a_table_of_other_routes_is_refused() -> None:
    later = Later(_small_router, [Row("/ours", ("POST",), "ours")])
    with pytest.raises(RuntimeError, match="route_table"):
        later.router()


def test_many_threads_build_once() -> None:
    calls: list[int] = []

    def build() -> APIRouter:
        calls.append(1)
        return _small_router()

    later = Later(build, [Row("/ours", ("GET",), "ours")])
    with ThreadPoolExecutor(8) as pool:
        found = {id(each) for each in pool.map(lambda _: later.router(), range(32))}
    assert len(calls) == len(found) == 1


def test_a_copy_of_a_route_answers_like_the_route() -> None:
    """An older FastAPI includes a router by making each route again, of the same class."""
    table = [Row("/ours", ("GET",), "ours")]
    router = LateRouter(Later(_small_router, table), table, ("/ours",))
    host = FastAPI()
    for route in router.routes:
        assert isinstance(route, APIRoute)
        host.router.routes.append(type(route)(route.path, route.endpoint, response_model=route.response_model))

    async def run() -> httpx.Response:
        async with _client(host) as client:
            return await client.get("/ours")

    assert asyncio.run(run()).json() == {"answer": 1}
    endpoint = router.routes[0].endpoint  # type: ignore[attr-defined]
    assert inspect.signature(endpoint).return_annotation == dict[str, int]
    assert asyncio.run(endpoint()) == {"answer": 1}


def test_a_server_that_cannot_open_its_folder_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    config = ProviderConfig(state_dir=tmp_path / "state", supervisor=SupervisorConfig(start=False))
    with pytest.raises(InvalidConfig, match="state_dir"):
        asyncio.run(llama_stack_provider_moe.get_provider_impl(config, {}))


def _never_built() -> tuple[Later, list[Row]]:
    def build() -> APIRouter:
        raise AssertionError("something built the routes")

    table = rows(prometheus=False)
    return Later(build, table), table


def _small_router() -> APIRouter:
    router = APIRouter()

    @router.get("/ours")
    async def ours() -> dict[str, int]:
        return {"answer": 1}

    return router


def _client(host: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=host), base_url="http://localhost")
