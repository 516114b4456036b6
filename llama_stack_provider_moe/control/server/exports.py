"""Exports of a job: which exports are possible, their progress, and the artifacts of a job and its exports."""

import os
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from llama_stack_provider_moe.control.server import serving, views, wire
from llama_stack_provider_moe.control.server.api_requests import Draft
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.control.supervisor.executors.local import training_environment
from llama_stack_provider_moe.errors import Conflict, Forbidden, InvalidInput
from llama_stack_provider_moe.jobdir.export_steps import ExportStep, StepState, steps_of
from llama_stack_provider_moe.jobdir.folder import Artifact
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.llama_cpp import find_toolchain
from llama_stack_provider_moe.spec import AblationSpec, Exports, ExportSpec, RewardSpec, TrainingSpec
from llama_stack_provider_moe.spec.reward_jobs import check_exports
from llama_stack_provider_moe.spec.server_config import ProviderConfig

RECIPE = "export"
# A job that leaves an adapter or a whole model to export.
MakingSpec = TrainingSpec | AblationSpec


class Listed(NamedTuple):
    """An artifact in the list of a job's artifacts.

    Attributes:
        name: the end of its URL: the artifact's own name, or `NAME@EXPORT` where another artifact has that name.
        artifact: the artifact.
        maker: the job, or the export of that job, whose folder has the artifact.
    """

    name: str
    artifact: Artifact
    maker: Job


def resolved(spec: ExportSpec, parent: Job, request: Draft, config: ProviderConfig, store: JobStore) -> ExportSpec:
    """Return `spec` with the model of the job that it exports filled in.

    Args:
        spec: an export.
        parent: the job that it names, which the caller may change.
        request: maps field names to the caller's names, for error texts.
        config: the server's configuration.
        store: has the job's other exports.

    Raises:
        InvalidInput: the job has nothing to export, or the request states fields that the job decides.
        Conflict: the job has not completed, its folder belongs to another server, or another export serves it.
        NoToolchain, Forbidden: see `possible`.
    """
    field = request.name("of")
    if spec.model:
        raise InvalidInput(request.name("model"), spec.model, "no value: an export uses the model of its job")
    if spec.model_from is not None:
        raise InvalidInput(request.name("model_from"), spec.model_from, "no value: an export uses that of its job")
    trained = spec_of(parent, field)
    if parent.state is not JobState.COMPLETED:
        raise Conflict(f"{field}: job {parent.id!r} is {parent.state.value}; you can export only completed jobs")
    if Path(parent.folder).parent != config.jobs_dir:  # the store is shared with a server with another `state_dir`
        raise Conflict(
            f"{field}: job {parent.id!r} keeps its files in {parent.folder}, outside this server's state_dir"
        )
    kinds = {artifact.kind for artifact in parent.artifacts if Path(artifact.path).is_dir()}
    if not kinds & {"adapter", "model"}:
        raise InvalidInput(field, parent.id, "a job whose adapter or whole model still exists")
    prefix = request.name("export")
    prefix = f"{prefix}." if prefix else ""
    try:
        if not leaves_adapter(trained):
            spec.export.check_without_adapter(prefix)
        if isinstance(trained, RewardSpec):
            check_exports(spec.export, prefix)
    except ValueError as error:
        raise Conflict(str(error)) from None
    if spec.export.serve and (other := serving.export_that_serves(parent, store)) is not None:
        raise Conflict(f"{request.name('export.serve')}: export {other.id!r} serves job {parent.id!r} already; delete "
                       "that export first")  # fmt: skip
    asked = possible(spec.export, leaves_adapter(trained), request, config)
    found = {"model": trained.model, "model_from": trained.model_from, "export": asked}
    return spec.model_copy(update=found).resolved()


