"""`Creation`: a request becomes a job: checked, with its rows in its folder, and in the store."""

import shutil
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

from llama_stack_provider_moe.control.server import (
    allowed_paths,
    callers,
    compat,
    exports,
    job_changes,
    playgrounds,
    resolve,
)
from llama_stack_provider_moe.control.server.api_requests import Draft
from llama_stack_provider_moe.control.server.guard import Guard
from llama_stack_provider_moe.control.server.job_names import JobNames
from llama_stack_provider_moe.control.server.job_rows import RowReader
from llama_stack_provider_moe.control.server.quotas import Quotas
from llama_stack_provider_moe.control.store import intake, references
from llama_stack_provider_moe.control.store.store import Job, JobStore, NewJob
from llama_stack_provider_moe.errors import InvalidInput, MoeError, Unavailable
from llama_stack_provider_moe.jobdir.folder import JobFolder, write_atomic
from llama_stack_provider_moe.jobdir.later import Later
from llama_stack_provider_moe.spec import ExportSpec, JobSpec, PlaygroundSpec, TrainingSpec
from llama_stack_provider_moe.spec.server_config import ProviderConfig

NOT_ACCEPTED = "the job was not accepted"


class Creation:
    """Makes jobs for one service.

    Args:
        config: the server's configuration.
        guard: the service's threads.
        names: resolves the names in jobs.
        rows: reads the data sets that jobs name.
        quotas: the limits of owners.
        store: returns the store, once it is open.
        whose: returns whose jobs the caller may use for an action, see `callers.whose`.
        accepted: called with the new jobs.
    """

    def __init__(
        self,
        config: ProviderConfig,
        guard: Guard,
        names: JobNames,
        rows: RowReader,
        quotas: Quotas,
        store: Callable[[], JobStore],
        whose: Callable[[compat.Action], str | None],
        accepted: Callable[[Sequence[Job]], Awaitable[None]],
    ) -> None:
        self.config = config
        self.guard = guard
        self.names = names
        self.rows = rows
        self.quotas = quotas
        self.store = store
        self.whose = whose
        self.accepted = accepted
        self._staging = config.state_dir / "staging"

    async def create(self, request: Draft, size_bytes: int = 0) -> Job:
        """Create a job and have it run.

        Args:
            request: what the caller sent.
            size_bytes: the size of the request's body, which decides the queue for its checks.
        """
        spec = await self.checked(request, size_bytes)
        owner = callers.owner()
        if isinstance(spec, ExportSpec):  # an export belongs to the job's owner, even if an administrator asks for it
            owner = (await self.guard.run(self.store().get, spec.of, None)).owner
        await self.guard.must_have_room(NOT_ACCEPTED)
        await self.guard.run(self.quotas.must_have_left, owner)
        async with self.staged(NOT_ACCEPTED) as staging:
            await self.guard.run(self.config.privacy.make_folder, staging / "data")
            await self.rows.read(request, spec, JobFolder(staging))
            job = await self.guard.run(self._commit, request, spec, owner, staging)
        await self.accepted([job])
        return job

    @asynccontextmanager
    async def staged(self, outcome: str) -> AsyncIterator[Path]:
        """Give a path for staged files, which are removed in the end unless they were moved.

        Args:
            outcome: what did not happen, for the error of a full disk.
        """
        staging = self._staging / uuid.uuid4().hex
        try:
            yield staging
        except Exception as error:
            # Check for a full disk before removing the staged files frees space. Rows, spec and store raise different
            # errors for it.
            known = None if isinstance(error, MoeError) else await self.guard.known_failure(error, outcome)
            if known is not None:
                raise known from error
            raise
        finally:
            with suppress(Unavailable):  # leftovers are removed after a day
                # Does nothing once it has become the job's folder.
                await self.guard.in_state_dir(partial(shutil.rmtree, staging, ignore_errors=True))

    async def checked(self, request: Draft, size_bytes: int) -> JobSpec:
        """The complete job with resolved names and folders; everything but its rows is checked."""
        return await self._resolved(request, size_bytes, asks_hub=True)

    async def resolved(self, request: Draft, size_bytes: int) -> JobSpec:
        """The same, without asking the hub for its model."""
        return await self._resolved(request, size_bytes, asks_hub=False)

    async def _resolved(self, request: Draft, size_bytes: int, asks_hub: bool) -> JobSpec:
        spec = await self.guard.bodies.run(size_bytes, resolve.parse_spec, request, self.config)
        if isinstance(spec, ExportSpec):
            return await self.guard.run(self._resolve_export, request, spec, self.whose("update"))
        self._must_be_tellable(request, spec)
        if isinstance(spec, PlaygroundSpec) and not spec.playground.replace:
            await self.guard.run(playgrounds.must_be_alone, self.store(), callers.owner())
        job_id = await self.guard.run(self._id_of, spec)
        request.waits.asked, request.waits.whose = spec, self.whose("read")
        return await self.names.resolve(request, spec, job_id, self.store(), request.waits.whose, asks_hub)

    def _must_be_tellable(self, request: Draft, spec: JobSpec) -> None:
        if isinstance(spec, TrainingSpec) and spec.notify is not None:
            self.must_be_told(spec.notify.url, request.name("notify.url"))

    def must_be_told(self, url: str, field: str) -> None:
        """Raise InvalidInput unless the operator allows messages to a URL.

        Args:
            url: of a `notify`.
            field: the caller's name of the setting, for errors.
        """
        if not self.config.notify.allows(url):
            allowed = ", ".join(self.config.notify.allowed)
            expected = f"a URL on one of {allowed}" if allowed else "no `notify`, because this server tells nobody"
            raise InvalidInput(field, url, f"{expected} (`notify.allowed`)")

    def _resolve_export(self, request: Draft, spec: ExportSpec, whose: str | None) -> ExportSpec:
        named = spec.model_copy(update={"job_uuid": self._id_of(spec)})
        return exports.resolved(named, self.store().get(spec.of, whose), request, self.config, self.store())

    def _id_of(self, spec: JobSpec) -> str:
        job_id = spec.job_uuid or f"{spec.recipe}-{uuid.uuid4().hex[:12]}"
        self.must_be_free(job_id)
        return job_id

    def must_be_free(self, job_id: str) -> None:
        """Raise `Conflict` if a job has this name."""
        job_changes.must_be_free(self.store(), job_id)

    def written(self, request: Draft, spec: JobSpec, owner: str, staging: Path) -> NewJob:
        """Write the specification into the staged folder of a job, and return the job's row."""
        assert spec.job_uuid is not None
        folder = self.config.jobs_dir / spec.job_uuid
        write_atomic(JobFolder(staging).spec, spec, mode=0o666 & ~self.config.privacy.umask)
        of = spec.of if isinstance(spec, ExportSpec) else None
        where, gpus = resolve.executor_of(spec)
        self._note_for_later(request, JobFolder(staging))
        uses = references.uses_of(spec, self.config.jobs_dir)
        model = allowed_paths.model_of(spec, self.config)
        waits = tuple(request.waits.jobs.values())
        new = NewJob(spec.job_uuid, owner, spec.recipe, model, str(folder), gpus, of, where, *uses, waits=waits)
        if isinstance(spec, ExportSpec):
            return new
        notify = spec.notify.model_dump_json() if isinstance(spec, TrainingSpec) and spec.notify is not None else None
        return new._replace(labels=spec.labels, note=spec.note, notify=notify)

    def _note_for_later(self, request: Draft, folder: JobFolder) -> None:
        """Write what the supervisor needs to resolve the names of a job that waits for others."""
        asked = request.waits.asked
        if request.waits.jobs and asked is not None:
            later = Later(
                spec=asked.model_dump(mode="json"), body=request.body, names=request.names, whose=request.waits.whose
            )
            write_atomic(folder.later, later, mode=0o666 & ~self.config.privacy.umask)

    def _commit(self, request: Draft, spec: JobSpec, owner: str, staging: Path) -> Job:
        """Move the staged folder into place and add the job to the store, both or neither."""
        new = self.written(request, spec, owner, staging)
        with intake.committing(self.config):
            self.must_be_free(new.id)
            self.quotas.must_have_bytes(owner, staging)
            if not isinstance(spec, PlaygroundSpec):
                return intake.accept_job(self.store(), new, staging, self.config.limits)
            if not spec.playground.replace:
                playgrounds.must_be_alone(self.store(), owner)
            job = intake.accept_job(self.store(), new, staging, self.config.limits)
            playgrounds.replace_others(self.store(), job)
            return job
