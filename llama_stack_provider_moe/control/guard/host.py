"""What this room takes from the host; with `control.server.compat` the only module that knows the host's packages."""

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from http import HTTPStatus
from importlib import import_module
from typing import Any, Protocol

from llama_stack_provider_moe.control.server import callers, compat
from llama_stack_provider_moe.errors import (
    Conflict,
    Forbidden,
    InvalidBody,
    InvalidInput,
    MoeError,
    NotFound,
    Unavailable,
)
from llama_stack_provider_moe.shields.guard import Who

_session: ContextVar[str | None] = ContextVar("moe_session", default=None)
SESSION_KEY = "moe_session"  # in the header in which a host takes data for providers
ANONYMOUS = "anonymous"
MAX_TEXT = 1000  # characters of an error of the host's


class Shield(Protocol):
    """A shield in the host's registry."""

    identifier: str
    provider_resource_id: str | None
    provider_id: str
    params: dict[str, Any] | None


class _Shields(Protocol):
    data: list[Shield]


class ShieldStore(Protocol):
    """The host's registry of shields, as it gives it to a provider."""

    async def list_shields(self) -> _Shields:
        """Return the shields that the caller may see."""


class Busy(compat.HostError):  # type: ignore[misc, valid-type]  # a class that is looked up at run time
    """A check that this server can't make now; hosts answer with `status_code`."""

    status_code = HTTPStatus.SERVICE_UNAVAILABLE


def logger(name: str) -> logging.Logger:
    """Return the host's logger, whose level hosts set by category; give it whole texts: OGX's takes no others."""
    found: logging.Logger = import_module(f"{compat.HOST}.log").get_logger(name=name, category="core")
    return found


def models() -> Any:
    """Return the host's package of API types, which has those of the safety API (Llama Stack alone)."""
    return import_module(f"{compat.HOST}_api")


def has_safety() -> bool:
    """Return whether the host has a safety API of its own."""
    return importlib.util.find_spec(f"{compat.HOST}_api.safety") is not None


def who(session: str | None = None) -> Who:
    """Return who sent the current request.

    Args:
        session: name of the session, where the request itself has one; None: that of the header X-Moe-Session, or of
            the host's provider data.
    """
    caller = compat.caller()
    name = ANONYMOUS if caller is None else caller.principal
    principal = name if caller is None or caller.tenant is None else f"{caller.tenant}/{name}"
    return Who(callers.owner(), principal, session or _session.get() or _session_in_provider_data(),
               is_named=caller is not None)  # fmt: skip


@contextmanager
def session(name: str | None) -> Iterator[None]:
    """Inside, `who` takes this session for that of the request."""
    token = _session.set(name)
    try:
        yield
    finally:
        _session.reset(token)


def known_failure(error: Exception) -> MoeError | None:
    """Return the error of ours for one that the host raises on purpose; None for a bug."""
    denied = import_module(f"{compat.HOST}.core.access_control.access_control").AccessDeniedError
    text = str(error)[:MAX_TEXT]
    if isinstance(error, denied):
        return Forbidden("the access policy does not allow this")
    if isinstance(error, compat.HostError):
        status = int(getattr(error, "status_code", HTTPStatus.INTERNAL_SERVER_ERROR))
        known: dict[int, Callable[[str], MoeError]] = {403: Forbidden, 404: NotFound, 409: Conflict, 503: Unavailable}
        return known[status](text) if status in known else InvalidBody([text]) if status < 500 else None
    return InvalidBody([text]) if isinstance(error, ValueError) else None


def _session_in_provider_data() -> str | None:
    """The session in `X-LlamaStack-Provider-Data` or `X-OGX-Provider-Data`; hosts do not check what is in it."""
    headers = import_module(f"{compat.HOST}.core.request_headers")
    data = headers.PROVIDER_DATA_VAR.get()
    found = data.get(SESSION_KEY) if isinstance(data, Mapping) else None
    if found is not None and not isinstance(found, str):
        raise InvalidInput(f"{SESSION_KEY} of the provider data", found, "text")
    return found
