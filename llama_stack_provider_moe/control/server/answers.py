"""Turns every exception of a route into a cheap JSON answer.

No exception reaches the host's own handler: after that handler 0.6.1 drops the connection, and its logger renders a
traceback for seconds on the event loop.
"""

import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Any, ClassVar, Protocol

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from llama_stack_provider_moe.control.server import compat, safe_json
from llama_stack_provider_moe.control.server.bodies import Bodies, BoundedRequest
from llama_stack_provider_moe.control.server.cross_site import must_not_be_from_another_site
from llama_stack_provider_moe.control.server.failures import Failures
from llama_stack_provider_moe.control.server.own_names import must_be_own_name
from llama_stack_provider_moe.control.server.pools import Pool
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.errors import InvalidBody, MoeError, OverLimit, Unavailable
from llama_stack_provider_moe.spec.validation_errors import KEY_SHOWN, SHOWN, invalid_body

# Routes of Llama Stack, whose clients may send more, and for probes.
FOREIGN_QUERIES = (
    "/supervised-fine-tune", "/preference-optimize", "/job/status", "/job/artifacts", "/job/cancel", "/health",
    "/metrics",
)  # fmt: skip
MAX_FOREIGN = 500  # characters of an error that this package did not raise
MAX_MESSAGE = 8000  # characters of any error; the rest of a long list of problems, or of a long path, is cut
INTERNAL_ERROR = "the server failed on an unexpected error; see the server's log"
_rendering = Pool("moe-answer", 2, 1024, "answers")


# Status, text and exception of an error -> the content of `error` in its answer.
type Describe = Callable[[int, str, Exception | None], Mapping[str, object]]


def message_only(status: int, message: str, error: Exception | None) -> Mapping[str, object]:
    """Return the content of `error` in an answer of the post-training API: the text alone."""
    return {"message": message}


class _Limits(Protocol):
    @property
    def max_body_bytes(self) -> int: ...

    @property
    def allowed_hosts(self) -> list[str]: ...


class _Threads(Protocol):
    bodies: Bodies
    failures: Failures

    async def known_failure(self, error: Exception) -> MoeError | None: ...


class Service(Protocol):
    """What stands behind routes: the service of the post-training API, or that of the safety API."""

    @property
    def config(self) -> _Limits:
        """The limits of bodies, and the names of the server."""

    @property
    def guard(self) -> _Threads:
        """The threads of the service."""

    def refused(self, method: str, route: str, status: int) -> None:
        """Count a request answered with an error."""


