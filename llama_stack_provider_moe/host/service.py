"""`PostTrainingService`: wire <-> spec and store, and whose job it is. What a job does is decided elsewhere.

All that may block (store, files) runs in threads; no task is started here, for llama-stack initialises a provider in
an event loop that it then throws away.
"""

import asyncio
import fcntl
import hashlib
import logging
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from opentelemetry.metrics import Meter, get_meter
from pydantic import ValidationError

from llama_stack_provider_moe.config import ProviderConfig
from llama_stack_provider_moe.errors import Conflict, Forbidden, InvalidInput, MoeError, NoRoom, NotFound
from llama_stack_provider_moe.host import (
    compat,
    exports,
    exposition,
    files,
    placement,
    rows,
    status,
    stream,
    timeline,
    views,
    wire,
)
from llama_stack_provider_moe.host.convert import Draft, draft
from llama_stack_provider_moe.host.explain import A_BODY, invalid_body
from llama_stack_provider_moe.host.saved import must_have_saved
from llama_stack_provider_moe.host.telemetry import METER, Telemetry
from llama_stack_provider_moe.jobs import disk, removal
from llama_stack_provider_moe.jobs.caretaker import Caretaker
from llama_stack_provider_moe.jobs.events import now
from llama_stack_provider_moe.jobs.folder import JobFolder, write_atomic
from llama_stack_provider_moe.jobs.state import JobState
from llama_stack_provider_moe.jobs.store import Job, JobStore, NewJob
from llama_stack_provider_moe.spec import (
    JOB_SPEC,
    ExportSpec,
    JobSpec,
    LoadingSpec,
    TrainingSpec,
)  # fmt: skip

ANONYMOUS = "anonymous"
STALE_STAGING_S = 24 * 3600
log = logging.getLogger(__name__)


