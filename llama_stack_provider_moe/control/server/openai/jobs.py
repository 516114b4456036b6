"""Our jobs as OpenAI's objects: jobs that train, and their checkpoints."""

import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime

from llama_stack_provider_moe.control.server import serving, views
from llama_stack_provider_moe.control.server.newest_events import newest_events
from llama_stack_provider_moe.control.server.openai import ids, objects, reinforcement, results
from llama_stack_provider_moe.control.server.openai.methods import BASE_LR, METHODS, multiplier
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.errors import Forbidden, InvalidInput, NotFound
from llama_stack_provider_moe.jobdir.events import Failed, Step
from llama_stack_provider_moe.jobdir.folder import Artifact
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec import DPOSpec, GRPOSpec, TrainingSpec
from llama_stack_provider_moe.spec.server_config import ProviderConfig

PAGE_JOBS = 200  # of the store, while a list is filtered
UNREADABLE = "unreadable"
_STATUS: Mapping[JobState, objects.FineTuningStatus] = {
    JobState.SCHEDULED: "queued",
    JobState.IN_PROGRESS: "running",
    JobState.COMPLETED: "succeeded",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
    JobState.UNREADABLE: "failed",
}
_PARAMS = {"DataError": "training_file", "ModelError": "model", "LayoutError": "model"}
# None: any; a mapping: those with all these pairs, the empty one: those without any.
type Wanted = Mapping[str, str] | None


def training_job(store: JobStore, whose: str | None, job_id: str) -> Job:
    """Return a job that trains.

    Raises:
        NotFound: there is no such job, it belongs to another owner than `whose`, or it trains nothing.
    """
    job = store.get(job_id, whose)
    if job.recipe not in BASE_LR:
        raise NotFound(f"job {job_id!r} is not a fine-tuning job: its recipe is {job.recipe!r}")
    return job


def page(
    store: JobStore, whose: str | None, config: ProviderConfig, limit: int, after: str | None, wanted: Wanted
) -> objects.FineTuningJobs:
    """Return a page of the jobs that train, newest first.

    Args:
        store: the store.
        whose: the owner of the jobs; None for all owners.
        config: the server's configuration.
        limit: largest number of jobs.
        after: our id of the last job of the previous page.
        wanted: the metadata of the jobs.
    """
    found: list[Job] = []
    while len(found) <= limit and (jobs := store.list(whose, PAGE_JOBS, after)):
        found += [job for job in jobs if job.recipe in BASE_LR and _fits(job, wanted)]
        after = jobs[-1].id
    shown = [described(job, serving.of(job, store, config)) for job in found[:limit]]
    return objects.FineTuningJobs(data=shown, has_more=len(found) > limit)


def _fits(job: Job, wanted: Wanted) -> bool:
    if wanted is None:
        return True
    spec = _spec(job)
    if spec is None:
        return False
    return wanted.items() <= spec.metadata.items() if wanted else not spec.metadata


def described(job: Job, served: serving.Served | None) -> objects.FineTuningJob:
    """Return a job as OpenAI's object; a job with damaged files has an `error` that says so.

    Args:
        job: the job.
        served: how far its serving is: until it has ended, the job is still running.
    """
    spec = _spec(job)
    hyperparameters = objects.FineTuningHyperparameters() if spec is None else _hyperparameters(spec)
    is_pending = served is not None and served.state == "pending"
    has_succeeded = job.state is JobState.COMPLETED and not is_pending
    ended_at = (
        None if is_pending or not job.state.ended else _latest(job.ended_at, None if served is None else served.at)
    )
    return objects.FineTuningJob(
        id=ids.of_job(job.id),
        created_at=_seconds(job.scheduled_at),
        finished_at=None if ended_at is None else _seconds(ended_at),
        estimated_finish=_if_readable(_estimated_finish, job) if job.state is JobState.IN_PROGRESS else None,
        model=job.model,
        fine_tuned_model=(served is not None and served.model) or job.id if has_succeeded else None,
        organization_id=f"org-{job.owner[:24]}",
        status="running" if is_pending else _STATUS[job.state],
        hyperparameters=hyperparameters,
        method=None if spec is None else _method(spec, hyperparameters),
        seed=0 if spec is None else spec.options.seed,
        training_file=UNREADABLE if spec is None else ",".join(spec.data.training_ids),
        validation_file=None if spec is None else spec.data.validation_dataset_id,
        result_files=results.result_files(job) if has_succeeded else [],
        trained_tokens=_if_readable(results.trained_tokens, job) if has_succeeded else None,
        error=_error(job, is_readable=spec is not None),
        integrations=None if spec is None else _integrations(spec),
        metadata=None if spec is None else spec.metadata or None,
    )


