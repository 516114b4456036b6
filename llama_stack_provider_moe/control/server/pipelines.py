"""`Pipelines`: creates, checks, cancels, resumes and deletes pipelines of one service.

Every part is checked like a job before anything is created, with what the parts before it will leave. All parts are
created in one transaction, or none.
"""

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from llama_stack_provider_moe.control.server import (
    allowed_paths,
    callers,
    hub_check,
    job_changes,
    job_groups,
    submissions,
)
from llama_stack_provider_moe.control.server.api_requests import Draft
from llama_stack_provider_moe.control.server.creation import Creation
from llama_stack_provider_moe.control.server.job_rows import JobRows
from llama_stack_provider_moe.control.server.wire_pipelines import (
    DeletedPipeline,
    ResumedPart,
    ResumedPipeline,
    SubmittedPipeline,
    ValidatedPipeline,
)
from llama_stack_provider_moe.control.store import intake
from llama_stack_provider_moe.control.store.audit import Audit
from llama_stack_provider_moe.control.store.pipeline_rows import NewPipeline, PipelineDetail
from llama_stack_provider_moe.control.store.store import Job
from llama_stack_provider_moe.errors import MoeError
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec import JobSpec
from llama_stack_provider_moe.spec.pipelines import PipelineSpec
from llama_stack_provider_moe.spec.validation_errors import validated

NOT_ACCEPTED = "the pipeline was not accepted"
log = logging.getLogger(__name__)


class _Planned(NamedTuple):
    """A part of a pipeline before it is created."""

    name: str
    request: Draft
    spec: JobSpec


