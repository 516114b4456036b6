"""`Sweeps`: creates, cancels and deletes sweeps of one service.

Every combination is checked like a job before anything is created. The rows are read once for all jobs that read them
in the same way, and the others get links to the files.
"""

import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from llama_stack_provider_moe.control.server import callers, hub_check, job_groups
from llama_stack_provider_moe.control.server.api_requests import Draft
from llama_stack_provider_moe.control.server.creation import Creation
from llama_stack_provider_moe.control.server.wire_sweeps import DeletedSweep, SubmittedSweep
from llama_stack_provider_moe.control.store import intake
from llama_stack_provider_moe.control.store.audit import Audit
from llama_stack_provider_moe.control.store.store import Job
from llama_stack_provider_moe.control.store.sweep_rows import NewSweep, SweepDetail
from llama_stack_provider_moe.control.supervisor.pruner import EXTRA, is_installed
from llama_stack_provider_moe.errors import InvalidInput, MoeError, NotFound
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec import DPOSpec, JobSpec, KTOSpec, TrainingSpec
from llama_stack_provider_moe.spec.sweeps import Chosen, SweepSpec, body_of, described
from llama_stack_provider_moe.spec.validation_errors import validated

NOT_ACCEPTED = "the sweep was not accepted"


class _Planned(NamedTuple):
    """A job of a sweep before it is created."""

    chosen: Chosen
    request: Draft
    spec: TrainingSpec


def _as_read(spec: TrainingSpec, chosen: Chosen) -> str:
    """The values of the swept settings as the job has them: 64 and "64" are one number."""
    document = spec.model_dump(mode="json")
    found: list[object] = []
    for path in chosen:
        value: object = document
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        found.append(value)
    return json.dumps(found, sort_keys=True)