def possible(asked: Exports, has_adapter: bool, request: Draft, config: ProviderConfig) -> Exports:
    """Return an `export` block with what serving needs; raise where this server can't run it.

    Args:
        asked: the block.
        has_adapter: whether the job leaves an adapter; else it leaves a whole model.
        request: maps field names to the caller's names, for error texts.
        config: the server's configuration.

    Raises:
        InvalidInput: it asks for serving, and this server has none, or none for such a job.
        NoToolchain: the block asks for GGUF files and llama.cpp is missing; the text has the command that installs it.
        Forbidden: jobs may not push to this Ollama server or hub repository.
    """
    asked = serving.completed(asked, has_adapter, request, config)
    if asked.gguf:
        find_toolchain(training_environment(os.environ, config))
    if asked.ollama is not None and asked.ollama.url not in config.exports.ollama_urls:
        field, allowed = request.name("export.ollama.url"), config.exports.ollama_urls
        raise Forbidden(
            f"{field}: jobs of this server may not push to {asked.ollama.url!r}; allowed "
            f"(`exports.ollama_urls`): {', '.join(map(repr, allowed)) or 'none'}"
        )
    if asked.push is not None and not config.exports.allow_push(asked.push.repo_id):
        field, allowed = request.name("export.push.repo_id"), config.exports.hub_repositories
        raise Forbidden(
            f"{field}: jobs of this server may not push to {asked.push.repo_id!r}; allowed "
            f"(`exports.hub_repositories`): {', '.join(map(repr, allowed)) or 'none'}"
        )
    return asked


def leaves_adapter(spec: MakingSpec) -> bool:
    """Whether a job leaves an adapter; else it leaves a whole model."""
    return spec.output == "lora" if isinstance(spec, AblationSpec) else spec.adapter is not None


def spec_of(job: Job, field: str) -> MakingSpec:
    """Return the spec of a job that trains or ablates; raise `InvalidInput` where it is unreadable or of another."""
    try:
        spec = views.folder_of(job).read_spec()
    except (OSError, ValidationError) as error:
        raise InvalidInput(field, job.id, f"a job with a readable spec.json ({type(error).__name__})") from None
    if not isinstance(spec, MakingSpec):
        raise InvalidInput(field, job.id, f"a job that trains or ablates; the recipe of this one is {job.recipe!r}")
    return spec


def exports_of(job: Job, store: JobStore) -> list[wire.ExportJob]:
    """Return a job's exports, newest first; for an export, the export itself."""
    return [_one(each) for each in ([job] if job.recipe == RECIPE else store.exports(job.id))]


def _one(job: Job) -> wire.ExportJob:
    return wire.ExportJob(
        job_uuid=job.id,
        status=job.state,
        reason=job.reason,
        scheduled_at=job.scheduled_at,
        completed_at=job.ended_at,
        steps=_steps(job),
        served_as=serving.model_id_of(job),
    )


def _steps(job: Job) -> list[ExportStep]:
    try:
        return steps_of(views.folder_of(job), job.state, job.reason)
    except Forbidden as error:  # only this export is unreadable; the job and its other exports are shown
        return [ExportStep(name="exports.json", state=StepState.UNREADABLE, reason=str(error))]


def listed(job: Job, store: JobStore) -> list[Listed]:
    """Return the artifacts of a job so far, then those of its exports, newest first."""
    own = [Listed(_name(artifact, job), artifact, job) for artifact in views.artifacts(job)]
    taken = {each.name for each in own}
    for export in store.exports(job.id) if job.recipe != RECIPE else ():
        try:
            made = views.artifacts(export)
        except Forbidden:  # `_steps` reports it
            continue
        for artifact in made:
            name = _name(artifact, export)
            own.append(Listed(name if name not in taken else f"{name}@{export.id}", artifact, export))
            taken.add(name)
    return own


def _name(artifact: Artifact, maker: Job) -> str:
    return artifact.identifier.removeprefix(f"{maker.id}/")


def checkpoints(job: Job, store: JobStore) -> list[wire.Checkpoint]:
    """Return the artifacts of a job and its exports, as the API's checkpoints."""
    return [
        wire.Checkpoint(
            identifier=f"{job.id}/{name}",
            created_at=artifact.created_at,
            epoch=artifact.epoch,
            post_training_job_id=maker.id,
            path=artifact.path,
            training_metrics=artifact.metrics,
            kind=artifact.kind,
            step=artifact.step,
            bytes=artifact.bytes,
            name=name,
            sha256=artifact.sha256,
            verification=artifact.verification,
        )
        for name, artifact, maker in listed(job, store)
    ]