class Pipelines:
    """The pipelines of one service.

    Args:
        creation: creates jobs.
        audit: writes down who did what.
        wake: makes sure that a supervisor runs.
    """

    def __init__(self, creation: Creation, audit: Audit, wake: Callable[[], Awaitable[None]]) -> None:
        self._creation = creation
        self._config = creation.config
        self._guard = creation.guard
        self._audit = audit
        self._wake = wake

    async def create(self, body: object, size_bytes: int) -> SubmittedPipeline:
        """Create a pipeline with all its parts, or nothing."""
        asked, pipeline_id, planned = await self._checked(body, size_bytes)
        owner = callers.owner()
        await self._guard.must_have_room(NOT_ACCEPTED)
        await self._guard.run(self._creation.quotas.must_have_left, owner, len(planned))
        async with self._creation.staged(NOT_ACCEPTED) as staging:
            folders = []
            for number, each in enumerate(planned):
                folder = staging / str(number)
                await self._guard.run(self._config.privacy.make_folder, folder / "data")
                await self._read_rows(each, JobFolder(folder))
                folders.append(folder)
            notify = None if asked.notify is None else asked.notify.model_dump_json()
            new = NewPipeline(pipeline_id, owner, [], notify)
            jobs = await self._guard.run(self._commit, new, planned, folders)
        self._audit.note(owner, "submit", pipeline=pipeline_id, jobs=len(jobs))
        await self._creation.accepted(jobs)
        log.info("pipeline %s: %d parts are scheduled", pipeline_id, len(jobs))
        notes = [f"part {each.name}: {note}" for each in planned for note in each.request.notes]
        named = {each.name: job.id for each, job in zip(planned, jobs, strict=True)}
        return SubmittedPipeline(pipeline_uuid=pipeline_id, jobs=named, notes=notes)

    async def validate(self, body: object, size_bytes: int) -> ValidatedPipeline:
        """Run all the checks of `create` without creating anything."""
        _, _, planned = await self._checked(body, size_bytes)
        found = {}
        for each in planned:
            rows = await self._read_rows(each, None)
            model = allowed_paths.model_of(each.spec, self._config)
            found[each.name] = submissions.Validated.of(
                each.spec, model, rows.counts(), rows.sources, each.request.notes
            )
        return ValidatedPipeline(parts=found)

    async def _checked(self, body: object, size_bytes: int) -> tuple[PipelineSpec, str, list[_Planned]]:
        """Check the job of every part but its rows; an error names the part."""
        asked = await self._guard.bodies.run(size_bytes, validated, PipelineSpec, body)
        if asked.notify is not None:
            self._creation.must_be_told(asked.notify.url, "notify.url")
        get = self._creation.store().pipelines.get
        free = partial(job_groups.free_id, asked.pipeline_uuid, "pipeline", lambda name: get(name, None))
        pipeline_id = await self._guard.run(free)
        found: list[_Planned] = []
        siblings: dict[str, JobSpec] = {}
        for at, part in enumerate(asked.parts):
            request = Draft(asked.job_of(at, pipeline_id), siblings=dict(siblings))
            try:
                spec = await self._creation.resolved(request, size_bytes)
                await hub_check.check(request, spec, self._config, self._guard)
            except (MoeError, ValueError) as error:
                raise job_groups.reworded(error, partial(asked.located, at, pipeline_id)) from error
            found.append(_Planned(part.name, request, spec))
            siblings[str(spec.job_uuid)] = spec
        return asked, pipeline_id, found

    async def _read_rows(self, part: _Planned, folder: JobFolder | None) -> JobRows:
        try:
            return await self._creation.rows.read(part.request, part.spec, folder)
        except (MoeError, ValueError) as error:
            raise job_groups.about(error, f"part {part.name!r}") from error

    def _commit(self, new: NewPipeline, planned: list[_Planned], folders: list[Path]) -> list[Job]:
        owner = new.owner
        parts = [
            (self._creation.written(each.request, each.spec, owner, folder)._replace(pipeline=new.id), each.name)
            for each, folder in zip(planned, folders, strict=True)
        ]
        store = self._creation.store()
        group = intake.NewGroup.of_pipeline(store, new._replace(parts=parts))
        with intake.committing(self._config):
            for job, _ in parts:  # or the folder of a job that took the name meanwhile would be set aside
                self._creation.must_be_free(job.id)
            self._creation.quotas.must_have_bytes(owner, *folders)
            return intake.accept_group(store, group, folders, self._config.limits)

    async def cancel(self, pipeline_id: str) -> PipelineDetail:
        """Cancel every job of a pipeline that waits or runs; a second request changes nothing."""
        store = self._creation.store()
        found = await self._guard.run(store.pipelines.request_cancel, pipeline_id, self._creation.whose("update"))
        self._audit.note(callers.owner(), "cancel", pipeline=pipeline_id)
        if not found.found.state.ended:
            await self._wake()
        return found

    async def resume(self, pipeline_id: str) -> ResumedPipeline:
        """Resume every job of a pipeline that failed or was cancelled; completed ones are left alone."""
        resumed = await self._guard.run(self._resume, pipeline_id, self._creation.whose("update"))
        self._audit.note(callers.owner(), "resume", pipeline=pipeline_id, jobs=len(resumed.jobs))
        await self._wake()
        log.info("pipeline %s: resumed, %s", pipeline_id, " ".join(job.job_uuid for job in resumed.jobs))
        return resumed

    def _resume(self, pipeline_id: str, whose: str | None) -> ResumedPipeline:
        store = self._creation.store()
        ended = (JobState.FAILED, JobState.CANCELLED)
        found = store.pipelines.get(pipeline_id, whose)
        at = {
            job.id: job_changes.must_be_resumable(store, self._config, job)
            for job in found.jobs.values()
            if job.state in ended
        }
        jobs = store.pipelines.resume(pipeline_id, whose, self._config.limits)
        parts = [ResumedPart(job_uuid=job.id, resumes=at.get(job.id, "from_beginning")) for job in jobs]
        return ResumedPipeline(pipeline_uuid=pipeline_id, jobs=parts)

    async def delete(self, pipeline_id: str, force: bool) -> DeletedPipeline:
        """Delete a pipeline that has ended, and all its jobs.

        Args:
            pipeline_id: the pipeline.
            force: delete its jobs even if other jobs need their files.
        """
        deleted = await self._guard.run(self._delete, pipeline_id, self._creation.whose("delete"), force)
        self._audit.note(callers.owner(), "delete", pipeline=pipeline_id, jobs=len(deleted.jobs))
        return deleted

    def _delete(self, pipeline_id: str, whose: str | None, force: bool) -> DeletedPipeline:
        store = self._creation.store()
        found = store.pipelines.get(pipeline_id, whose)
        # The last part first: earlier ones are needed by those after them. Exports go with their parts.
        jobs = [found.jobs[part.job] for part in reversed(found.parts) if part.job in found.jobs]
        running = [job for job in found.jobs.values() if not job.state.ended]
        what = f"pipeline {pipeline_id!r}"
        gone = job_groups.delete(store, self._config, what, running or jobs, whose, force)
        return DeletedPipeline(pipeline_uuid=pipeline_id, jobs=gone.jobs, kept=gone.kept, broken=gone.broken)
