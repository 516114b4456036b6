"""The routes of the dashboard: pages and the files that they load, all public, none with data.

The policy lets a page load scripts and styles from this server alone. Neither inline code nor `eval` runs, nothing is
sent elsewhere, and no other site can put a page into a frame.
"""

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Protocol

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from llama_stack_provider_moe.control.dashboard.assets import Asset, asset
from llama_stack_provider_moe.control.dashboard.pages import PAGES, Page, render

PREFIX = "/moe"
API = "/v1alpha/post-training"
POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data: blob:", "connect-src 'self'",
    "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
))  # fmt: skip
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Frame-Options": "DENY",  # for browsers that don't know frame-ancestors
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # ask each time; an unchanged file is answered with 304
}


class Run(Protocol):
    """Runs a call that may block, in a thread of the server."""

    def __call__[*Args, T](self, call: Callable[[*Args], T], *args: *Args) -> Awaitable[T]:
        """Return `call(*args)`."""


def create_router(route_class: type[APIRoute], public_key: str, run: Run) -> APIRouter:
    """Return a router with the pages.

    Args:
        route_class: the class of the server's routes, which answers failures.
        public_key: the host's name for a route that needs no token.
        run: reads files and renders pages.
    """
    router = APIRouter(prefix=PREFIX, route_class=route_class, include_in_schema=False)
    public = {public_key: True}
    for page in PAGES:
        router.add_api_route(page.path, _shell(page, run), methods=["GET"], openapi_extra=public, response_model=None)

    @router.get("/static/{name}", openapi_extra=public, response_model=None)
    async def static(name: str, request: Request) -> Response:
        found = await run(asset, name)
        if found is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, "the dashboard has no such file")
        return _sent(found, request)

    return router


def _shell(page: Page, run: Run) -> Callable[[Request], Awaitable[Response]]:
    # Not the parameters of the path: the page's module reads them from the address, and the API checks them.
    async def shell(request: Request) -> Response:
        root = request.scope.get("root_path", "").rstrip("/")
        return HTMLResponse(await run(render, page, root, API), headers=HEADERS)

    return shell


def _sent(found: Asset, request: Request) -> Response:
    headers = {**HEADERS, "ETag": found.etag, "Vary": "Accept-Encoding"}
    if request.headers.get("if-none-match") == found.etag:
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    if found.zipped is not None and "gzip" in request.headers.get("accept-encoding", ""):
        return Response(found.zipped, media_type=found.media_type, headers={**headers, "Content-Encoding": "gzip"})
    return Response(found.content, media_type=found.media_type, headers=headers)