class Sweeps:
    """The sweeps of one service.

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

    async def create(self, body: object, size_bytes: int) -> SubmittedSweep:
        """Create a sweep with all its jobs, or nothing."""
        asked = await self._guard.bodies.run(size_bytes, validated, SweepSpec, body)
        self._must_be_possible(asked)
        sweep_id = await self._guard.run(self._id_of, asked)
        planned = await self._planned(asked, sweep_id, size_bytes)
        owner = callers.owner()
        await self._guard.must_have_room(NOT_ACCEPTED)
        await self._guard.run(self._creation.quotas.must_have_left, owner, len(planned))
        async with self._creation.staged(NOT_ACCEPTED) as staging:
            folders = await self._with_rows(planned, staging)
            jobs = await self._guard.run(self._commit, asked, sweep_id, owner, planned, folders)
        self._audit.note(owner, "submit", sweep=sweep_id, jobs=len(jobs))
        await self._creation.accepted(jobs)
        notes = dict.fromkeys(note for each in planned for note in each.request.notes)
        return SubmittedSweep(sweep_uuid=sweep_id, jobs=[job.id for job in jobs], notes=list(notes))

    def _must_be_possible(self, asked: SweepSpec) -> None:
        most = self._config.limits.sweep_jobs
        if asked.jobs > most:
            expected = f"at most {most} jobs of a sweep (`limits.sweep_jobs` of this server); random draws some of them"
            raise InvalidInput("parameters", asked.jobs, expected)
        if asked.notify is not None:
            self._creation.must_be_told(asked.notify.url, "notify.url")
        if asked.halving is not None and not is_installed():
            raise InvalidInput("halving", asked.halving.pruner, f"null: this server has no Optuna ({EXTRA})")

    def _id_of(self, asked: SweepSpec) -> str:
        get = self._creation.store().sweeps.get
        return job_groups.free_id(asked.sweep_uuid, "sweep", lambda sweep_id: get(sweep_id, None))

    async def _planned(self, asked: SweepSpec, sweep_id: str, size_bytes: int) -> list[_Planned]:
        """Check the job of every combination; an error names the combination."""
        combinations = asked.combinations()
        digits = len(str(len(combinations) - 1))
        found: list[_Planned] = []
        models: set[str] = set()
        read: dict[str, Chosen] = {}
        for number, chosen in enumerate(combinations):
            try:
                body = body_of(asked.job, chosen)
                request = Draft({**body, "job_uuid": f"{sweep_id}-{number:0{digits}}"})
                spec = _comparable(await self._creation.resolved(request, size_bytes), asked)
                same = read.setdefault(_as_read(spec, chosen), chosen)
                if same is not chosen:
                    expected = f"values that differ; {described(same)} is the same job once it is read"
                    raise InvalidInput("parameters", described(chosen), expected)
                if spec.model not in models:
                    models.add(spec.model)
                    await hub_check.check(request, spec, self._config, self._guard)
            except (MoeError, ValueError) as error:
                raise job_groups.about(error, f"with {described(chosen)}") from error
            found.append(_Planned(chosen, request, spec))
        return found

    async def _with_rows(self, planned: list[_Planned], staging: Path) -> list[Path]:
        """Return a staged folder for each job, with its rows."""
        folders: list[Path] = []
        read: dict[str, Path] = {}
        for number, (chosen, request, spec) in enumerate(planned):
            folder = staging / str(number)
            await self._guard.run(self._config.privacy.make_folder, folder / "data")
            known = read.setdefault(_reading_of(spec), folder)
            if known is folder:
                try:
                    await self._creation.rows.read(request, spec, JobFolder(folder))
                except (InvalidInput, NotFound) as error:
                    if len(read) == 1:  # the same for every job, or the first one
                        raise
                    raise job_groups.about(error, f"with {described(chosen)}") from error
            else:
                await self._guard.in_state_dir(_link, known / "data", folder / "data")
            folders.append(folder)
        return folders

    def _commit(
        self, asked: SweepSpec, sweep_id: str, owner: str, planned: list[_Planned], folders: list[Path]
    ) -> list[Job]:
        jobs = [
            (self._creation.written(each.request, each.spec, owner, folder)._replace(sweep=sweep_id), each.chosen)
            for each, folder in zip(planned, folders, strict=True)
        ]
        plan = asked.model_dump(mode="json", exclude={"job", "sweep_uuid", "max_parallel"})
        plan["evaluations"] = max(each.spec.training.n_epochs for each in planned)
        new = NewSweep(sweep_id, owner, asked.max_parallel, plan, jobs)
        with intake.committing(self._config):
            for job, _ in jobs:  # or the folder of a job that took the name meanwhile would be set aside
                self._creation.must_be_free(job.id)
            self._creation.quotas.must_have_bytes(owner, *folders)
            group = intake.NewGroup.of_sweep(self._creation.store(), new)
            return intake.accept_group(self._creation.store(), group, folders, self._config.limits)

    async def cancel(self, sweep_id: str) -> SweepDetail:
        """Cancel every job of a sweep that waits or runs; a second request changes nothing."""
        store = self._creation.store()
        found = await self._guard.run(store.sweeps.request_cancel, sweep_id, self._creation.whose("update"))
        self._audit.note(callers.owner(), "cancel", sweep=sweep_id)
        if not found.found.state.ended:
            await self._wake()
        return found

    async def delete(self, sweep_id: str, force: bool) -> DeletedSweep:
        """Delete a sweep that has ended, and all its jobs.

        Args:
            sweep_id: the sweep.
            force: delete its jobs even if other jobs need their files.
        """
        deleted = await self._guard.run(self._delete, sweep_id, self._creation.whose("delete"), force)
        self._audit.note(callers.owner(), "delete", sweep=sweep_id, jobs=len(deleted.jobs))
        return deleted

    def _delete(self, sweep_id: str, whose: str | None, force: bool) -> DeletedSweep:
        store = self._creation.store()
        jobs = store.sweeps.get(sweep_id, whose).jobs.values()
        gone = job_groups.delete(store, self._config, f"sweep {sweep_id!r}", list(jobs), whose, force)
        return DeletedSweep(sweep_uuid=sweep_id, jobs=gone.jobs, kept=gone.kept, broken=gone.broken)


def _comparable(spec: JobSpec, asked: SweepSpec) -> TrainingSpec:
    """Return the job; raise InvalidInput unless the sweep's metric will be measured in it."""
    if not isinstance(spec, TrainingSpec):
        raise InvalidInput("job.recipe", spec.recipe, "a recipe that trains")
    if not spec.data.has_validation_sets and not spec.options.validation_split:
        expected = "more than 0, or job.data.validation_dataset_id: a sweep compares figures on held-out rows"
        raise InvalidInput("job.options.validation_split", spec.options.validation_split, expected)
    rewarded = isinstance(spec, DPOSpec) or (isinstance(spec, KTOSpec) and asked.metric.endswith("rewards/margins"))
    if "rewards/" in asked.metric and not rewarded:
        raise InvalidInput("metric", asked.metric, f"a figure that recipe {spec.recipe!r} measures")
    if asked.metric.endswith("mean_token_accuracy") and spec.recipe != "sft":
        raise InvalidInput("metric", asked.metric, f"a figure that recipe {spec.recipe!r} measures")
    return spec


def _reading_of(spec: TrainingSpec) -> str:
    """Everything that decides how a job's rows are read and checked: jobs that agree in it share the files."""
    options = spec.options.model_dump(mode="json", exclude={"seed"})
    sources = [repr(source) for source in spec.row_sources()]
    return json.dumps([spec.recipe, spec.model, sources, options], sort_keys=True)


def _link(source: Path, target: Path) -> None:
    for file in source.iterdir():
        os.link(file, target / file.name)
