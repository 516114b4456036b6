"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

import re
from collections.abc import Mapping
from http import HTTPStatus

from llama_stack_provider_moe.errors import (
    Conflict,
    Forbidden,
    InvalidBody,
    InvalidInput,
    InvalidRows,
    NoRoom,
    NotFound,
    TooLarge,
    Unavailable,
)

_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}
# The first class that an error belongs to decides.
_CODES: dict[type[Exception], str] = {
    InvalidRows: "invalid_file",
    InvalidInput: "invalid_value",
    Forbidden: "permission_denied",
    NotFound: "not_found",
    Conflict: "conflict",
    TooLarge: "too_large",
    NoRoom: "insufficient_storage",
    Unavailable: "unavailable",
}
_FIELD = re.compile(r"([A-Za-z_][\w.\[\]-]*): ")  # how each problem of an `InvalidBody` begins


def described(status: int, message: str, error: Exception | None) -> Mapping[str, object]:
    """Return the content of `error` in an answer.

    Args:
        status: HTTP status of the answer.
        message: text of the error.
        error: the error; None for one that this package did not raise.
    """
    server_failed = status >= HTTPStatus.INTERNAL_SERVER_ERROR and status != HTTPStatus.NOT_IMPLEMENTED
    other = "server_error" if server_failed else "invalid_request_error"
    return {
        "message": message,
        "type": _TYPES.get(HTTPStatus(status), other),
        "param": _param(error),
        "code": next((code for kind, code in _CODES.items() if isinstance(error, kind)), other),
    }


def _param(error: Exception | None) -> str | None:
    if isinstance(error, InvalidBody):
        found = _FIELD.match(error.problems[0]) if error.problems else None
        return found[1] if found else None
    # `InvalidRows` has a field only where the request's own code set it.
    return getattr(error, "field", None) if isinstance(error, InvalidInput) else None
