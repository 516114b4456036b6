"""`AsyncClient`: the same client for asyncio.

Requests are httpx'. Uploads and downloads read, hash and write files, which blocks, so they run in a thread with a
client of their own.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self, Unpack

import httpx

from llama_stack_provider_moe.client import calls
from llama_stack_provider_moe.client.calls import Call, JobFilters, Recipe
from llama_stack_provider_moe.client.connection import Endpoint, Words, following
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
from llama_stack_provider_moe.client.playground_methods import AsyncPlaygroundMethods
from llama_stack_provider_moe.client.progress import Progress, display_of
from llama_stack_provider_moe.client.sse import Event, Parser
from llama_stack_provider_moe.client.sweep_methods import AsyncSweepMethods
from llama_stack_provider_moe.client.sync_client import Client
from llama_stack_provider_moe.errors import ServerLost, ServerRefused


class AsyncClient(AsyncSweepMethods, AsyncPlaygroundMethods):
    """A server with our provider; every method of `Client`, to be awaited.

    Args:
        url: URL of the server, without the path of the API.
        api_key: API key, sent as a bearer token.
        transport: transport of httpx for requests other than uploads and downloads; default: the network.

    Methods raise `ServerRefused` if the server answers with an error, and `ServerLost` if it does not answer.
    """

    def __init__(self, url: str, api_key: str | None = None, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._endpoint = Endpoint(url, api_key, Words())
        self.url = self._endpoint.url
        self._api_key = api_key
        self._http = httpx.AsyncClient(transport=transport, **self._endpoint.settings())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def health(self) -> Health:
        """Return whether the server can accept and run jobs."""
        return await self._send(calls.health())

    async def submit(self, body: Mapping[str, object]) -> Scheduled:
        """Create a job from the body of a job file: {job_uuid, notes}."""
        return await self._send(calls.submit(body))

    async def validate(self, body: Mapping[str, object]) -> Validated:
        """Check a job and its rows without creating it: {spec, train_rows, validation_rows, rows, notes}."""
        return await self._send(calls.validate(body))

    async def jobs(self, limit: int = 1000, after: str | None = None, **filters: Unpack[JobFilters]) -> JobList:
        """Return a page of jobs, newest first: {data, has_more}; `after` is the last job of the page before."""
        return await self._send(calls.jobs(limit, after, filters))

    async def job(self, job_id: str) -> Job:
        """Return all details of a job."""
        return await self._send(calls.job(job_id))

    async def status(self, job_id: str) -> Status:
        """Return the status of a job; its progress is in `resources_allocated`."""
        return await self._send(calls.status(job_id))

    async def artifacts(self, job_id: str) -> Artifacts:
        """Return the artifacts that a job has saved so far: {checkpoints}."""
        return await self._send(calls.artifacts(job_id))

    async def artifact_files(self, job_id: str, name: str) -> ArtifactFiles:
        """Return the files of an artifact: {files}."""
        return await self._send(calls.artifact_files(job_id, name))

    async def logs(self, job_id: str, tail: int | None = None, offset: int | None = None) -> LogLines:
        """Return the last lines of the output, or those after a byte offset: {log_lines, next_offset}."""
        return await self._send(calls.logs(job_id, tail, offset))

    async def events(self, job_id: str, cursor: int = 0, limit: int = 1000) -> EventPage:
        """Return a page of a job's events: {events, cursor}; `cursor` is that of the page before."""
        return await self._send(calls.events(job_id, cursor, limit))

    async def metrics(
        self, job_id: str, names: Iterable[str] | None = None, since_step: int | None = None, limit: int = 1000
    ) -> MetricSeries:
        """Return the metrics of a job's steps as columns: {steps, epoch, metrics, evaluations}.

        Args:
            job_id: name of the job.
            names: the metrics to return; None: all.
            since_step: return only steps after this one.
            limit: largest number of steps; more are thinned evenly.
        """
        return await self._send(calls.metrics(job_id, names, since_step, limit))

    async def routing(self, job_id: str, layer: int | None = None, limit: int = 200) -> RoutingSeries:
        """Return how routers used experts: {steps, layers, experts, cv, dead, largest, layer, share_steps, share}.

        Args:
            job_id: name of the job.
            layer: layer whose experts' shares are returned; None: the first one.
            limit: largest number of steps; more are thinned evenly.
        """
        return await self._send(calls.routing(job_id, layer, limit))

    async def cancel(self, job_id: str) -> None:
        """Cancel a job; repeating it is harmless."""
        await self._send(calls.cancel(job_id))

    async def resume(self, job_id: str, experts_backend: str | None = None) -> Scheduled:
        """Resume a cancelled or failed job, with another `moe.experts_backend` if given: {job_uuid, resumes}."""
        return await self._send(calls.resume(job_id, experts_backend))

    async def delete(self, job_id: str, force: bool = False) -> Deleted:
        """Delete a job; with `force`, even if other jobs need its files: {job_uuid, kept, broken}."""
        return await self._send(calls.delete(job_id, force))

    async def export(self, job_id: str, body: Mapping[str, object]) -> Scheduled:
        """Export the model of a completed job, from the body of an `export` block: {job_uuid}."""
        return await self._send(calls.export(job_id, body))

    async def exports(self, job_id: str) -> ExportList:
        """Return the exports of a job and their steps: {data}."""
        return await self._send(calls.exports(job_id))

    async def datasets(self, limit: int = 1000, after: str | None = None) -> DatasetList:
        """Return a page of uploaded data sets, by name: {data, has_more, used_bytes, quota_bytes}."""
        return await self._send(calls.datasets(limit, after))

    async def dataset(self, name: str) -> Dataset:
        """Return the versions of a data set, the current one first: {name, versions, has_more}."""
        return await self._send(calls.dataset(name))

    async def delete_dataset(self, name: str, version: str | None = None) -> DeletedDataset:
        """Delete a data set, or one version: {name, versions, bytes}."""
        return await self._send(calls.delete_dataset(name, version))

    async def quota(self) -> Quota:
        """Return what the caller uses of the server, and what is left."""
        return await self._send(calls.quota())

    async def quotas(self) -> QuotaList:
        """Return what every owner uses; only for administrators: {data}."""
        return await self._send(calls.quotas())

    async def profile(
        self,
        name: str,
        model: str | None = None,
        recipe: Recipe = "sft",
        max_length: int | None = None,
        version: str | None = None,
        timeout_s: float | None = None,
        max_completion_length: int | None = None,
    ) -> DatasetProfile:
        """Return what a job would make of a data set, once the server has counted it; see `Client.profile`."""
        deadline = Deadline(timeout_s)
        while True:
            found = await self._send(calls.profile(name, model, recipe, max_length, version, max_completion_length))
            if found["is_ready"] or timeout_s == 0:
                return found
            deadline.check(f"the profile of data set {name!r} is not ready")
            await asyncio.sleep(POLL_S)

    async def push(self, name: str, rows: str | Path | Iterable[Mapping[str, object]]) -> PushedDataset:
        """Upload rows as a version of a data set; see `Client.push`."""
        return await self._in_thread(lambda client: client.push(name, rows))

    async def download(self, job_id: str, folder: str | Path, names: Iterable[str] = ()) -> list[PulledFile]:
        """Download artifacts into a folder and verify each file; see `Client.download`."""
        return await self._in_thread(lambda client: client.download(job_id, folder, names))

    async def wait(
        self,
        job_id: str,
        progress: Progress = True,
        timeout_s: float | None = None,
        poll_s: float = POLL_S,
    ) -> Status:
        """Wait until a job has ended; return its last status. See `Client.wait`."""
        deadline, patience = Deadline(timeout_s), Patience()
        with display_of(progress) as show:
            while True:
                try:
                    status = await self.status(job_id)
                except (ServerLost, ServerRefused) as error:
                    patience.lost(error)
                else:
                    patience.answered()
                    show(status)
                    if has_ended(status):
                        return status
                deadline.check(f"job {job_id!r} has not ended")
                await asyncio.sleep(poll_s)

    async def follow(self, job_id: str, tail: int | None = None, offset: int | None = None) -> AsyncIterator[Event]:
        """Yield the events of a job's output: log documents, and one named `end`.

        Args:
            job_id: name of the job.
            tail: number of last lines to begin with.
            offset: byte to begin at instead.
        """
        headers, query = following(tail, offset)
        path = calls.job_path(job_id, "/logs")
        async with self._streaming(path, headers, query) as answer:
            parser = Parser()
            async for line in answer.aiter_lines():
                event = parser.feed(line)
                if event is not None:
                    yield event

    @asynccontextmanager
    async def _streaming(
        self, path: str, headers: Mapping[str, str], query: Mapping[str, int | bool]
    ) -> AsyncIterator[httpx.Response]:
        with self._endpoint.translated_errors():
            async with self._http.stream("GET", path, headers=headers, params=query) as answer:
                if not answer.is_success:
                    await answer.aread()
                    raise self._endpoint.refusal(answer)
                yield answer

    async def _send[Kind](self, call: Call[Kind]) -> Kind:
        with self._endpoint.translated_errors():
            answer = await self._http.request(**self._endpoint.request(call))
        return self._endpoint.document(call.kind, answer, call.no_route)

    async def _in_thread[Answer](self, act: Callable[[Client], Answer]) -> Answer:
        def acted() -> Answer:
            with Client(self.url, self._api_key) as client:
                return act(client)

        return await asyncio.to_thread(acted)
