"""What both clients know about HTTP: URL, headers, times, and what an answer means."""

import ipaddress
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, NamedTuple, cast

import httpx

from llama_stack_provider_moe.client.calls import API, NO_PROVIDER, Call
from llama_stack_provider_moe.errors import InvalidInput, ServerLost, ServerRefused

TIMES = httpx.Timeout(60.0, connect=10.0)
# The server checks every row of a job before it answers, and a job may have many rows.
NO_READ_LIMIT = httpx.Timeout(None, connect=10.0)
# uvicorn closes connections after 5 idle seconds, perhaps just when we send the next request.
_LIMITS = httpx.Limits(keepalive_expiry=2.0)


class Words(NamedTuple):
    """How errors name what the caller gave.

    Attributes:
        url: the URL of the server.
        api_key: the API key.
        key_hint: what to do about a 401, after a semicolon.
    """

    url: str = "url"
    api_key: str = "api_key"
    key_hint: str = "; give api_key"


class Endpoint:
    """A server's URL and how to reach it.

    Args:
        url: URL of the server, without the path of the API.
        api_key: API key, sent as a bearer token.
        words: for error texts.
    """

    def __init__(self, url: str, api_key: str | None, words: Words) -> None:
        self.url = _checked_url(url, words.url)
        self._words = words
        self._headers = {"Accept": "application/json"} | _authorization(api_key, words.api_key)

    def settings(self) -> dict[str, Any]:
        """Return the arguments of an httpx client."""
        # A proxy from the environment can't reach this machine, and NO_PROXY often lacks it.
        own_machine = _is_loopback(httpx.URL(self.url).host)
        return {
            "base_url": self.url + API, "headers": self._headers, "timeout": TIMES, "limits": _LIMITS,
            "trust_env": not own_machine,
        }  # fmt: skip

    def request[Kind](self, call: Call[Kind]) -> dict[str, Any]:
        """Return the arguments of httpx' `request` for a call."""
        # ASCII: half a surrogate pair has no UTF-8, and the server must be the one to refuse it.
        content = None if call.body is None else json.dumps(call.body, allow_nan=False).encode("ascii")
        return {
            "method": call.method, "url": call.path, "content": content,
            "headers": {} if call.body is None else {"Content-Type": "application/json"},
            "timeout": TIMES if call.body is None else NO_READ_LIMIT,
            "params": {name: value for name, value in call.query.items() if value is not None},
        }  # fmt: skip

    def document[Kind](self, kind: type[Kind], answer: httpx.Response, no_route: str = NO_PROVIDER) -> Kind:
        """Return an answer as a `kind` of document; its fields are not checked.

        Args:
            kind: of document.
            answer: the server's.
            no_route: see `Call`.

        Raises:
            ServerRefused: the server refused, or it is another kind of server.
        """
        if not answer.is_success:
            raise self.refusal(answer, no_route)
        content = _parsed(answer)
        if kind is not object and not isinstance(content, dict):
            raise ServerRefused(f"{self.url} sent an answer that is not from this API; is it the right server?", 200)
        return cast(Kind, content)

    def refusal(self, answer: httpx.Response, no_route: str = NO_PROVIDER) -> ServerRefused:
        """Return the server's message, or, if the answer is not from this API, what it may mean; see `Call`."""
        content = _parsed(answer)
        error = content.get("error") if isinstance(content, dict) else None
        message = error.get("message") if isinstance(error, dict) else error
        hint = "" if answer.status_code != HTTPStatus.UNAUTHORIZED else self._words.key_hint
        if isinstance(message, str) and message:
            return ServerRefused(message + hint, answer.status_code)
        what = f"{answer.status_code} {answer.reason_phrase}".strip()
        if answer.status_code == HTTPStatus.NOT_FOUND:
            hint = f": {no_route}"
        return ServerRefused(f"{self.url} answered {what}{hint}", answer.status_code)

    @contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Turn errors of httpx into our errors."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            raise ServerLost(f"no server answers at {self.url} ({_words(error)})", asked=False) from None
        except httpx.RequestError as error:
            raise ServerLost(f"{self.url} stopped answering ({_words(error)})", asked=True) from None


def following(tail: int | None, offset: int | None) -> tuple[dict[str, str], dict[str, int | bool]]:
    """Return headers and parameters of a request that follows a job's output; see `Client.follow`."""
    headers = {"Accept": "text/event-stream"} | ({} if offset is None else {"Last-Event-ID": str(offset)})
    query: dict[str, int | bool] = {"follow": True}
    return headers, query | ({"tail": tail} if tail is not None and offset is None else {})


def rest_of_file(start: int, sha256: str) -> Mapping[str, str]:
    """Return the headers of a request for a file from byte `start` on, if it still has this checksum."""
    headers = {"Range": f"bytes={start}-", "If-Range": f'"{sha256}"'} if start else {}
    # Uncompressed: ranges and sizes must be those of the file.
    return headers | {"Accept": "*/*", "Accept-Encoding": "identity"}


def _parsed(answer: httpx.Response) -> object:
    try:
        return cast(object, answer.json())
    except ValueError:
        return answer.text


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _checked_url(url: str, field: str) -> str:
    expected = "a server's URL, such as http://127.0.0.1:8321"
    try:
        parsed = httpx.URL(url.strip().rstrip("/"))
    except httpx.InvalidURL as error:
        raise InvalidInput(field, url, f"{expected} ({error})") from None
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise InvalidInput(field, url, expected)
    return str(parsed).rstrip("/")


def _authorization(api_key: str | None, field: str) -> dict[str, str]:
    if not api_key:
        return {}
    if not (api_key.isascii() and api_key.isprintable()):
        raise InvalidInput(field, "(not shown)", "printable ASCII characters")
    return {"Authorization": f"Bearer {api_key}"}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
