"""Exports of a job: what may be exported, how far its exports are, and its artifacts together with theirs."""

import os
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from llama_stack_provider_moe.config import ProviderConfig
from llama_stack_provider_moe.errors import Conflict, Forbidden, InvalidInput
from llama_stack_provider_moe.host import views, wire
from llama_stack_provider_moe.host.convert import Draft
from llama_stack_provider_moe.jobs.executors.local import training_environment
from llama_stack_provider_moe.jobs.exports import steps_of
from llama_stack_provider_moe.jobs.folder import Artifact
from llama_stack_provider_moe.jobs.state import JobState
from llama_stack_provider_moe.jobs.store import Job, JobStore
from llama_stack_provider_moe.llama_cpp import find_toolchain
from llama_stack_provider_moe.spec import Exports, ExportSpec, TrainingSpec

RECIPE = "export"


class Listed(NamedTuple):
    """An artifact as it is listed with a job.

    Attributes:
        name: ends the URL of its files; the artifact's own, and where that is taken, `NAME@EXPORT`.
        artifact: what it is.
        maker: the job, or the export of it, in whose folder it lies.
    """

    name: str
    artifact: Artifact
    maker: Job


def resolved(spec: ExportSpec, parent: Job, request: Draft, config: ProviderConfig) -> ExportSpec:
    """`spec` with what the training job says of itself.

    Args:
        spec: an export.
        parent: the job that it names, which the caller may change.
        request: whose names of the fields errors have.
        config: the server's.

    Raises:
        InvalidInput: there is nothing to export, or not as asked.
        Conflict: the job has not completed, or lies elsewhere.
        NoToolchain, Forbidden: see `must_be_possible`.
    """
    field = request.name("of")
    if spec.model:
        raise InvalidInput(request.name("model"), spec.model, "nothing: it is the model that the job trained")
    trained = _spec_of(parent, field)
    if parent.state is not JobState.COMPLETED:
        raise Conflict(
            f"{field}: job {parent.id!r} is {parent.state.value}; only what a completed job leaves can be exported"
        )
    if Path(parent.folder).parent != config.jobs_dir:  # a store shared with a server that has another `state_dir`
        raise Conflict(
            f"{field}: job {parent.id!r} keeps its files in {parent.folder}, not under this server's state_dir"
        )
    left = {artifact.kind for artifact in parent.artifacts if Path(artifact.path).is_dir()}
    if not left & {"adapter", "model"}:
        raise InvalidInput(field, parent.id, "a job that left an adapter or a whole model, which is still there")
    if trained.adapter is None:
        prefix = request.name("export")
        try:
            spec.export.check_without_adapter(f"{prefix}." if prefix else "")
        except ValueError as error:
            raise Conflict(str(error)) from None
    must_be_possible(spec.export, request, config)
    return spec.model_copy(update={"model": trained.model}).resolved()


def must_be_possible(asked: Exports, request: Draft, config: ProviderConfig) -> None:
    """Raise where this server can't do what an `export` block asks for, whatever is trained.

    Raises:
        NoToolchain: GGUF files, without llama.cpp; the text names the command that installs it.
        Forbidden: an Ollama server, or a repository of the hub, that jobs may not push to.
    """
    if asked.gguf:
        find_toolchain(training_environment(os.environ, config))
    if asked.ollama is not None and asked.ollama.url not in config.exports.ollama_urls:
        field, allowed = request.name("export.ollama.url"), config.exports.ollama_urls
        raise Forbidden(
            f"{field}: {asked.ollama.url!r} is not among those that jobs of this server may push to "
            f"(`exports.ollama_urls`): {', '.join(map(repr, allowed)) or 'none'}"
        )
    if asked.push is not None and not config.exports.allow_push(asked.push.repo_id):
        field, allowed = request.name("export.push.repo_id"), config.exports.hub_repositories
        raise Forbidden(
            f"{field}: {asked.push.repo_id!r} is not among those that jobs of this server may push to "
            f"(`exports.hub_repositories`): {', '.join(map(repr, allowed)) or 'none'}"
        )


def _spec_of(job: Job, field: str) -> TrainingSpec:
    try:
        spec = views.folder_of(job).read_spec()
    except (OSError, ValidationError) as error:
        raise InvalidInput(field, job.id, f"a job whose spec.json can be read ({type(error).__name__})") from None
    if not isinstance(spec, TrainingSpec):
        raise InvalidInput(field, job.id, f"a job that trains; this one is of recipe {job.recipe!r}")
    return spec


def standing(job: Job, store: JobStore) -> list[wire.ExportJob]:
    """A job's exports, the newest first; of an export, itself."""
    return [_one(each) for each in ([job] if job.recipe == RECIPE else store.exports(job.id))]


def _one(job: Job) -> wire.ExportJob:
    return wire.ExportJob(
        job_uuid=job.id,
        status=job.state,
        reason=job.reason,
        scheduled_at=job.scheduled_at,
        completed_at=job.ended_at,
        steps=steps_of(views.folder_of(job), job.state, job.reason),
    )


def listed(job: Job, store: JobStore) -> list[Listed]:
    """What a job has left so far, then what its exports have, the newest first."""
    own = [Listed(_name(artifact, job), artifact, job) for artifact in views.artifacts(job)]
    taken = {each.name for each in own}
    for export in store.exports(job.id) if job.recipe != RECIPE else ():
        for artifact in views.artifacts(export):
            name = _name(artifact, export)
            own.append(Listed(name if name not in taken else f"{name}@{export.id}", artifact, export))
            taken.add(name)
    return own


def _name(artifact: Artifact, maker: Job) -> str:
    return artifact.identifier.removeprefix(f"{maker.id}/")


def checkpoints(job: Job, store: JobStore) -> list[wire.Checkpoint]:
    """What a job and its exports have left, as the API's checkpoints."""
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
