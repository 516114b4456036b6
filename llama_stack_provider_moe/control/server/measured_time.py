"""How long a job will train, from the speed of the owner's completed jobs that are like it."""

from pydantic import ValidationError

from llama_stack_provider_moe.control.server import views
from llama_stack_provider_moe.control.server.newest_events import newest_events
from llama_stack_provider_moe.control.store.job_filter import JobFilter
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.errors import Forbidden
from llama_stack_provider_moe.jobdir.events import Finished, Step
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec import JobSpec, TrainingSpec
from llama_stack_provider_moe.spec.run_time import RunTime, rows_a_step, rows_in_run, run_time

SEEN = 50  # newest completed jobs of the model that are looked at
USED = 5


def measured(spec: JobSpec, model: str, store: JobStore, owner: str, rows: int | None) -> RunTime | None:
    """Return the time that a job will take; None if no job like it has completed, or it does not train.

    Jobs are alike with the same owner, recipe and model, as many processes on the same kind of device, and an adapter
    or none.

    Args:
        spec: the job.
        model: its model, as lists show it.
        store: has the other jobs.
        owner: the caller.
        rows: of a whole epoch; None if unknown.
    """
    if not isinstance(spec, TrainingSpec):
        return None
    chosen = JobFilter(states=(JobState.COMPLETED,), recipe=spec.recipe, model=model)
    found: dict[str, tuple[float, float]] = {}
    for job in store.list(owner, SEEN, None, chosen):
        speed = _speed(job, spec)
        if speed is not None:
            found[job.id] = speed
        if len(found) == USED:
            break
    if not found:
        return None
    speeds = sorted(found.values())
    tokens_per_s, tokens_a_row = speeds[len(speeds) // 2]
    basis = f"measured on {', '.join(found)}: {tokens_a_row:,.0f} tokens a row"
    return run_time(tokens_per_s, rows_in_run(spec, rows), tokens_a_row, "measured", basis)


def _speed(job: Job, like: TrainingSpec) -> tuple[float, float] | None:
    """Tokens a second, and tokens a row, of a job; None if it is not like another, or did not say."""
    try:
        folder = views.folder_of(job)
        spec = folder.read_spec()
        newest = newest_events(folder.events)
    except (OSError, ValidationError, Forbidden):  # an old job, whose files can't be read any more
        return None
    finished, step = newest.get("finished"), newest.get("step")
    if not isinstance(spec, TrainingSpec) or not isinstance(finished, Finished) or not isinstance(step, Step):
        return None
    own, other = spec.resources, like.resources
    if (own.gpus, own.ranks, spec.adapter is None) != (other.gpus, other.ranks, like.adapter is None):
        return None
    each, tokens = finished.throughput.get("tokens_per_s_per_device"), step.metrics.get("tokens")
    if not each or not tokens or not (0 < each < 1e12):  # NaN too
        return None
    return each * own.ranks, tokens / rows_a_step(spec)