def _latest(*times: datetime | None) -> datetime | None:
    return max((time for time in times if time is not None), default=None)


def _seconds(time: datetime) -> int:
    return int(time.timestamp())


def _spec(job: Job) -> TrainingSpec | None:
    """What a job was asked to do; None if its file is damaged or missing, so that lists still work."""
    try:
        spec = views.folder_of(job).read_spec()
    except (OSError, ValueError, Forbidden):
        return None
    return spec if isinstance(spec, TrainingSpec) else None


def _if_readable(read: Callable[[Job], int | None], job: Job) -> int | None:
    try:
        return read(job)
    except (OSError, Forbidden):
        return None


def _hyperparameters(spec: TrainingSpec) -> objects.FineTuningHyperparameters:
    rows = spec.training.batch_size * spec.training.gradient_accumulation_steps * spec.resources.ranks
    return objects.FineTuningHyperparameters(
        n_epochs=spec.training.n_epochs,
        batch_size=reinforcement.prompts_of_a_step(spec) if isinstance(spec, GRPOSpec) else rows,
        learning_rate_multiplier=multiplier(spec.recipe, spec.optimizer.lr),
    )


def _method(spec: TrainingSpec, found: objects.FineTuningHyperparameters) -> objects.FineTuningMethod | None:
    if isinstance(spec, DPOSpec):
        with_beta = objects.DPOHyperparameters(**found.model_dump(), beta=spec.beta)
        return objects.FineTuningMethod(type="dpo", dpo=objects.DPOMethod(hyperparameters=with_beta))
    if isinstance(spec, GRPOSpec):
        return reinforcement.described(spec, found)
    if spec.recipe not in METHODS:
        return None
    return objects.FineTuningMethod(type="supervised", supervised=objects.SupervisedMethod(hyperparameters=found))


def _integrations(spec: TrainingSpec) -> list[objects.FineTuningIntegration] | None:
    wandb = spec.trackers.wandb
    if wandb is None:
        return None
    return [objects.FineTuningIntegration(wandb=objects.WandbRun(project=wandb.project, entity=wandb.entity))]


def _estimated_finish(job: Job) -> int | None:
    step = newest_events(views.folder_of(job).events).get("step")
    if not isinstance(step, Step) or step.eta_s is None or not math.isfinite(step.eta_s):
        return None
    return int(step.time.timestamp() + step.eta_s)


def _error(job: Job, is_readable: bool) -> objects.FineTuningFailure | None:
    if job.state is JobState.FAILED:
        code, param = "job_failed", None
        try:
            failed = newest_events(views.folder_of(job).events).get("failed")
        except (OSError, Forbidden):
            failed = None
        if isinstance(failed, Failed):
            code = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", failed.error).lower()
            param = _PARAMS.get(failed.error)
        return objects.FineTuningFailure(code=code, message=job.reason or "the job failed", param=param)
    if job.unreadable is not None:
        return objects.FineTuningFailure(code=UNREADABLE, message=job.unreadable, param=None)
    if not is_readable:
        message = "spec.json of this job is missing, damaged or not its own, so what it was asked to do is unknown"
        return objects.FineTuningFailure(code=UNREADABLE, message=message, param=None)
    return None


def checkpoints(job: Job, limit: int, after: str | None) -> objects.FineTuningCheckpoints:
    """Return the checkpoints of a job, newest first.

    Args:
        job: the job.
        limit: largest number of checkpoints.
        after: id of the last checkpoint of the previous page.

    Raises:
        InvalidInput: the job has no checkpoint `after`.
    """
    found = [_checkpoint(job, each) for each in reversed(views.artifacts(job)) if each.kind == "checkpoint"]
    start = 0
    if after is not None:
        places = [place for place, each in enumerate(found) if each.id == after]
        if not places:
            raise InvalidInput("after", after, "the id of a checkpoint of this job")
        start = places[0] + 1
    shown = found[start : start + limit]
    return objects.FineTuningCheckpoints(
        data=shown,
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
        has_more=len(found) > start + limit,
    )


def _checkpoint(job: Job, artifact: Artifact) -> objects.FineTuningCheckpoint:
    held_out = artifact.metrics
    return objects.FineTuningCheckpoint(
        id=ids.CHECKPOINT + artifact.identifier.replace("/", "-"),
        created_at=_seconds(artifact.created_at),
        fine_tuned_model_checkpoint=artifact.identifier,
        fine_tuning_job_id=ids.of_job(job.id),
        step_number=artifact.step,
        metrics=objects.FineTuningCheckpointMetrics(
            step=artifact.step,
            train_loss=None if held_out is None else held_out.train_loss,
            full_valid_loss=None if held_out is None else held_out.validation_loss,
        ),
    )
