"""The API of a running server over HTTP: one method a route, JSON documents as they come."""

import ipaddress
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, NamedTuple, Self
from urllib.parse import quote

import httpx

from llama_stack_provider_moe.cli.sse import Event, events
from llama_stack_provider_moe.errors import InvalidInput, ServerLost, ServerRefused
from llama_stack_provider_moe.jobs.state import JobState

API = "/v1alpha/post-training"
CHUNK_BYTES = 1 << 20
_TIMES = httpx.Timeout(60.0, connect=10.0)
# The server reads and checks every row of a job before it answers, however many there are.
_NO_HURRY = httpx.Timeout(None, connect=10.0)
# uvicorn closes a connection that was idle for 5 s, perhaps just as the next request leaves on it.
_LIMITS = httpx.Limits(keepalive_expiry=2.0)


class Sent(NamedTuple):
    """What the server sends of a file."""

    is_rest: bool  # else all of it
    chunks: Iterator[bytes]


class Server:
    """A server that has the provider.

    Args:
        url: without the API's path.
        api_key: sent as bearer token.
        transport: how requests travel; left out, over the network.

    Methods raise `ServerRefused` for an answer that is an error, `ServerLost` where none came.
    """

    def __init__(self, url: str, api_key: str | None = None, transport: httpx.BaseTransport | None = None) -> None:
        self.url = _checked_url(url)
        headers = {"Accept": "application/json"} | _authorization(api_key)
        # A proxy of the environment's can't lead to this machine, and NO_PROXY often lacks it.
        own_machine = _is_loopback(httpx.URL(self.url).host)
        self._http = httpx.Client(
            base_url=self.url + API, headers=headers, timeout=_TIMES, limits=_LIMITS, transport=transport,
            trust_env=not own_machine,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def health(self) -> dict[str, Any]:
        """How the provider is: {status, store, supervisor, jobs}."""
        return self._document("GET", "/health")

    def submit(self, body: dict[str, Any]) -> dict[str, Any]:
        """Create a job: {job_uuid}."""
        return self._document("POST", "/jobs", body)

    def validate(self, body: dict[str, Any]) -> dict[str, Any]:
        """What a job would be: {spec, train_rows, validation_rows}."""
        return self._document("POST", "/jobs/validate", body)

    def jobs(self, limit: int, after: str | None) -> dict[str, Any]:
        """Newest first: {data, has_more}."""
        return self._document("GET", "/jobs", limit=limit, after=after)

    def job(self, job_id: str) -> dict[str, Any]:
        """A job whole."""
        return self._document("GET", _path(job_id))

    def status(self, job_id: str) -> dict[str, Any]:
        """How a job stands; `resources_allocated` carries its progress."""
        return self._document("GET", _path(job_id, "/status"))

    def artifacts(self, job_id: str) -> dict[str, Any]:
        """What a job has left so far: {checkpoints}."""
        return self._document("GET", _path(job_id, "/artifacts"))

    def logs(self, job_id: str, tail: int | None = None, offset: int | None = None) -> dict[str, Any]:
        """Last lines of the output, or those from a byte on: {log_lines, next_offset}."""
        return self._document("GET", _path(job_id, "/logs"), tail=tail, offset=offset)

    def cancel(self, job_id: str) -> None:
        """Ask for a job to be cancelled."""
        self._ask("POST", _path(job_id, "/cancel"))

    def resume(self, job_id: str) -> dict[str, Any]:
        """Let a job go on: {job_uuid}."""
        return self._document("POST", _path(job_id, "/resume"))

    def export(self, job_id: str, body: dict[str, Any]) -> dict[str, Any]:
        """Export what a completed job has trained: {job_uuid}."""
        return self._document("POST", _path(job_id, "/exports"), body)

    def delete(self, job_id: str) -> dict[str, Any]:
        """Delete a job: {job_uuid, kept}."""
        return self._document("DELETE", _path(job_id))

    def artifact_files(self, job_id: str, name: str) -> dict[str, Any]:
        """What an artifact consists of: {files}."""
        return self._document("GET", _path(job_id, f"/artifacts/{quote(name, safe='')}"))

    @contextmanager
    def artifact_file(self, job_id: str, name: str, path: str, start: int, sha256: str) -> Iterator[Sent]:
        """A file from byte `start` on, or all of it where it is not the one of this checksum."""
        headers = {"Range": f"bytes={start}-", "If-Range": f'"{sha256}"'} if start else {}
        # As it lies there: a proxy's compression would make ranges and sizes those of something else.
        headers |= {"Accept": "*/*", "Accept-Encoding": "identity"}
        view = f"/artifacts/{quote(name, safe='')}/{quote(path)}"
        with self._streaming(_path(job_id, view), headers) as answer:
            yield Sent(answer.status_code == HTTPStatus.PARTIAL_CONTENT, self._read(answer.iter_bytes(CHUNK_BYTES)))

    @contextmanager
    def follow(self, job_id: str, tail: int | None, offset: int | None) -> Iterator[Iterator[Event] | None]:
        """Events of a job's output as they come; None from a server that has them not.

        Args:
            job_id: the job.
            tail: lines to begin with.
            offset: byte to begin at instead.
        """
        headers = {"Accept": "text/event-stream"} | ({} if offset is None else {"Last-Event-ID": str(offset)})
        query = {"follow": True} | ({"tail": tail} if tail is not None and offset is None else {})
        with self._streaming(_path(job_id, "/logs"), headers, query) as answer:
            is_stream = answer.headers.get("content-type", "").startswith("text/event-stream")
            yield events(self._read(answer.iter_lines())) if is_stream else None

    @contextmanager
    def _streaming(
        self, path: str, headers: dict[str, str], query: dict[str, Any] | None = None
    ) -> Iterator[httpx.Response]:
        with self._travelling(), self._http.stream("GET", path, headers=headers, params=query or {}) as answer:
            if not answer.is_success:
                answer.read()
                raise ServerRefused(self._refusal(answer), answer.status_code)
            yield answer

    def _read[Item](self, items: Iterator[Item]) -> Iterator[Item]:
        with self._travelling():
            yield from items

    @contextmanager
    def _travelling(self) -> Iterator[None]:
        """What goes wrong on the way, said in our errors."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            raise ServerLost(f"no server answers at {self.url} ({_words(error)})", asked=False) from None
        except httpx.RequestError as error:
            raise ServerLost(f"{self.url} stopped answering ({_words(error)})", asked=True) from None

    def _document(self, method: str, path: str, body: dict[str, Any] | None = None, **query: Any) -> dict[str, Any]:
        answer = self._ask(method, path, body, **query)
        if not isinstance(answer, dict):
            raise ServerRefused(f"{self.url} answered something else than this API does; is it the right server?", 200)
        return answer

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None, **query: Any) -> Any:
        # ASCII, whatever a template holds: half a surrogate pair has no UTF-8, and is the server's to refuse.
        content = None if body is None else json.dumps(body, allow_nan=False).encode("ascii")
        headers = {} if body is None else {"Content-Type": "application/json"}
        with self._travelling():
            answer = self._http.request(
                method, path, content=content, headers=headers, timeout=_TIMES if body is None else _NO_HURRY,
                params={name: value for name, value in query.items() if value is not None},
            )  # fmt: skip
        if answer.is_success:
            return self._parsed(answer)
        raise ServerRefused(self._refusal(answer), answer.status_code)

    def _parsed(self, answer: httpx.Response) -> Any:
        try:
            return answer.json()
        except ValueError:
            return answer.text

    def _refusal(self, answer: httpx.Response) -> str:
        """The server's own message; where the answer isn't this API's, what that may mean."""
        content = self._parsed(answer)
        error = content.get("error") if isinstance(content, dict) else None
        message = error.get("message") if isinstance(error, dict) else error
        hint = "" if answer.status_code != HTTPStatus.UNAUTHORIZED else "; give --api-key, or set MOE_TRAIN_API_KEY"
        if isinstance(message, str) and message:
            return message + hint
        what = f"{answer.status_code} {answer.reason_phrase}".strip()
        if answer.status_code == HTTPStatus.NOT_FOUND:
            hint = ": no Llama Stack server with provider inline::moe is there"
        return f"{self.url} answered {what}{hint}"


def state_of(document: dict[str, Any]) -> JobState:
    """The state that a status document tells."""
    text = document.get("status")
    try:
        return JobState(str(text))
    except ValueError:
        raise ServerRefused(f"the server says {text!r} of a job, a state this version does not know", 200) from None


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _path(job_id: str, view: str = "") -> str:
    if not job_id or "/" in job_id or job_id.startswith("."):  # would lead to another route
        raise InvalidInput("ID", job_id, "a job's name; `moe-train ls` lists them")
    return f"/jobs/{quote(job_id, safe='')}{view}"


def _checked_url(url: str) -> str:
    expected = "a server's URL, such as http://127.0.0.1:8321"
    try:
        parsed = httpx.URL(url.strip().rstrip("/"))
    except httpx.InvalidURL as error:
        raise InvalidInput("--url", url, f"{expected} ({error})") from None
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise InvalidInput("--url", url, expected)
    return str(parsed).rstrip("/")


def _authorization(api_key: str | None) -> dict[str, str]:
    if not api_key:
        return {}
    if not (api_key.isascii() and api_key.isprintable()):
        raise InvalidInput("--api-key", "(not shown)", "printable ASCII characters")
    return {"Authorization": f"Bearer {api_key}"}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
