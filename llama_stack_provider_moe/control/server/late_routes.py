"""Our routes as a host gets them at its start: paths and methods, from a table. The rest is built when it is needed.

To build the routes takes more processor time than everything else that we do at a start: it imports what they call, and
FastAPI builds a validator for each model that they take or answer. A host asks much less of its routers when it starts:
which paths there are, with which methods, and which of them are public. `route_table` has that, and a test compares it
with the routes themselves.

The first request to one of ours builds the routes in a thread, while the server answers other requests. Code that asks
a route for anything else, such as FastAPI for the OpenAPI document, builds them too, and gets what the built route has.
"""

import asyncio
import threading
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from typing import Any, NamedTuple, cast

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.routing import Match, compile_path
from starlette.types import Receive, Scope, Send

from llama_stack_provider_moe.control.server import compat

_COMPILED = ("path_regex", "path_format", "param_convertors")


class Row(NamedTuple):
    """What a host's start asks of a route.

    Attributes:
        path: with names of parameters in braces.
        methods: of HTTP.
        name: for `url_path_for`.
        is_public: whether it needs no token.
    """

    path: str
    methods: tuple[str, ...]
    name: str
    is_public: bool = False


class Later:
    """A router that is built once, by the first who needs it.

    Args:
        build: returns the router; it runs in any thread.
        rows: its routes, in its order.
    """

    def __init__(self, build: Callable[[], APIRouter], rows: Collection[Row]) -> None:
        self._build = build
        self._rows = rows
        self._lock = threading.Lock()
        self._building: Future[APIRouter] | None = None

    @property
    def is_built(self) -> bool:
        """Whether the routes are there."""
        return self._building is not None and self._building.done()

    def router(self) -> APIRouter:
        """Return the router; the first call takes a second of processor time."""
        building, is_mine = self._claimed()
        if is_mine:
            self._make(building)
        return building.result()

    async def router_from_thread(self) -> APIRouter:
        """Return the router; it is built in a thread, and this event loop goes on."""
        building, is_mine = self._claimed()
        if is_mine:
            threading.Thread(target=self._make, args=(building,), name="moe-routes", daemon=True).start()
        return building.result() if building.done() else await asyncio.wrap_future(building)

    def _claimed(self) -> tuple[Future[APIRouter], bool]:
        with self._lock:
            if self._building is not None:
                return self._building, False
            self._building = Future()
            self._building.set_running_or_notify_cancel()  # a client that leaves can't cancel it for the others
            return self._building, True

    def _make(self, building: "Future[APIRouter]") -> None:
        try:
            router = self._build()
            _must_be(self._rows, router)
        except BaseException as error:  # noqa: BLE001  # whoever waits for the router gets it
            with self._lock:
                self._building = None  # the next request tries again
            building.set_exception(error)
        else:
            building.set_result(router)


def rows_of(router: APIRouter) -> list[Row]:
    """Return what the table says about the routes of a router."""
    routes = cast("list[APIRoute]", router.routes)
    return [
        Row(
            each.path,
            tuple(sorted(each.methods or ())),
            each.name,
            bool((each.openapi_extra or {}).get(compat.PUBLIC_ROUTE_KEY)),
        )
        for each in routes
    ]


def _must_be(rows: Iterable[Row], router: APIRouter) -> None:
    found = rows_of(router)
    if found != list(rows):
        raise RuntimeError("the table is not of these routes; run `python -m tests.contracts.route_table`")


class LateRouter(APIRouter):
    """The routes of a table; each request to one of them goes to the built router.

    Args:
        later: the built router.
        rows: its routes.
        prefixes: each path has one of them, so that other requests pass by quickly.
    """

    def __init__(self, later: Later, rows: Iterable[Row], prefixes: tuple[str, ...]) -> None:
        super().__init__()
        self._later = later
        self._prefixes = prefixes
        self.routes.extend(LateRoute(row.path, LateEndpoint(later, number, row)) for number, row in enumerate(rows))

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return whether a route has the path and the method of a request.

        FastAPI asks this before it asks the routes; it would build each of them to ask them itself.
        """
        found = Match.NONE
        if scope["type"] == "http" and any(prefix in scope["path"] for prefix in self._prefixes):
            for route in self.routes:
                match, _ = route.matches(scope)
                if match is Match.FULL:
                    return match, {}
                found = match if match is Match.PARTIAL else found
        return found, {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that matches."""
        await (await self._later.router_from_thread())(scope, receive, send)


class LateRoute(APIRoute):
    """A route of the table, which has whatever else it is asked for from the built one.

    An older FastAPI copies each route that a host includes: it makes one of the same class from the attributes of this
    one. Therefore the endpoint says which route it is, and the other arguments are what the built route has anyway.
    """

    endpoint: "LateEndpoint"

    def __init__(self, path: str, endpoint: "LateEndpoint", **_: object) -> None:
        self.path = path
        self.endpoint = endpoint
        self.name = endpoint.row.name
        self.methods = set(endpoint.row.methods)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute that this route has not got yet."""
        if name.startswith("__") or "endpoint" not in self.__dict__:  # of a copy that is being made
            raise AttributeError(name)
        if name in _COMPILED:
            self.path_regex, self.path_format, self.param_convertors = compile_path(self.path)
            return self.__dict__[name]
        if name == "openapi_extra" and not self.endpoint.later.is_built:
            return {compat.PUBLIC_ROUTE_KEY: True} if self.endpoint.row.is_public else None
        return getattr(self.endpoint.route, name)

    def get_route_handler(self) -> Callable[[Request], Any]:
        """Return the handler of the built route."""
        return self.endpoint.route.get_route_handler()

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that matches."""
        await self.endpoint.later.router_from_thread()
        await self.endpoint.route.handle(scope, receive, send)


class LateEndpoint:
    """The function of a route, for whoever looks at its signature or calls it.

    Attributes:
        later: the built router.
        row: the route in the table.
    """

    def __init__(self, later: Later, number: int, row: Row) -> None:
        self.later = later
        self.row = row
        self._number = number
        self.__doc__ = None  # FastAPI takes it for the route's description

    @property
    def route(self) -> APIRoute:
        """The built route."""
        route = self.later.router().routes[self._number]
        assert isinstance(route, APIRoute)
        return route

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The function itself, for `inspect`."""
        return self.route.endpoint

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function itself."""
        await self.later.router_from_thread()
        return await self.route.endpoint(*args, **kwargs)
