"""`Client`: a typed client of a running server, synchronous."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol, Self, Unpack, cast

import httpx

from llama_stack_provider_moe.client import calls, upload
from llama_stack_provider_moe.client.calls import Call, JobFilters, Recipe
from llama_stack_provider_moe.client.connection import NO_READ_LIMIT, TIMES, Endpoint, Words, following, rest_of_file
from llama_stack_provider_moe.client.dataset_documents import (
    Dataset,
    DatasetList,
    DatasetProfile,
    DeletedDataset,
    PushedDataset,
)
from llama_stack_provider_moe.client.documents import (
    ArtifactFiles,
    Artifacts,
    Deleted,
    EventPage,
    ExportList,
    Health,
    Job,
    JobList,
    LogLines,
    MetricSeries,
    PulledFile,
    Quota,
    QuotaList,
    RoutingSeries,
    Scheduled,
    Status,
    Validated,
)
from llama_stack_provider_moe.client.patience import POLL_S, Deadline, Patience, has_ended
from llama_stack_provider_moe.client.playground_methods import PlaygroundMethods
from llama_stack_provider_moe.client.progress import Progress, display_of
from llama_stack_provider_moe.client.pull import Puller
from llama_stack_provider_moe.client.sse import Event, events
from llama_stack_provider_moe.client.sweep_methods import SweepMethods
from llama_stack_provider_moe.errors import ServerLost, ServerRefused

CHUNK_BYTES = 1 << 20
SILENCE_S = 5.0  # without an answer, after which the user is told


class Sent(NamedTuple):
    """A file, or the rest of it, as the server sends it."""

    is_rest: bool  # the file from the requested byte on; else all of it
    chunks: Iterator[bytes]


class _Connection(Protocol):
    """An open connection of httpx."""

    def get_extra_info(self, info: str) -> object: ...


class Client(SweepMethods, PlaygroundMethods):
    """A server with our provider.

    Args:
        url: URL of the server, without the path of the API.
        api_key: API key, sent as a bearer token.
        transport: transport of httpx; default: the network.
        note: called with a message, in a thread of its own, when a request has no answer after `silence_s` seconds;
            and when the server of an answer that is followed is lost, and answers again.
        silence_s: see `note`.

    Methods raise `ServerRefused` if the server answers with an error, and `ServerLost` if it does not answer.
    """

    words: ClassVar[Words] = Words()

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        transport: httpx.BaseTransport | None = None,
        note: Callable[[str], None] | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._endpoint = Endpoint(url, api_key, self.words)
        self.url = self._endpoint.url
        self._note = note
        self._silence_s = silence_s
        self._http = httpx.Client(transport=transport, **self._endpoint.settings())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def health(self) -> Health:
        """Return whether the server can accept and run jobs."""
        return self._send(calls.health())

    def submit(self, body: Mapping[str, object]) -> Scheduled:
        """Create a job from the body of a job file: {job_uuid, notes}."""
        return self._send(calls.submit(body))

    def validate(self, body: Mapping[str, object]) -> Validated:
        """Check a job and its rows without creating it: {spec, train_rows, validation_rows, rows, notes}."""
        return self._send(calls.validate(body))

    def jobs(self, limit: int = 1000, after: str | None = None, **filters: Unpack[JobFilters]) -> JobList:
        """Return a page of jobs, newest first: {data, has_more}; `after` is the last job of the page before."""
        return self._send(calls.jobs(limit, after, filters))

    def job(self, job_id: str) -> Job:
        """Return all details of a job."""
        return self._send(calls.job(job_id))

    def status(self, job_id: str) -> Status:
        """Return the status of a job; its progress is in `resources_allocated`."""
        return self._send(calls.status(job_id))

    def artifacts(self, job_id: str) -> Artifacts:
        """Return the artifacts that a job has saved so far: {checkpoints}."""
        return self._send(calls.artifacts(job_id))

    def artifact_files(self, job_id: str, name: str) -> ArtifactFiles:
        """Return the files of an artifact: {files}."""
        return self._send(calls.artifact_files(job_id, name))

    def logs(self, job_id: str, tail: int | None = None, offset: int | None = None) -> LogLines:
        """Return the last lines of the output, or those after a byte offset: {log_lines, next_offset}."""
        return self._send(calls.logs(job_id, tail, offset))

    def events(self, job_id: str, cursor: int = 0, limit: int = 1000) -> EventPage:
        """Return a page of a job's events: {events, cursor}; `cursor` is that of the page before."""
        return self._send(calls.events(job_id, cursor, limit))

    def metrics(
        self, job_id: str, names: Iterable[str] | None = None, since_step: int | None = None, limit: int = 1000
    ) -> MetricSeries:
        """Return the metrics of a job's steps as columns: {steps, epoch, metrics, evaluations}.

        Args:
            job_id: name of the job.
            names: the metrics to return; None: all.
            since_step: return only steps after this one.
            limit: largest number of steps; more are thinned evenly.
        """
        return self._send(calls.metrics(job_id, names, since_step, limit))

    def routing(self, job_id: str, layer: int | None = None, limit: int = 200) -> RoutingSeries:
        """Return how routers used experts: {steps, layers, experts, cv, dead, largest, layer, share_steps, share}.

        Args:
            job_id: name of the job.
            layer: layer whose experts' shares are returned; None: the first one.
            limit: largest number of steps; more are thinned evenly.
        """
        return self._send(calls.routing(job_id, layer, limit))

    def cancel(self, job_id: str) -> None:
        """Cancel a job; repeating it is harmless."""
        self._send(calls.cancel(job_id))

    def resume(self, job_id: str, experts_backend: str | None = None) -> Scheduled:
        """Resume a cancelled or failed job, with another `moe.experts_backend` if given: {job_uuid, resumes}."""
        return self._send(calls.resume(job_id, experts_backend))

    def delete(self, job_id: str, force: bool = False) -> Deleted:
        """Delete a job; with `force`, even if other jobs need its files: {job_uuid, kept, broken}."""
        return self._send(calls.delete(job_id, force))

    def export(self, job_id: str, body: Mapping[str, object]) -> Scheduled:
        """Export the model of a completed job, from the body of an `export` block: {job_uuid}."""
        return self._send(calls.export(job_id, body))

    def exports(self, job_id: str) -> ExportList:
        """Return the exports of a job and their steps: {data}."""
        return self._send(calls.exports(job_id))

    def datasets(self, limit: int = 1000, after: str | None = None) -> DatasetList:
        """Return a page of uploaded data sets, by name: {data, has_more, used_bytes, quota_bytes}."""
        return self._send(calls.datasets(limit, after))

    def dataset(self, name: str) -> Dataset:
        """Return the versions of a data set, the current one first: {name, versions, has_more}."""
        return self._send(calls.dataset(name))

    def delete_dataset(self, name: str, version: str | None = None) -> DeletedDataset:
        """Delete a data set, or one version: {name, versions, bytes}."""
        return self._send(calls.delete_dataset(name, version))

    def quota(self) -> Quota:
        """Return what the caller uses of the server, and what is left."""
        return self._send(calls.quota())

    def quotas(self) -> QuotaList:
        """Return what every owner uses; only for administrators: {data}."""
        return self._send(calls.quotas())

    def profile(
        self, name: str, model: str | None = None, recipe: Recipe = "sft", max_length: int | None = None,
        version: str | None = None, timeout_s: float | None = None, max_completion_length: int | None = None,
    ) -> DatasetProfile:  # fmt: skip
        """Return what a job would make of a data set, once the server has counted it.

        Args:
            name: the data set.
            model: as in a job; None: no token is counted.
            recipe: of the job.
            max_length: `options.max_length` of the job.
            version: beginning of the SHA-256 of a version; None: the current one.
            timeout_s: seconds to wait; None: no limit, 0: return even if it is not ready.
            max_completion_length: of a job of recipe grpo or distill; None: the default.

        Raises:
            TimeoutError: it is not ready in time.
        """
        deadline = Deadline(timeout_s)
        while True:
            found = self._send(calls.profile(name, model, recipe, max_length, version, max_completion_length))
            if found["is_ready"] or timeout_s == 0:
                return found
            deadline.check(f"the profile of data set {name!r} is not ready")
            time.sleep(POLL_S)

    def push(self, name: str, rows: str | Path | Iterable[Mapping[str, object]]) -> PushedDataset:
        """Upload rows as a version of a data set.

        Args:
            name: name of the data set.
            rows: a file (JSON Lines, CSV or Parquet, by its name; also gzipped), or rows.

        Raises:
            InvalidInput: the file can't be read, or a row is no JSON.
        """
        if not isinstance(rows, str | Path):
            return self.push_dataset(name, upload.lines_of(rows), upload.JSONL_TYPE, None)
        with upload.opened(str(rows), None) as source:
            return self.push_dataset(name, source.body(lambda: None), source.content_type, source.content_encoding)

    def push_dataset(
        self, name: str, body: Iterator[bytes], content_type: str, content_encoding: str | None
    ) -> PushedDataset:
        """Upload rows as a version of a data set; `push` does so with a file.

        Args:
            name: name of the data set.
            body: the rows in pieces.
            content_type: media type of the rows.
            content_encoding: `gzip`, or None.
        """
        connections: list[_Connection] = []

        def note_connection(event: str, info: Mapping[str, object]) -> None:
            # With TLS, bytes may arrive that are no answer.
            if event == "connection.connect_tcp.complete" and self.url.startswith("http:"):
                connections.append(cast(_Connection, info["return_value"]))

        headers = {"Content-Type": content_type} | ({"Content-Encoding": content_encoding} if content_encoding else {})
        with self._endpoint.translated_errors():
            answer = self._http.put(
                calls.dataset_path(name), content=_until_answered(body, connections), headers=headers,
                timeout=NO_READ_LIMIT, extensions={"trace": note_connection},
            )  # fmt: skip
        return self._endpoint.document(PushedDataset, answer)

    def wait(
        self,
        job_id: str,
        progress: Progress = True,
        timeout_s: float | None = None,
        poll_s: float = POLL_S,
    ) -> Status:
        """Wait until a job has ended; return its last status. A server that is restarted meanwhile is waited for.

        Args:
            job_id: name of the job.
            progress: True shows a bar in a notebook and a line in a terminal; False shows nothing; a function is called
                with each new status.
            timeout_s: seconds to wait; None: no limit. The job continues after it.
            poll_s: seconds between two requests.

        Raises:
            TimeoutError: the job has not ended in time.
        """
        deadline, patience = Deadline(timeout_s), Patience()
        with display_of(progress) as show:
            while True:
                try:
                    status = self.status(job_id)
                except (ServerLost, ServerRefused) as error:
                    patience.lost(error)
                else:
                    patience.answered()
                    show(status)
                    if has_ended(status):
                        return status
                deadline.check(f"job {job_id!r} has not ended")
                time.sleep(poll_s)

    def download(self, job_id: str, folder: str | Path, names: Iterable[str] = ()) -> list[PulledFile]:
        """Download artifacts into a folder and verify each file. Repeat it to resume: what is there is kept.

        Args:
            job_id: name of the job.
            folder: where each artifact gets a folder of its name.
            names: artifacts to download; empty: all.

        Raises:
            InvalidInput: the artifact does not exist, or the folder can't be written.
            ServerRefused: a file does not have the server's checksum.
        """
        return list(Puller(self, job_id, Path(folder), lambda _: None).pull(list(names)))

    @contextmanager
    def artifact_file(self, job_id: str, name: str, path: str, start: int, sha256: str) -> Iterator[Sent]:
        """Open a file at byte `start`; the server sends the whole file if the checksum differs.

        Args:
            job_id: name of the job.
            name: name of the artifact.
            path: path of the file in the artifact.
            start: first byte to send.
            sha256: checksum of the file.
        """
        with self._streaming(calls.file_path(job_id, name, path), rest_of_file(start, sha256), {}) as answer:
            yield Sent(answer.status_code == HTTPStatus.PARTIAL_CONTENT, self._read(answer.iter_bytes(CHUNK_BYTES)))

    @contextmanager
    def follow(self, job_id: str, tail: int | None, offset: int | None) -> Iterator[Iterator[Event] | None]:
        """Open the stream of a job's output; None if the server is too old to have one.

        Args:
            job_id: name of the job.
            tail: number of last lines to begin with.
            offset: byte to begin at instead.
        """
        headers, query = following(tail, offset)
        with self._streaming(calls.job_path(job_id, "/logs"), headers, query) as answer:
            is_stream = answer.headers.get("content-type", "").startswith("text/event-stream")
            yield events(self._read(answer.iter_lines())) if is_stream else None

    @contextmanager
    def _streaming(
        self, path: str, headers: Mapping[str, str], query: Mapping[str, int | bool], body: object = None
    ) -> Iterator[httpx.Response]:
        with self._endpoint.translated_errors(), ExitStack() as stack:
            method, timeout = ("GET", TIMES) if body is None else ("POST", NO_READ_LIMIT)
            request = self._http.stream(method, path, headers=headers, params=query, json=body, timeout=timeout)
            with self._noted_if_slow():
                answer = stack.enter_context(request)
            if not answer.is_success:
                answer.read()
                raise self._endpoint.refusal(answer)
            yield answer

    def _read[Item](self, items: Iterator[Item]) -> Iterator[Item]:
        with self._endpoint.translated_errors():
            yield from items

    @contextmanager
    def _noted_if_slow(self) -> Iterator[None]:
        """Send a note if the answer takes long: a suspended server accepts connections and never answers."""
        if self._note is None:
            yield
            return
        timer = threading.Timer(self._silence_s, self._note, (f"{self.url} does not answer yet; still waiting",))
        timer.daemon = True  # Ctrl-C ends the command at once
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _send[Kind](self, call: Call[Kind]) -> Kind:
        with self._endpoint.translated_errors(), self._noted_if_slow():
            answer = self._http.request(**self._endpoint.request(call))
        return self._endpoint.document(call.kind, answer, call.no_route)


def _until_answered(body: Iterator[bytes], connections: list[_Connection]) -> Iterator[bytes]:
    """Yield `body`, but stop once the server has answered: it refuses a bad row long before the end of a large file."""
    for piece in body:
        if connections and connections[-1].get_extra_info("is_readable"):
            return
        yield piece
