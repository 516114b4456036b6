"""Decides whether a job that ended can be resumed."""

from pathlib import Path

from pydantic import ValidationError

from llama_stack_provider_moe.control.server import exports, views
from llama_stack_provider_moe.control.server.submissions import Resumes
from llama_stack_provider_moe.control.store import references
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.errors import Conflict, InvalidInput, NotFound
from llama_stack_provider_moe.jobdir import checkpoint_index
from llama_stack_provider_moe.jobdir.export_steps import StepState, read_steps
from llama_stack_provider_moe.spec import JOB_SPEC, JobSpec, TrainingSpec
from llama_stack_provider_moe.spec.moe import ExpertsBackend
from llama_stack_provider_moe.spec.validation_errors import invalid_body


def must_be_resumable(job: Job) -> Resumes:
    """Return where a job that ended resumes from; raise `Conflict` where it can't be resumed.

    A job resumes from a complete checkpoint, or from the beginning if it saved none. If it saved checkpoints but none
    is complete, its owner must know about the loss, so it does not start over. An export needs no checkpoint.
    """
    folder = views.folder_of(job)
    if job.recipe == exports.RECIPE:
        done = any(step.state is StepState.COMPLETED for step in read_steps(folder))
        return "from_completed_steps" if done else "from_beginning"
    found = checkpoint_index.checkpoint_folders(folder, _spec(job))
    if not found:
        return "from_beginning"
    reasons = []
    for path in found:
        why = checkpoint_index.verify(path)
        if why is None:
            return "from_checkpoint"
        reasons.append(f"{path.name}: {why}")
    why_not = f"none of its checkpoints is complete ({'; '.join(reasons[:3])})"
    raise Conflict(f"job {job.id!r} can't be resumed: {why_not}; submit it again")


def must_find_its_sources(job: Job, store: JobStore, jobs_dir: Path) -> None:
    """Raise `Conflict` where the job needs a model or an adapter of another job that no longer exists.

    Args:
        job: a job that ended, of any recipe.
        store: the store that has the jobs.
        jobs_dir: the folder with the folders of all jobs.
    """
    lost = references.missing(_spec(job), jobs_dir)
    if not lost:
        return
    reasons = []
    for job_id, path in lost:
        try:
            store.get(job_id, job.owner)
        except NotFound:
            reasons.append(f"it needs files of job {job_id!r}, which was deleted")
        else:
            reasons.append(f"it needs {Path(path).name!r} of job {job_id!r}, which no longer exists")
    raise Conflict(f"job {job.id!r} can't be resumed: {'; '.join(dict.fromkeys(reasons))}; submit it again with "
                   "a model that exists")  # fmt: skip


def must_be_valid_with(job: Job, backend: ExpertsBackend) -> None:
    """Refuse a backend for a job that would not have been accepted with it.

    Raises:
        InvalidBody: another setting of the job rules it out.
        InvalidInput: the job trains nothing.
    """
    spec = _spec(job)
    if not isinstance(spec, TrainingSpec):
        raise InvalidInput("moe.experts_backend", backend, f"no value: a job of recipe {spec.recipe} does not train")
    body = spec.model_dump(mode="json")
    body["moe"]["experts_backend"] = backend
    try:
        JOB_SPEC.validate_python(body)
    except ValidationError as error:
        raise invalid_body(error.errors(include_url=False), None) from None


def _spec(job: Job) -> JobSpec:
    try:
        return views.folder_of(job).read_spec()
    except FileNotFoundError:
        raise Conflict(f"job {job.id!r} can't be resumed: its spec.json is gone; submit it again") from None
    except ValidationError:
        raise Conflict(f"job {job.id!r} can't be resumed: its spec.json is damaged; submit it again") from None