class PostTrainingService:
    """The provider. One for each server process; they share the store and the state folder.

    Args:
        config: the `config:` of the run YAML.
        deps: the host's APIs, for the rows of data sets.
        policy: the host's access policy; see `compat.may_reach_every_job`.
        meter: where figures go; left out: the host's exporter, where it has one.
    """

    def __init__(
        self, config: ProviderConfig, deps: dict[Any, Any], policy: Sequence[Any] = (), meter: Meter | None = None
    ) -> None:
        self.config = config
        self._meter = get_meter(METER) if meter is None else meter
        self._deps = deps
        self._policy = policy
        self._staging = config.state_dir / "staging"

    async def initialize(self) -> None:
        """Make the state folder, open the store, and see to the jobs that an earlier server left waiting."""
        await asyncio.to_thread(self._open)

    def _open(self) -> None:
        for folder in (self.config.jobs_dir, self.config.models_dir, self._staging):
            folder.mkdir(parents=True, exist_ok=True)
        self.store = JobStore(self.config.url)
        self._telemetry = Telemetry(self._meter, self.store, self.config.state_dir / "telemetry.lock")
        for folder in self._staging.iterdir():  # of a server that died while rows came in
            if time.time() - folder.stat().st_mtime > STALE_STAGING_S:
                shutil.rmtree(folder, ignore_errors=True)
        self._caretaker = Caretaker(self.config, self.store)
        self._caretaker.start()

    async def shutdown(self) -> None:
        """Close the store; the supervisor and its jobs go on."""
        self._telemetry.close()
        await asyncio.to_thread(self._caretaker.close)
        await asyncio.to_thread(self.store.close)

    # Requests that make a job.

    async def supervised_fine_tune(self, request: wire.SupervisedFineTuneRequest) -> wire.PostTrainingJob:
        """A job from the API's SFT request."""
        return await self._create(draft(request))

    async def preference_optimize(self, request: wire.PreferenceOptimizeRequest) -> wire.PostTrainingJob:
        """A job from the API's DPO request."""
        return await self._create(draft(request))

    async def submit(self, body: Any) -> wire.PostTrainingJob:
        """A job from the body of a JobSpec."""
        return await self._create(Draft(body))

    async def validate(self, body: Any) -> wire.Validated:
        """All the checks of `submit`, and nothing else."""
        request = Draft(body)
        spec = await self._checked(request)
        counted = await self._read_rows(request, spec, None)
        held_out = None
        if isinstance(spec, TrainingSpec):
            held_out = counted.get("validation", None if spec.options.validation_split > 0 else 0)
        return wire.Validated(
            spec=spec.model_dump(mode="json"),
            train_rows=counted.get("train", 0),
            validation_rows=held_out,
            rows=counted,
        )

    async def _create(self, request: Draft) -> wire.PostTrainingJob:
        spec = await self._checked(request)
        owner = _owner()
        if isinstance(spec, ExportSpec):  # an administrator may ask for it, and it is the job's owner's all the same
            owner = (await asyncio.to_thread(self.store.get, spec.of, None)).owner
        staging = self._staging / uuid.uuid4().hex
        try:
            await asyncio.to_thread((staging / "data").mkdir, mode=0o700, parents=True)
            await self._read_rows(request, spec, JobFolder(staging))
            job = await asyncio.to_thread(self._commit, spec, owner, staging)
        except Exception as error:
            # Before what was staged makes room again. Rows, spec and store each fail in their own way.
            no_room = None if isinstance(error, MoeError) else disk.full_by(error, self.config.state_dir)
            if no_room is not None:
                raise NoRoom(f"{no_room}; the job was not taken") from error
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)  # nothing is there, once it has become the job's folder
        await asyncio.to_thread(self._caretaker.see_to_jobs)
        self._telemetry.submitted(job)
        log.info("job %s: %s of %s, scheduled", job.id, job.recipe, job.model)
        return wire.PostTrainingJob(job_uuid=job.id)

    async def _checked(self, request: Draft) -> JobSpec:
        """The job in full, its names and places resolved; all but its rows is checked."""
        if not isinstance(request.body, dict):
            raise InvalidInput("the body", request.body, A_BODY)
        try:
            spec = JOB_SPEC.validate_python(self.config.defaults.under(request.body))
        except ValidationError as error:
            raise invalid_body(error.errors(), None, request.name, request.reworded) from None
        spec = placement.executed(request, spec, self.config)
        if isinstance(spec, ExportSpec):
            return await asyncio.to_thread(self._exporting, request, spec, self._whose("update"))
        return await asyncio.to_thread(self._placed, request, spec, self._whose("read"))

    def _exporting(self, request: Draft, spec: ExportSpec, whose: str | None) -> ExportSpec:
        named = spec.model_copy(update={"job_uuid": self._named(spec)})
        return exports.resolved(named, self.store.get(spec.of, whose), request, self.config)

    def _placed(self, request: Draft, spec: LoadingSpec, whose: str | None) -> JobSpec:
        return placement.placed(request, spec, self._named(spec), self.config, self.store, whose)

    def _named(self, spec: JobSpec) -> str:
        job_id = spec.job_uuid or f"{spec.recipe}-{uuid.uuid4().hex[:12]}"
        self._must_be_free(job_id)
        return job_id

    def _must_be_free(self, job_id: str) -> None:
        try:
            self.store.get(job_id, None)
        except NotFound:
            return
        raise Conflict(f"job_uuid: {job_id!r} is taken; leave it out, or choose another name")

    async def _read_rows(self, request: Draft, spec: JobSpec, folder: JobFolder | None) -> dict[str, int]:
        """Check the rows of each of the job's data sets, and write them where there is a folder to write to."""
        counted = {}
        for source in spec.row_sources():
            with nullcontext() if folder is None else folder.rows(source.part).open("xb") as out:
                count = await rows.copy_rows(
                    self._deps, source.dataset_id, request.name(source.field), spec.recipe, source.format, out,
                    self.config.max_rows, source.answered, source.kind,
                )  # fmt: skip
            if count < source.least:
                raise InvalidInput(request.name(source.field), source.dataset_id, source.why_least)
            counted[source.part] = count
        return counted

    def _commit(self, spec: JobSpec, owner: str, staging: Path) -> Job:
        """Make the staged folder the job's, and the job known; both or none."""
        assert spec.job_uuid is not None
        folder = self.config.jobs_dir / spec.job_uuid
        write_atomic(JobFolder(staging).spec, spec)
        with self._committing():
            self._must_be_free(spec.job_uuid)
            if folder.exists():  # a server died between the two steps below: no store knows this folder
                shutil.rmtree(folder)
            staging.rename(folder)
            try:
                of = spec.of if isinstance(spec, ExportSpec) else None
                where, gpus = placement.executor_of(spec)
                return self.store.add(
                    NewJob(spec.job_uuid, owner, spec.recipe, spec.model, str(folder), gpus, of, where)
                )
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise

    @contextmanager
    def _committing(self) -> Iterator[None]:
        """One commit at a time over all processes that share the state folder: a folder without a row is an orphan."""
        with (self.config.jobs_dir / ".lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    # Requests about a job.

    async def jobs(self, limit: int, after: str | None) -> wire.ListPostTrainingJobsResponse:
        """The caller's jobs, newest first; `after` is the last one of the page before."""
        found = await asyncio.to_thread(self.store.list, self._whose("read"), limit + 1, after)
        return wire.ListPostTrainingJobsResponse(
            data=[views.line(job) for job in found[:limit]], has_more=len(found) > limit
        )

    async def status(self, job_id: str) -> wire.PostTrainingJobStatusResponse:
        """How a job stands."""
        return await self._about(job_id, lambda job: status.status(job, self.store))

    async def detail(self, job_id: str) -> wire.JobDetail:
        """A job whole."""
        return await self._about(job_id, lambda job: status.detail(job, self.store))

    async def artifacts(self, job_id: str) -> wire.PostTrainingJobArtifactsResponse:
        """What a job has left so far."""
        return await self._about(
            job_id,
            lambda job: wire.PostTrainingJobArtifactsResponse(
                job_uuid=job.id, checkpoints=exports.checkpoints(job, self.store)
            ),
        )

    async def export(self, job_id: str, body: Any) -> wire.PostTrainingJob:
        """A job that exports what `job_id` left, from the body of an `export` block."""
        await asyncio.to_thread(self.store.get, job_id, self._whose("update"))  # a stranger learns nothing of a body
        whole = {"recipe": exports.RECIPE, "of": job_id, "export": body}
        return await self._create(Draft(whole, {"of": "the job", "export": ""}))

    async def exports(self, job_id: str) -> wire.ListExportsResponse:
        """A job's exports, and how far each of their steps is."""
        return await self._about(job_id, lambda job: wire.ListExportsResponse(data=exports.standing(job, self.store)))

    async def artifact(self, job_id: str, name: str) -> wire.ArtifactFiles:
        """The files of an artifact."""
        return await self._about(job_id, lambda job: files.listing(job, self.store, name))

    async def artifact_file(self, job_id: str, name: str, path: str) -> files.File:
        """One file of an artifact."""
        return await self._about(job_id, lambda job: files.file(job, self.store, name, path))

    async def logs(self, job_id: str, tail: int, offset: int | None) -> wire.PostTrainingJobLogStream:
        """Lines of a job's output."""
        return await self._about(job_id, lambda job: views.log(job, tail, offset))

    async def follow(self, job_id: str, tail: int, offset: int | None) -> AsyncIterator[bytes]:
        """The output of a job as server-sent events; see `stream`."""
        whose = self._whose("read")

        def look(start: int | None) -> stream.Look:
            job = self.store.get(job_id, whose)  # before its output, so that none is missed at the end
            return stream.Look(job.state, views.log(job, tail, start))

        views.folder_of(await asyncio.to_thread(self.store.get, job_id, whose))
        return stream.output(look, offset)

    async def events(self, job_id: str, cursor: int, limit: int) -> wire.Events:
        """A page of a job's events."""
        return await self._about(job_id, lambda job: timeline.page(job.id, views.folder_of(job).events, cursor, limit))

    async def metrics(
        self, job_id: str, names: set[str] | None, since_step: int | None, limit: int
    ) -> wire.MetricSeries:
        """What a job's steps measured."""
        return await self._about(
            job_id, lambda job: timeline.metrics(job.id, views.folder_of(job).events, names, since_step, limit)
        )

    async def cancel(self, job_id: str) -> None:
        """Ask for a job to be cancelled; asking again changes nothing."""
        job = await asyncio.to_thread(self.store.request_cancel, job_id, self._whose("update"))
        if not job.state.ended:
            await asyncio.to_thread(self._caretaker.see_to_jobs)

    async def resume(self, job_id: str) -> wire.PostTrainingJob:
        """Let a cancelled or failed job go on from its last valid checkpoint; an export, with what is not done yet."""
        await asyncio.to_thread(self._resume, job_id, self._whose("update"))
        log.info("job %s: resumed", job_id)
        return wire.PostTrainingJob(job_uuid=job_id)

    def _resume(self, job_id: str, whose: str | None) -> None:
        job = self.store.get(job_id, whose)
        if job.state in (JobState.FAILED, JobState.CANCELLED):
            must_have_saved(job)
        self.store.resume(job_id, whose)  # has its own words for the other states
        self._caretaker.see_to_jobs()

    async def delete(self, job_id: str) -> wire.DeletedJob:
        """Forget a job that has ended, with its exports and their folders; a `checkpoint_dir` elsewhere stays."""
        return await asyncio.to_thread(self._delete, job_id, self._whose("delete"))

    def _delete(self, job_id: str, whose: str | None) -> wire.DeletedJob:
        elsewhere = views.places(self.store.get(job_id, whose))[1:]
        removed = [job.id for job in removal.remove(self.store, self.config, job_id, whose)]
        log.info("deleted: job %s", " ".join(removed))
        kept = [str(path) for path in elsewhere if path.exists()]
        return wire.DeletedJob(job_uuid=job_id, kept=kept, exports=removed[1:])

    async def health(self) -> wire.Health:
        """Whether jobs can be taken and run."""
        return await asyncio.to_thread(self._health)

    def _health(self) -> wire.Health:
        if not self.store.answers():
            return wire.Health(status="error", store="unreachable", supervisor="none", jobs={})
        alive = self.store.live_supervisor() is not None
        return wire.Health(status="ok", store="ok", supervisor="alive" if alive else "none", jobs=self.store.counts())

    async def exposition(self) -> str:
        """The store's figures for Prometheus.

        Raises:
            Forbidden: they are of all owners' jobs, and the caller may not read those.
        """
        if compat.principal() is not None and self._whose("read") is not None:
            raise Forbidden(
                "metrics count every owner's jobs; the access policy must permit you to read "
                f"{compat.JOB_RESOURCE}::*, as it does an administrator"
            )
        return await asyncio.to_thread(self._exposition)

    def _exposition(self) -> str:
        alive = self.store.live_supervisor() is not None
        return exposition.exposition(self.store.census(), now(), alive)

    def refused(self, method: str, route: str, status: int) -> None:
        """A request was answered with an error."""
        self._telemetry.refused(method, route, status)

    def _whose(self, action: compat.Action) -> str | None:
        """The owner whose jobs the caller may reach; None: everybody's."""
        return None if compat.may_reach_every_job(self._policy, action) else _owner()

    async def _about[Answer](self, job_id: str, view: Callable[[Job], Answer]) -> Answer:
        whose = self._whose("read")

        def look() -> Answer:
            return view(self.store.get(job_id, whose))

        return await asyncio.to_thread(look)


def _owner() -> str:
    """Whose jobs the caller's are. A principal may be a secret (OGX: the API key itself), so its hash is kept."""
    principal = compat.principal()
    return ANONYMOUS if principal is None else hashlib.sha256(principal.encode()).hexdigest()