class Answers(APIRoute):
    """A route that turns exceptions into answers, and makes answers safe to show.

    Attributes:
        impl: the service behind the route; it has the limits and counts refusals.
        streams: whether the endpoint reads the body itself, in pieces, and limits it.
        knows_its_query: whether a parameter that the endpoint does not know is an error; other APIs ignore it.
    """

    impl: ClassVar[Service]
    streams: ClassVar[bool] = False
    knows_its_query: ClassVar[bool] = False

    def __init__(self, path: str, endpoint: Callable[..., Any], **kwargs: Any) -> None:
        super().__init__(path, _rendered(endpoint, kwargs.get("response_model_exclude_defaults", False)), **kwargs)

    @staticmethod
    def describe(status: int, message: str, error: Exception | None) -> Mapping[str, object]:
        """Return the content of `error` in an answer.

        Args:
            status: HTTP status of the answer.
            message: text of the error.
            error: the error; None for one that this package did not raise.
        """
        return message_only(status, message, error)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of every request to this route."""
        handle = super().get_route_handler()
        limit_bytes, bodies, failures = (
            self.impl.config.max_body_bytes,
            self.impl.guard.bodies,
            self.impl.guard.failures,
        )

        async def checked(request: Request) -> Response:
            try:
                self._must_be_for_us(request)
                return await handle(request if self.streams else BoundedRequest(request, limit_bytes, bodies))
            except ClientDisconnect:  # raised where the endpoint reads the body
                return Response(status_code=HTTPStatus.BAD_REQUEST)
            except MoeError as error:
                return _refusal(error, self.describe)
            except RequestValidationError as error:
                return _refusal(invalid_body(error.errors(), self._body_model()), self.describe)
            except HTTPException as error:  # Starlette's class, because FastAPI raises both it and its own subclass
                cause = error.__cause__
                if isinstance(cause, MoeError):  # raised while the body was read
                    return _refusal(cause, self.describe)
                if isinstance(cause, ClientDisconnect):
                    return Response(status_code=HTTPStatus.BAD_REQUEST)
                why = f" ({cause})" if cause else ""
                detail = f"{error.detail}{why}"[:MAX_FOREIGN]
                return _error(error.status_code, detail, error.headers, self.describe)
            except Exception as error:  # noqa: BLE001  # a thread logs it
                known = await self.impl.guard.known_failure(error)
                if known is not None:
                    return _refusal(known, self.describe)
                failures.report(f"{request.method} {request.url.path}"[:MAX_FOREIGN], error)
                return _error(HTTPStatus.INTERNAL_SERVER_ERROR, INTERNAL_ERROR, None, self.describe)

        async def answer(request: Request) -> Response:
            response = await checked(request)
            if response.status_code >= HTTPStatus.BAD_REQUEST:
                self.impl.refused(request.method, self.path_format, response.status_code)
            if isinstance(response, StreamingResponse | FileResponse):
                return _Guarded(safe_json.made_safe(response), failures, request.url.path)
            return safe_json.made_safe(response)

        return answer

    def _must_be_for_us(self, request: Request) -> None:
        must_not_be_from_another_site(request.method, request.headers)
        is_public = bool((self.openapi_extra or {}).get(compat.PUBLIC_ROUTE_KEY))
        if not is_public and compat.caller() is None:
            server = request.scope.get("server")
            must_be_own_name(server[0] if server else None, request.headers.get("host"), self.impl.config.allowed_hosts)
        if self.knows_its_query and not self.path_format.endswith(FOREIGN_QUERIES):
            known = [each.alias for each in self.dependant.query_params]
            unknown = sorted(set(request.query_params) - set(known))
            if unknown:
                expected = ", ".join(known) or "none"
                told = f"unknown parameter; expected {expected}"
                raise InvalidBody([f"{name[:KEY_SHOWN]}: {told}" for name in unknown[:SHOWN]])

    def _body_model(self) -> type[BaseModel] | None:
        annotations = [each.annotation for each in inspect.signature(self.endpoint).parameters.values()]
        return next((each for each in annotations if isinstance(each, type) and issubclass(each, BaseModel)), None)


def answers_of(service: Service, knows_query: bool = False) -> type[Answers]:
    """Return the class of routes of `service`.

    Args:
        service: the service.
        knows_query: see `Answers.knows_its_query`.
    """

    class Bound(Answers):
        impl = service
        knows_its_query = knows_query

    return Bound


def streaming_answers_of(service: PostTrainingService) -> type[Answers]:
    """Return the class of the routes of `service` whose endpoints read bodies of any size in pieces."""

    class Streaming(answers_of(service, knows_query=True)):  # type: ignore[misc]  # a class made at run time
        streams = True

    return Streaming


def _rendered[**P](endpoint: Callable[P, Awaitable[object]], exclude_defaults: bool) -> Callable[P, Awaitable[object]]:
    """Wrap `endpoint` so that a thread renders its answer: a page of events can be megabytes of JSON."""

    @functools.wraps(endpoint)
    async def rendered(*args: P.args, **kwargs: P.kwargs) -> object:
        found = await endpoint(*args, **kwargs)
        if not isinstance(found, BaseModel):
            return found
        return await _rendering.run(safe_json.of_model, found, exclude_defaults)

    return rendered


def _refusal(error: MoeError, describe: Describe) -> JSONResponse:
    retry_after_s = error.retry_after_s if isinstance(error, Unavailable | OverLimit) else None
    headers = None if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    return _error(error.status, str(error), headers, describe, error)


def _error(
    status: int,
    message: str,
    headers: Mapping[str, str] | None = None,
    describe: Describe = message_only,
    error: Exception | None = None,
) -> JSONResponse:
    # A path or key of the caller may contain characters that UTF-8 can't encode.
    text = message.encode("utf-8", "backslashreplace").decode()
    cut = text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}…"
    return JSONResponse({"error": describe(status, cut, error)}, status_code=status, headers=headers)


class _Guarded(Response):
    """A streamed answer; a failure in the middle goes to the log and closes this connection only."""

    def __init__(self, response: Response, failures: Failures, path: str) -> None:
        self._response = response
        self._failures = failures
        self._path = path
        self.status_code = response.status_code
        self.background = None
        self.raw_headers = response.raw_headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = False

        async def sent(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            await self._response(scope, receive, sent)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001  # a thread logs it
            self._failures.report(f"the answer to {self._path}"[:MAX_FOREIGN], error)
            if not began:  # otherwise the server closes the connection of the incomplete answer
                await _error(HTTPStatus.INTERNAL_SERVER_ERROR, INTERNAL_ERROR)(scope, receive, send)
