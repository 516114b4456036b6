"""What this room takes from the host; with `control.server.compat` the only module that knows the host's packages."""

import importlib.util
from collections.abc import Mapping
from http import HTTPStatus
from importlib import import_module
from typing import Any, Protocol

from llama_stack_provider_moe.control.server import callers, compat
from llama_stack_provider_moe.shields.guard import Who

SAFETY: Any = compat.Api.add("safety")  # idempotent; OGX's enum lacks it
SESSION_KEY = "moe_session"  # in the header in which a host takes data for providers
ANONYMOUS = "anonymous"


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


def models() -> Any:
    """Return the host's package of API types, which has those of the safety API (Llama Stack alone)."""
    return import_module(f"{compat.HOST}_api")


def has_safety() -> bool:
    """Return whether the host has a safety API of its own."""
    return importlib.util.find_spec(f"{compat.HOST}_api.safety") is not None


def who(session: str | None = None) -> Who:
    """Return who sent the current request.

    Args:
        session: name of the session, where the request itself has one; None: that of the host's provider data.
    """
    caller = compat.caller()
    name = ANONYMOUS if caller is None else caller.principal
    principal = name if caller is None or caller.tenant is None else f"{caller.tenant}/{name}"
    return Who(callers.owner(), principal, session if session is not None else _session_in_provider_data())


def _session_in_provider_data() -> str | None:
    """The session in `X-LlamaStack-Provider-Data` or `X-OGX-Provider-Data`; hosts do not check what is in it."""
    headers = import_module(f"{compat.HOST}.core.request_headers")
    data = headers.PROVIDER_DATA_VAR.get()
    found = data.get(SESSION_KEY) if isinstance(data, Mapping) else None
    return found if isinstance(found, str) else None
