"""Reads the routing report of a finished analysis for another job of the same owner."""

from pydantic import ValidationError

from llama_stack_provider_moe.control.server import files
from llama_stack_provider_moe.control.server.api_requests import Draft
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.errors import InvalidFile, InvalidInput, NotFound
from llama_stack_provider_moe.ground.small_files import read_small
from llama_stack_provider_moe.jobdir.reading import read_as
from llama_stack_provider_moe.spec import AblationSpec, Adapter, SafetyEvaluation
from llama_stack_provider_moe.spec.ablation import resolve_experts
from llama_stack_provider_moe.spec.evaluation import resolve_masks
from llama_stack_provider_moe.spec.routing import REPORT_FILE, RoutingReport, resolve_adapter
from llama_stack_provider_moe.spec.validation_errors import invalid_body

REPORT_LIMIT_BYTES = 64 << 20  # about 60 layers of 512 experts on 16 sets; parsing more would block the server


def with_experts(adapter: Adapter, job: Job, store: JobStore, request: Draft) -> Adapter:
    """Return `adapter` with the experts that its `from_analysis` selects from the report of `job`.

    Args:
        adapter: the requested adapter.
        job: the analysis that it names, which has completed and which the caller may read.
        store: the store that has the job.
        request: maps field names to the caller's names, for error texts.

    Raises:
        InvalidInput: see `routing_report` and `resolve_adapter`.
    """
    field = request.name("adapter.from_analysis")
    try:
        return resolve_adapter(adapter, routing_report(job, store, f"{field}.job"), field)
    except ValidationError as error:  # more rules than an adapter allows
        raise invalid_body(
            error.errors(include_url=False), Adapter, lambda path: request.name(f"adapter.{path}")
        ) from None


def with_masks(asked: SafetyEvaluation, job: Job, store: JobStore, request: Draft) -> SafetyEvaluation:
    """Return `asked` with the experts that its `masked_from_analysis` selects from the report of `job`.

    Args:
        asked: the requested evaluation.
        job: the analysis that it names, which has completed and which the caller may read.
        store: the store that has the job.
        request: maps field names to the caller's names, for error texts.

    Raises:
        InvalidInput: see `routing_report` and `resolve_masks`.
    """
    field = request.name("eval.masked_from_analysis")
    try:
        return resolve_masks(asked, routing_report(job, store, f"{field}.job"), field)
    except ValidationError as error:  # the masks of a layer are longer than the field allows
        raise invalid_body(
            error.errors(include_url=False), SafetyEvaluation, lambda path: request.name(f"eval.{path}")
        ) from None


def with_layer_experts(plan: AblationSpec, job: Job, store: JobStore, request: Draft) -> AblationSpec:
    """Return `plan` with the experts that its `from_analysis` selects from the report of `job`.

    Args:
        plan: the requested ablation.
        job: the analysis that it names, which has completed and which the caller may read.
        store: the store that has the job.
        request: maps field names to the caller's names, for error texts.

    Raises:
        InvalidInput: see `routing_report` and `resolve_experts`.
    """
    field = request.name("from_analysis")
    try:
        return resolve_experts(plan, routing_report(job, store, f"{field}.job"), field)
    except ValidationError as error:  # the experts of a layer are longer than the field allows
        raise invalid_body(error.errors(include_url=False), AblationSpec, request.name) from None


def routing_report(job: Job, store: JobStore, field: str) -> RoutingReport:
    """Return the report of a routing analysis, from the job's folder.

    Args:
        job: an analysis that has completed, and that the caller may read.
        store: the store that has the job.
        field: the caller's name for the field that names the job.

    Raises:
        InvalidInput: its report can't be read.
    """
    try:
        found = files.file(job, store, "routing", REPORT_FILE)
        return read_as(RoutingReport, read_small(found.path, REPORT_LIMIT_BYTES))
    except InvalidFile as error:
        raise InvalidInput(field, job.id, f"a job with a readable report; its {REPORT_FILE} {error.reason}") from None
    except (NotFound, OSError, ValidationError) as error:
        raise InvalidInput(field, job.id, f"a job with a readable report ({type(error).__name__})") from None
