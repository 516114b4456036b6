"""Reads the routing report of a finished analysis for another job of the same owner."""

from collections.abc import Callable

from pydantic import ValidationError

from llama_stack_provider_moe.control.server import files
from llama_stack_provider_moe.control.server.api_requests import Draft
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.errors import InvalidFile, InvalidInput, NotFound
from llama_stack_provider_moe.ground.small_files import read_small
from llama_stack_provider_moe.jobdir.reading import read_as
from llama_stack_provider_moe.spec import AblationSpec, Adapter, SafetyEvaluation
from llama_stack_provider_moe.spec.ablation import resolve_experts
from llama_stack_provider_moe.spec.blocks import Block
from llama_stack_provider_moe.spec.evaluation import resolve_masks
from llama_stack_provider_moe.spec.routing import REPORT_FILE, RoutingReport, resolve_adapter
from llama_stack_provider_moe.spec.validation_errors import invalid_body

REPORT_LIMIT_BYTES = 64 << 20  # about 60 layers of 512 experts on 16 sets; parsing more would block the server


# Recipe -> the artifact that has its routing report.
REPORTING = {"routing_analysis": "routing", "ablation_measure": "measurements"}


def with_experts(adapter: Adapter, job: Job, store: JobStore, request: Draft) -> Adapter:
    """Return `adapter` with the experts that its `from_analysis` selects from the report of `job`; see `_selected`."""
    return _selected(adapter, "adapter.from_analysis", job, store, request, resolve_adapter)


def with_masks(asked: SafetyEvaluation, job: Job, store: JobStore, request: Draft) -> SafetyEvaluation:
    """Return `asked` with the experts that its `masked_from_analysis` selects; see `_selected`."""
    return _selected(asked, "eval.masked_from_analysis", job, store, request, resolve_masks)


def with_layer_experts(plan: AblationSpec, job: Job, store: JobStore, request: Draft) -> AblationSpec:
    """Return `plan` with the experts that its `from_analysis` selects; see `_selected`."""
    return _selected(plan, "from_analysis", job, store, request, resolve_experts)


def _selected[B: Block](
    asked: B, path: str, job: Job, store: JobStore, request: Draft, resolve: Callable[[B, RoutingReport, str], B]
) -> B:
    """Return a block with the experts that one of its fields selects from the report of `job`.

    Args:
        plan: the requested ablation.
        job: the analysis that it names, which has completed and which the caller may read.
        store: the store that has the job.
        request: maps field names to the caller's names, for error texts.
        resolve: makes the block of itself, the report, and the caller's name of the field.

    Raises:
        InvalidInput: see `routing_report` and `resolve_experts`.
    """
    field, above = request.name(path), path.rpartition(".")[0]
    prefix = f"{above}." if above else ""
    try:
        return resolve(asked, routing_report(job, store, f"{field}.job"), field)
    except ValidationError as error:  # more than the fields of the block allow
        raise invalid_body(
            error.errors(include_url=False),
            type(asked),
            lambda name: request.name(prefix + name),
        ) from None


def routing_report(job: Job, store: JobStore, field: str) -> RoutingReport:
    """Return the report of a routing analysis, or of the rows of a measurement, from the job's folder.

    Args:
        job: an analysis that has completed, and that the caller may read.
        store: the store that has the job.
        field: the caller's name for the field that names the job.

    Raises:
        InvalidInput: its report can't be read.
    """
    artifact = REPORTING[job.recipe]
    try:
        found = files.file(job, store, artifact, REPORT_FILE)
        return read_as(RoutingReport, read_small(found.path, REPORT_LIMIT_BYTES))
    except InvalidFile as error:
        raise InvalidInput(field, job.id, f"a job with a readable report; its {REPORT_FILE} {error.reason}") from None
    except (NotFound, OSError, ValidationError) as error:
        which = "" if artifact == "routing" else " of a model with experts"
        raise InvalidInput(field, job.id, f"a job{which} with a readable report ({type(error).__name__})") from None
