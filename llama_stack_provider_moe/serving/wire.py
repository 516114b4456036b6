"""HTTP requests to an inference server; each error says what was asked, and of whom."""

import ipaddress
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx

from llama_stack_provider_moe.errors import ExportError, shorten

CONNECT_S = 3.0
READ_S = 30.0
BRIEF_S = 5.0  # for a supervisor or a server that has other work


class Unreachable(ExportError):
    """No server answers at the address."""


class Connection:
    """An inference server.

    Args:
        what: its kind, for error texts: "llama.cpp's server".
        url: its address, without a path.
        patience_s: longest wait for an answer, unless a request says otherwise.
    """

    def __init__(self, what: str, url: str, patience_s: float = READ_S) -> None:
        self.what = what
        self.url = url
        self._patience_s = patience_s

    def ask(
        self,
        doing: str,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        also: tuple[int, ...] = (),
        limit_s: float | None = None,
    ) -> httpx.Response:
        """Send one request and return its answer.

        Args:
            doing: what it is for, for error texts: "asking for its models".
            method: of HTTP.
            path: with its query.
            body: sent as JSON.
            also: statuses that are answers, besides 200 to 299.
            limit_s: longest wait for the answer; None: as usual.

        Raises:
            Unreachable: no server is there.
            ExportError: it refuses, redirects, or breaks the connection.
        """
        limit_s = self._patience_s if limit_s is None else limit_s
        timeout = httpx.Timeout(limit_s, connect=min(CONNECT_S, limit_s))
        # A proxy from the environment must not be used for this machine; a redirect could lead anywhere.
        with httpx.Client(
            base_url=self.url, timeout=timeout, follow_redirects=False, trust_env=not is_loopback(self.url)
        ) as client:
            try:
                answer = client.request(method, path, json=body)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                why = " ".join(str(error).split()) or type(error).__name__
                raise Unreachable(f"no server answers at {self.url} ({self.what}: {why})") from error
            except httpx.TransportError as error:
                why = " ".join(str(error).split()) or type(error).__name__
                kind = f"did not answer within {limit_s:g} s" if isinstance(error, httpx.TimeoutException) else \
                       "broke the connection"  # fmt: skip
                raise ExportError(f"{self.what} at {self.url} {kind} while {doing} ({why})") from error
        if answer.is_success or answer.status_code in also:
            return answer
        raise ExportError(f"{self.what} at {self.url} refused {doing} with {answer.status_code}: {reason_in(answer)}")

    def document(self, doing: str, answer: httpx.Response) -> dict[str, Any]:
        """Return the JSON object of an answer.

        Raises:
            ExportError: it is something else.
        """
        content = object_in(answer)
        if content is None:
            raise ExportError(f"{self.what} at {self.url} answered {shorten(answer.text, 200)} while {doing}; expected "
                              "a JSON object")  # fmt: skip
        return content


def object_in(answer: httpx.Response) -> dict[str, Any] | None:
    """The JSON object of an answer; None: it is something else."""
    try:
        content = answer.json()
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def reason_in(answer: httpx.Response) -> str:
    """The reason that an answer gives, in any of the forms of the servers."""
    try:
        content = answer.json()
        found = content.get("error", content.get("message", content))
        return shorten(found.get("message", found) if isinstance(found, dict) else found, 400)
    except (ValueError, AttributeError):
        return shorten(answer.text, 400)


def is_loopback(url: str) -> bool:
    """Whether an address is on this machine."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
