"""`PostTrainingService`: connects requests to spec and store, and checks who owns a job.

Everything that may block (store, files) runs in our own threads, see `pools`. This module starts no asyncio task,
because llama-stack initialises a provider in an event loop that it then discards.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import cast

from opentelemetry.metrics import Meter

from llama_stack_provider_moe.control.server import (
    allowed_paths,
    callers,
    compat,
    dataset_profiles,
    exports,
    files,
    job_changes,
    job_names,
    job_status,
    prometheus,
    resolve,
    serving,
    stream,
    submissions,
    timeline,
    views,
    wire,
    wire_datasets,
    wire_requests,
)
from llama_stack_provider_moe.control.server.api_requests import Draft, drafted
from llama_stack_provider_moe.control.server.creation import Creation
from llama_stack_provider_moe.control.server.grader_tries import GraderTries
from llama_stack_provider_moe.control.server.guard import Guard, health
from llama_stack_provider_moe.control.server.job_rows import RowReader
from llama_stack_provider_moe.control.server.opening import Opened, opened
from llama_stack_provider_moe.control.server.own_datasets import OwnDatasets
from llama_stack_provider_moe.control.server.pipelines import Pipelines
from llama_stack_provider_moe.control.server.quotas import Quotas
from llama_stack_provider_moe.control.server.sweeps import Sweeps
from llama_stack_provider_moe.control.server.template_check import TemplateChecker
from llama_stack_provider_moe.control.store.audit import Audit
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.errors import Forbidden, Unavailable
from llama_stack_provider_moe.spec import JobSpec, TrainingSpec
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from llama_stack_provider_moe.spec.training_jobs import TrainingRecipe
from llama_stack_provider_moe.spec.validation_errors import validated

log = logging.getLogger(__name__)


class PostTrainingService:
    """The provider. Each server process has one; they share the store and the state folder.

    Args:
        config: the `config:` of the run YAML.
        deps: the host's APIs, for the rows of data sets.
        policy: the host's access policy; see `callers.whose`.
        meter: receives the figures; by default the host's exporter, if it has one.

    Attributes:
        datasets: the data sets that owners uploaded.
        quotas: the limits of owners.
        audit: writes down who did what.
        offers: models of jobs in the host's inference.
        sweeps: sweeps, whose jobs are ordinary jobs.
        pipelines: pipelines, whose parts are ordinary jobs.
        graders: tries of graders.
        followers: the clients that follow jobs.
    """

    def __init__(
        self, config: ProviderConfig, deps: compat.Deps, policy: compat.Policy = (), meter: Meter | None = None
    ) -> None:
        self.config = config
        self._deps = deps
        self._meter = meter
        self._policy = policy
        self.guard = Guard(config, lambda: health(self.store, config.state_dir))
        self.quotas = Quotas(config, lambda: self.store)
        self.audit = Audit(config)
        self.datasets = OwnDatasets(config, self.guard, lambda: self.store.datasets, self.quotas, self.audit, deps)
        self._profiles = dataset_profiles.Profiles(config, self.guard)
        self.offers = serving.Offers(config, deps)
        self._templates = TemplateChecker(config)
        self._rows = RowReader(config, deps, self.guard, self.datasets, self._templates)
        names = job_names.JobNames(config, self.guard, deps)
        self._creation = Creation(
            config, self.guard, names, self._rows, self.quotas, lambda: self.store, self.whose, self._accepted
        )
        self.sweeps = Sweeps(self._creation, self.audit, self._wake_supervisor)
        self.pipelines = Pipelines(self._creation, self.audit, self._wake_supervisor)
        self.graders = GraderTries(config, self.guard, lambda: self.store, lambda: self.whose("read"))
        self.followers = stream.Followers(self.guard.run, self.guard.failures)

    async def initialize(self) -> None:
        """Make the state folder, open the store, and start a supervisor for the jobs that an earlier server left."""
        self.serve(await asyncio.to_thread(opened, self.config, self._deps, self._meter))

    def serve(self, found: Opened) -> None:
        """Serve what is open already; `shutdown` closes it."""
        self.store, self._telemetry, self._keeper = found.store, found.telemetry, found.keeper

    async def shutdown(self) -> None:
        """Close the store; the supervisor and its jobs continue."""
        self._telemetry.close()
        await asyncio.to_thread(self._templates.close)
        await asyncio.to_thread(self.graders.close)
        await asyncio.to_thread(self.audit.close)
        await asyncio.to_thread(self.guard.close)
        await asyncio.to_thread(self._keeper.close)
        await asyncio.to_thread(self.store.close)

    # Requests that make a job. `size_bytes` is the size of the request's body, which decides the queue for its checks.

    async def supervised_fine_tune(self, body: object, size_bytes: int = 0) -> submissions.SubmittedJob:
        """Create a job from the API's SFT request."""
        request = await self.guard.bodies.run(size_bytes, drafted, wire_requests.SupervisedFineTuneRequest, body)
        return await self._create(request, size_bytes)

    async def preference_optimize(self, body: object, size_bytes: int = 0) -> submissions.SubmittedJob:
        """Create a job from the API's DPO request."""
        request = await self.guard.bodies.run(size_bytes, drafted, wire_requests.PreferenceOptimizeRequest, body)
        return await self._create(request, size_bytes)

    async def submit(self, body: object, size_bytes: int = 0) -> submissions.SubmittedJob:
        """Create a job from the body of a JobSpec, or from a draft of one."""
        return await self._create(body if isinstance(body, Draft) else Draft(body), size_bytes)

    async def validate(self, body: object, size_bytes: int = 0) -> submissions.Validated:
        """Run all the checks of `submit` without creating a job."""
        request = Draft(body)
        spec = await self._creation.checked(request, size_bytes)
        found = await self._rows.read(request, spec, None)
        return submissions.Validated.of(
            spec, allowed_paths.model_of(spec, self.config), found.counts(), found.sources, request.notes
        )

    async def dataset_profile(
        self,
        name: str,
        version: str | None,
        model: str | None,
        recipe: TrainingRecipe,
        max_length: int | None,
        max_completion_length: int | None,
    ) -> wire_datasets.DatasetProfile:
        """Return what a job would make of a data set that the caller uploaded.

        Args:
            name: the data set.
            version: beginning of the SHA-256 of a version; None: the current one.
            model: as in a job; None: no token is counted.
            recipe: of the job.
            max_length: `options.max_length` of the job; None: the default.
            max_completion_length: of a job whose model writes answers; None: the default.
        """
        found = await self.datasets.version(callers.owner(), name, version)
        request = dataset_profiles.draft(name, model, recipe, max_length, max_completion_length)
        if model is None:
            spec = await self.guard.bodies.run(0, resolve.parse_spec, request, self.config)
        else:
            spec = await self._creation.checked(request, 0)
        return await self._profiles.get(found, cast(TrainingSpec, spec), has_model=model is not None)

    async def checked(self, request: Draft, size_bytes: int) -> JobSpec:
        """Return the complete job with resolved names and folders; everything but its rows is checked."""
        return await self._creation.checked(request, size_bytes)

    async def _create(self, request: Draft, size_bytes: int = 0) -> submissions.SubmittedJob:
        job = await self._creation.create(request, size_bytes)
        return submissions.SubmittedJob(job_uuid=job.id, notes=request.notes)

    async def _accepted(self, jobs: Sequence[Job]) -> None:
        """Have new jobs run, count them, and write down who created them."""
        await self._wake_supervisor()
        for job in jobs:
            self._telemetry.submitted(job)
            self.audit.note(callers.owner(), "submit", job=job.id, recipe=job.recipe, model=job.model, of=job.parent)
            log.info("job %s: scheduled, %s of %s", job.id, job.recipe, job.model)

    async def _wake_supervisor(self) -> None:
        """Make sure that a supervisor runs. The store already has the request, so an error here does not fail it."""
        with suppress(Unavailable):  # the keeper tries again
            await self.guard.run(self._keeper.ensure_alive)

    # Requests about a job.

    async def seen[Answer](self, view: Callable[[JobStore, str | None], Answer]) -> Answer:
        """Return a view of the store, given the owner whose jobs the caller may read; None for every owner's."""
        return await self.guard.run(view, self.store, self.whose("read"))

    async def changed[Answer](self, change: Callable[[JobStore, str | None], Answer]) -> Answer:
        """Return what a change of the store returns, given the owner whose jobs the caller may change."""
        return await self.guard.run(change, self.store, self.whose("update"))

    async def status(self, job_id: str) -> wire.PostTrainingJobStatusResponse:
        """Return the status of a job."""
        return await self._about(job_id, lambda job: job_status.status(job, self.store))

    async def detail(self, job_id: str) -> wire.JobDetail:
        """Return all details of a job."""
        return await self._about(job_id, lambda job: job_status.detail(job, self.store))

    async def artifacts(self, job_id: str) -> wire.PostTrainingJobArtifactsResponse:
        """Return the artifacts of a job so far."""
        return await self._about(
            job_id,
            lambda job: wire.PostTrainingJobArtifactsResponse(
                job_uuid=job.id,
                checkpoints=exports.checkpoints(job, self.store),
                report=f"/jobs/{job.id}/report",
            ),
        )

    async def export(self, job_id: str, body: object, size_bytes: int = 0) -> submissions.SubmittedJob:
        """Create a job that exports the model of `job_id`, from the body of an `export` block."""
        # Check access first, so that errors of the body reveal nothing to others.
        await self.guard.run(self.store.get, job_id, self.whose("update"))
        whole = {"recipe": exports.RECIPE, "of": job_id, "export": body}
        return await self._create(Draft(whole, {"of": "the job", "export": ""}), size_bytes)

    async def exports(self, job_id: str) -> wire.ListExportsResponse:
        """Return a job's exports, and the progress of each of their steps."""
        return await self._about(job_id, lambda job: wire.ListExportsResponse(data=exports.exports_of(job, self.store)))

    async def artifact(self, job_id: str, name: str) -> wire.ArtifactFiles:
        """Return the files of an artifact."""
        return await self._about(job_id, lambda job: files.listing(job, self.store, name))

    async def artifact_file(self, job_id: str, name: str, path: str) -> files.File:
        """Return one file of an artifact."""
        found = await self._about(job_id, lambda job: files.file(job, self.store, name, path))
        self.audit.note(callers.owner(), "download", job=job_id, artifact=name, file=path)
        return found

    async def logs(self, job_id: str, tail: int, offset: int | None) -> wire.PostTrainingJobLogStream:
        """Return lines of a job's output."""
        return await self._about(job_id, lambda job: views.log(job, tail, offset))

    async def follow(self, job_id: str, tail: int, offset: int | None) -> AsyncIterator[bytes]:
        """Return the output of a job as server-sent events; see `stream`."""
        whose = self.whose("read")

        def look(start: int | None) -> stream.OutputPage:
            job = self.store.get(job_id, whose)  # read the state before the output, so that no line is missed
            return stream.page_of_output(job.state, views.log(job, tail, start))

        views.folder_of(await self.guard.run(self.store.get, job_id, whose))
        return self.followers.output(look, offset)

    async def metrics(
        self, job_id: str, names: set[str] | None, since_step: int | None, limit: int
    ) -> wire.MetricSeries:
        """Return the metrics of a job's steps.

        Args:
            job_id: the job.
            names: the metrics to return; None for all.
            since_step: return only points after this step; None for all.
            limit: largest number of points.
        """
        return await self._about(
            job_id, lambda job: timeline.metrics(job.id, views.folder_of(job).events, names, since_step, limit)
        )

    async def cancel(self, job_id: str) -> None:
        """Request the cancellation of a job; a second request changes nothing."""
        job = await self.guard.run(self.store.request_cancel, job_id, self.whose("update"))
        self.audit.note(callers.owner(), "cancel", job=job_id)
        if not job.state.ended:
            await self._wake_supervisor()

    async def resume(self, job_id: str, body: object = None, size_bytes: int = 0) -> submissions.ResumedJob:
        """Resume a cancelled or failed job from its last complete checkpoint, or from the beginning without one.

        Args:
            job_id: the job.
            body: what to change in it (`wire_requests.Resumption`); None for nothing.
            size_bytes: size of the body.
        """
        asked = None
        if body is not None:
            # Check access first, so that errors of the body reveal nothing to others.
            await self.guard.run(self.store.get, job_id, self.whose("update"))
            asked = await self.guard.bodies.run(size_bytes, validated, wire_requests.Resumption, body)
        backend = None if asked is None or asked.moe is None else asked.moe.experts_backend
        resumed = await self.guard.run(
            job_changes.resume, self.store, self.config, job_id, self.whose("update"), backend
        )
        self.audit.note(callers.owner(), "resume", job=job_id)
        await self._wake_supervisor()
        log.info("job %s: resumed", job_id)
        return resumed

    async def delete(self, job_id: str, force: bool = False) -> wire.DeletedJob:
        """Delete a job that has ended, its exports and their folders; a `checkpoint_dir` elsewhere stays.

        Args:
            job_id: the job.
            force: delete the job even if other jobs need its files.
        """
        whose = self.whose("delete")
        deleted = await self.guard.run(job_changes.delete, self.store, self.config, job_id, whose, force)
        await self.offers.withdrawn(deleted.withdrawn)
        gone = {"exports": " ".join(deleted.exports) or None, "withdrawn": deleted.withdrawn}
        self.audit.note(callers.owner(), "delete", job=job_id, **gone)
        return deleted

    async def health(self) -> wire.Health:
        """Return whether the server can accept and run jobs."""
        return await self.guard.health()

    async def prometheus(self) -> str:
        """Return the store's figures for Prometheus.

        Raises:
            Forbidden: the figures count every owner's jobs, and the caller may not read those.
        """
        self.must_read_every_job("metrics count every owner's jobs")
        return await self.guard.run(prometheus.of_store, self.store)

    def must_read_every_job(self, why: str) -> None:
        """Raise `Forbidden`, which begins with `why`, unless the caller is an administrator or nobody logs in."""
        if not callers.may_see_all_figures(self._policy):
            raise Forbidden(
                f"{why}; the access policy must permit you to read {compat.JOB_RESOURCE}::*, like an administrator"
            )

    def refused(self, method: str, route: str, status: int) -> None:
        """Count a request that was answered with an error."""
        self._telemetry.refused(method, route, status)

    def whose(self, action: compat.Action) -> str | None:
        """Return whose jobs the caller may use, see `callers.whose`."""
        return callers.whose(self._policy, action)

    async def _about[Answer](self, job_id: str, view: Callable[[Job], Answer]) -> Answer:
        whose = self.whose("read")
        return await self.guard.run(lambda: view(self.store.get(job_id, whose)))
