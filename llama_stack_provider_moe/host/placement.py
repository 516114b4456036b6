"""What a job names (models, folders, other jobs' results) -> what it gets, as far as the caller may have it."""

from collections.abc import Callable
from typing import Any

from llama_stack_provider_moe.config import ProviderConfig
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.host import exports, places, reports
from llama_stack_provider_moe.host.convert import Draft
from llama_stack_provider_moe.jobs.store import JobStore
from llama_stack_provider_moe.spec import JobSpec, LoadingSpec, RoutingAnalysisSpec, SafetyEvaluation, TrainingSpec
from llama_stack_provider_moe.spec.blocks import ExecutorName

NO_UNSLOTH = (
    "'hf': this server has no environment with Unsloth. Its operator makes one (a virtual environment, `pip install -r "
    "constraints-unsloth.txt`, this package with --no-deps) and names its interpreter in `unsloth_python`"
)


def placed(
    request: Draft, spec: LoadingSpec, job_id: str, config: ProviderConfig, store: JobStore, whose: str | None
) -> JobSpec:
    """The spec with every name resolved: real folders, and experts and masks out of the analyses it names.

    Args:
        request: whose names of the fields errors have.
        spec: as asked for.
        job_id: what the job will be called.
        config: says where models and checkpoints may lie.
        store: knows the jobs that are named.
        whose: the owner whose jobs may be named; None: anybody's.

    Raises:
        InvalidInput, Forbidden, NotFound, Conflict: what is named can't be had, or not by the caller.
        NoToolchain: an export asks for files that can't be written here yet.
    """

    def may_use_job(name: str) -> None:
        store.get(name, whose)

    found: dict[str, Any] = {
        "job_uuid": job_id,
        "model": places.resolve_model(spec.model, request.name("model"), config, may_use_job),
    }
    if isinstance(spec, RoutingAnalysisSpec):
        if spec.adapter_folder is not None:
            found["adapter_folder"] = places.resolve_adapter_folder(
                spec.adapter_folder, request.name("adapter_folder"), config, may_use_job
            )
        return spec.model_copy(update=found)
    if spec.loader == "unsloth" and config.unsloth_python is None:
        raise InvalidInput(request.name("loader"), spec.loader, NO_UNSLOTH)
    if spec.export is not None:
        exports.must_be_possible(spec.export, request, config)
    if spec.adapter is not None and spec.adapter.from_analysis is not None:
        job = store.get(spec.adapter.from_analysis.job, whose)
        found["adapter"] = reports.with_experts(spec.adapter, job, store, request)
    if spec.checkpoint_dir is not None:
        found["checkpoint_dir"] = places.resolve_checkpoint_dir(
            spec.checkpoint_dir, job_id, request.name("checkpoint_dir"), config
        )
    if spec.eval is not None:
        asked = spec.eval
        if asked.masked_from_analysis is not None:
            job = store.get(asked.masked_from_analysis.job, whose)
            asked = reports.with_masks(asked, job, store, request)
        found["eval"] = _judged(request, asked, config, may_use_job)
    return spec.model_copy(update=found)


def executed(request: Draft, spec: JobSpec, config: ProviderConfig) -> JobSpec:
    """The spec with its executor decided.

    Raises:
        InvalidInput: there is none of that name here, or it has not as many machines.
    """
    asked = spec.resources
    default: ExecutorName = config.executors.default if isinstance(spec, TrainingSpec) else "local"
    name = asked.executor or default
    if name == "ray" and config.executors.ray is None:
        expected = "'local', for this server knows no Ray cluster (`executors.ray`)"
        raise InvalidInput(request.name("resources.executor"), name, expected)
    if name == "ray" and isinstance(spec, TrainingSpec) and spec.loader == "unsloth":
        expected = "'hf' on Ray, whose nodes have one environment; or resources.executor 'local'"
        raise InvalidInput(request.name("loader"), spec.loader, expected)
    if name == "local" and asked.nodes > 1:
        expected = "1 on the supervisor's machine; several by resources.executor 'ray'"
        raise InvalidInput(request.name("resources.nodes"), asked.nodes, expected)
    return spec.model_copy(update={"resources": asked.model_copy(update={"executor": name})})


def executor_of(spec: JobSpec) -> tuple[str | None, int | None]:
    """What the store is told of a spec that was decided on: its executor, and the devices that it takes here."""
    return (None, spec.resources.gpus) if spec.resources.executor != "ray" else ("ray", 0)


def _judged(
    request: Draft, asked: SafetyEvaluation, config: ProviderConfig, may_use_job: Callable[[str], None]
) -> SafetyEvaluation:
    if asked.judge.model is None:
        return asked
    model = places.resolve_model(asked.judge.model, request.name("eval.judge.model"), config, may_use_job)
    return asked.model_copy(update={"judge": asked.judge.model_copy(update={"model": model})})
