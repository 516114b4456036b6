"""What a finished job found out, read for another job of the same owner."""

from pydantic import ValidationError

from llama_stack_provider_moe.errors import Conflict, InvalidInput, NotFound
from llama_stack_provider_moe.host import files
from llama_stack_provider_moe.host.convert import Draft
from llama_stack_provider_moe.host.explain import invalid_body
from llama_stack_provider_moe.jobs.state import JobState
from llama_stack_provider_moe.jobs.store import Job, JobStore
from llama_stack_provider_moe.spec import Adapter, SafetyEvaluation
from llama_stack_provider_moe.spec.evaluation import resolve_masks
from llama_stack_provider_moe.spec.routing import REPORT_FILE, RoutingReport, resolve_adapter

REPORT_LIMIT_BYTES = 256 << 20  # some 60 layers of 1,024 experts on 16 sets


def with_experts(adapter: Adapter, job: Job, store: JobStore, request: Draft) -> Adapter:
    """`adapter` with the experts of its `from_analysis`, which `job` found.

    Args:
        adapter: as asked for.
        job: the one that it names, which the caller may read.
        store: that knows it.
        request: whose names of the fields errors have.

    Raises:
        InvalidInput, Conflict: see `routing_report` and `resolve_adapter`.
    """
    field = request.name("adapter.from_analysis")
    try:
        return resolve_adapter(adapter, routing_report(job, store, f"{field}.job"), field)
    except ValidationError as error:  # more rules than an adapter may have
        raise invalid_body(error.errors(), Adapter, lambda path: request.name(f"adapter.{path}")) from None


def with_masks(asked: SafetyEvaluation, job: Job, store: JobStore, request: Draft) -> SafetyEvaluation:
    """`asked` with the experts of its `masked_from_analysis`, which `job` found; arguments and errors as above."""
    field = request.name("eval.masked_from_analysis")
    try:
        return resolve_masks(asked, routing_report(job, store, f"{field}.job"), field)
    except ValidationError as error:  # masks of a layer that are too long a text
        raise invalid_body(error.errors(), SafetyEvaluation, lambda path: request.name(f"eval.{path}")) from None


def routing_report(job: Job, store: JobStore, field: str) -> RoutingReport:
    """The report of a routing analysis, out of the job's own folder.

    Args:
        job: one that the caller may read.
        store: that knows it.
        field: the caller's name for what named it.

    Raises:
        InvalidInput: it is another kind of job, or its report can't be read.
        Conflict: it has not completed.
    """
    if job.recipe != "routing_analysis":
        raise InvalidInput(field, job.id, f"a job of recipe 'routing_analysis'; this one is of {job.recipe!r}")
    if job.state is not JobState.COMPLETED:
        raise Conflict(f"{field}: job {job.id!r} is {job.state.value}; its experts are known once it has completed")
    try:
        found = files.file(job, store, "routing", REPORT_FILE)
        if found.stat.st_size > REPORT_LIMIT_BYTES:
            raise InvalidInput(field, job.id, f"a report of at most {REPORT_LIMIT_BYTES:,} bytes")
        return RoutingReport.model_validate_json(found.path.read_bytes())
    except (NotFound, OSError, ValidationError) as error:
        raise InvalidInput(field, job.id, f"a job whose report can be read ({type(error).__name__})") from None
