"""Resolves the names in a job (models, folders, other jobs' results), as far as the caller may use them."""

from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from llama_stack_provider_moe.control.server import adapter_start, allowed_paths, exports, model_names, reports
from llama_stack_provider_moe.control.server.api_requests import Draft
from llama_stack_provider_moe.control.server.grader_names import GraderNames
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.errors import InvalidInput, shorten
from llama_stack_provider_moe.spec import (
    JOB_SPEC,
    AblationSpec,
    Adapter,
    EditingSpec,
    GRPOSpec,
    InferenceJob,
    JobSpec,
    LoadingSpec,
    MixSpec,
    PlaygroundSpec,
    SafetyEvaluation,
    SurgerySpec,
    TrainingSpec,
)
from llama_stack_provider_moe.spec.blocks import ExecutorName
from llama_stack_provider_moe.spec.engines_config import engine_named
from llama_stack_provider_moe.spec.evaluated_job import EvaluatedJob
from llama_stack_provider_moe.spec.rewards import Reward
from llama_stack_provider_moe.spec.rl_engines import VllmServerEngine
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from llama_stack_provider_moe.spec.surgery import Surgery
from llama_stack_provider_moe.spec.validation_errors import A_BODY, invalid_body

# The jobs that name a model themselves; an export takes that of another job.
NamingSpec = LoadingSpec | EditingSpec
NO_UNSLOTH = (
    "'hf': this server has no environment with Unsloth. To add one, make a virtual environment, run `pip install -r "
    "constraints-unsloth.txt`, install this package with --no-deps, and set `unsloth_python` to its interpreter"
)


def resolve_names(
    request: Draft, spec: NamingSpec, job_id: str, config: ProviderConfig, store: JobStore, whose: str | None
) -> JobSpec:
    """Return the spec with every name resolved: real folders, and the experts and masks of the analyses it names.

    Args:
        request: maps field names to the caller's names, for error texts.
        spec: the requested job.
        job_id: the id of the new job.
        config: has the folders for models and checkpoints.
        store: the store that has the named jobs.
        whose: the owner whose jobs the request may name; None for every owner's.

    Raises:
        InvalidInput, Forbidden, NotFound, Conflict: a named thing does not exist, or the caller may not use it.
        NoToolchain: an export asks for files that this server can't write yet.
    """
    if isinstance(spec, PlaygroundSpec):  # somebody sits in front of it
        request = replace(request, may_wait=False)
    names = model_names.Names(request, config, store, whose)
    found: dict[str, object] = {"job_uuid": job_id, **names.resolve_model_field(spec)}
    if isinstance(spec, AblationSpec):
        _measured(spec.measurements, "measurements", names)
        names.check_model_from(spec.model_from, [found["model"]])
        if spec.from_analysis is not None and (job := _analysis(spec.from_analysis.job, "from_analysis", names)):
            spec = reports.with_layer_experts(spec, job, store, request)
        found["eval"] = _evaluation(spec.eval, names, request, store)
        return spec.without_gpu().model_copy(update=found)
    if isinstance(spec, MixSpec):
        names.check_model_from(spec.model_from, [found["model"]])
        found["branches"] = [
            branch.model_copy(update={"model": names.whole_model(branch.model, f"branches.{at}.model")})
            if at in spec.kept
            else branch
            for at, branch in enumerate(spec.branches)
        ]
        return spec.without_gpu().model_copy(update=found)
    if isinstance(spec, SurgerySpec):
        names.check_model_from(spec.model_from, [found["model"]])
        return spec.without_gpu().model_copy(update={**found, "surgery": _surgery(spec.surgery, names)})
    if isinstance(spec, InferenceJob):
        if spec.adapter_folder is not None:
            folder, _, source = names.adapter(spec.adapter_folder, "adapter_folder")
            if source is not None and source.model != found["model"] and Path(folder).is_absolute():
                expected = f"{source.model!r}, the base of the adapter in {request.name('adapter_folder')}"
                raise InvalidInput(request.name("model"), found["model"], expected)
            found |= {"adapter_folder": str(folder), **model_names.as_trained(spec, source)}
        names.check_model_from(spec.model_from, [found["model"], found.get("adapter_folder")])
        return spec.model_copy(update=found)
    if spec.loader == "unsloth" and config.unsloth_python is None:
        raise InvalidInput(request.name("loader"), spec.loader, NO_UNSLOTH)
    if spec.export is not None:
        found["export"] = exports.possible(spec.export, found.get("adapter", spec.adapter) is not None, request, config)
    adapter = found.get("adapter", spec.adapter)
    if isinstance(adapter, Adapter) and adapter.from_analysis is not None:
        # A model that is an adapter has put `init_from` into it; the job gets both.
        if job := _analysis(adapter.from_analysis.job, "adapter.from_analysis", names):
            adapter = reports.with_experts(adapter, job, store, request)
        found["adapter"] = adapter
    if isinstance(adapter, Adapter) and adapter.init_from is not None:
        begun = spec.model_copy(update={"model": found["model"], "adapter": adapter})
        found |= adapter_start.resolved(begun, names, request)
    start = found.get("adapter")
    names.check_model_from(spec.model_from, [found["model"], start.init_from if isinstance(start, Adapter) else None])
    found |= {} if spec.model_from is None else {"model_from": spec.model_from}
    if spec.checkpoint_dir is not None:
        found["checkpoint_dir"] = allowed_paths.resolve_checkpoint_dir(
            spec.checkpoint_dir, job_id, request.name("checkpoint_dir"), config
        )
    if (named := spec.teacher_named()) is not None:
        field, teacher = named
        found |= spec.with_teacher(names.whole_model(teacher, field))
    if isinstance(spec, GRPOSpec):
        _check_engine(spec, request, config)
        found["reward"] = _rewards(spec, GraderNames(request, config, store, whose))
    found["eval"] = _evaluation(spec.eval, names, request, store)
    return spec.model_copy(update=found)


def _surgery(surgery: Surgery, names: model_names.Names) -> Surgery:
    """Return the surgery with the folder of the model that gives weights to an added expert."""
    if surgery.add is None or surgery.add.mlp_from is None:
        return surgery
    donor = names.whole_model(surgery.add.mlp_from, "surgery.add.mlp_from")
    return surgery.model_copy(update={"add": surgery.add.model_copy(update={"mlp_from": donor})})


def _check_engine(spec: GRPOSpec, request: Draft, config: ProviderConfig) -> None:
    """Check that the operator names the server that is to generate."""
    engine = spec.rl.engine
    if isinstance(engine, VllmServerEngine):
        engine_named(engine.server, config.engines, request.name("rl.engine.server"))


def _rewards(spec: GRPOSpec, graders: GraderNames) -> list[Reward]:
    return [
        reward.model_copy(update={"grader": graders.resolved(reward.grader, f"reward.{at}.grader")})
        for at, reward in enumerate(spec.reward)
    ]


def named_folders(spec: NamingSpec) -> str:
    """Return the folders that a job names, for an error text."""
    found = {field: getattr(spec, field, None) for field in ("model", "adapter_folder", "checkpoint_dir")}
    if isinstance(spec, TrainingSpec):
        found["adapter.init_from"] = None if spec.adapter is None else spec.adapter.init_from
        found |= dict([spec.teacher_named() or ("teacher", None)])
    if isinstance(spec, MixSpec):
        found |= {f"branches.{at}.model": spec.branches[at].model for at in spec.kept}
    if isinstance(spec, GRPOSpec):
        found |= spec.grader_models()
    if isinstance(spec, SurgerySpec):
        found["surgery.add.mlp_from"] = spec.surgery.added.mlp_from
    if isinstance(spec, EvaluatedJob):
        found["eval.judge.model"] = None if spec.eval is None else spec.eval.judge.model
    return ", ".join(f"{field} {shorten(value)}" for field, value in found.items() if value is not None)


def parse_spec(request: Draft, config: ProviderConfig) -> JobSpec:
    """Return the spec in a body, with the server's defaults and the executor filled in.

    Raises:
        InvalidInput: the body is not a valid spec, or this server can't run it.
    """
    if not isinstance(request.body, dict):
        raise InvalidInput("the body", request.body, A_BODY)
    try:
        spec = JOB_SPEC.validate_python(config.defaults.under(request.body))
    except ValidationError as error:
        raise invalid_body(error.errors(include_url=False), None, request.name, request.reworded) from None
    return resolve_executor(request, spec, config)


def resolve_executor(request: Draft, spec: JobSpec, config: ProviderConfig) -> JobSpec:
    """Return the spec with its executor filled in.

    Raises:
        InvalidInput: this server does not have that executor, or the executor can't run the job.
    """
    asked = spec.resources
    default: ExecutorName = config.executors.default if isinstance(spec, TrainingSpec) else "local"
    name = asked.executor or default
    if name == "ray" and config.executors.ray is None:
        expected = "'local', because this server has no Ray cluster (`executors.ray`)"
        raise InvalidInput(request.name("resources.executor"), name, expected)
    if name == "ray" and isinstance(spec, TrainingSpec) and spec.loader == "unsloth":
        expected = "'hf', because the nodes of a Ray cluster share one environment; or resources.executor 'local'"
        raise InvalidInput(request.name("loader"), spec.loader, expected)
    if name == "local" and asked.nodes > 1:
        expected = "1, because executor 'local' uses the supervisor's machine; for several, resources.executor 'ray'"
        raise InvalidInput(request.name("resources.nodes"), asked.nodes, expected)
    return spec.model_copy(update={"resources": asked.model_copy(update={"executor": name})})


def executor_of(spec: JobSpec) -> tuple[str | None, int | None]:
    """Return what the store records about a resolved spec: its executor, and the local GPUs that it needs."""
    return (None, spec.resources.gpus) if spec.resources.executor != "ray" else ("ray", 0)


def _analysis(job_id: str, path: str, names: model_names.Names) -> Job | None:
    return names.completed(job_id, f"{path}.job", tuple(reports.REPORTING), "its report is")


def _measured(job_id: str, path: str, names: model_names.Names) -> None:
    names.completed(job_id, path, ("ablation_measure",), "its measurements are")


def _evaluation(
    asked: SafetyEvaluation | None, names: model_names.Names, request: Draft, store: JobStore
) -> SafetyEvaluation | None:
    """Return the block `eval` with the masks of the analysis that it names, and a model of its judge."""
    if asked is None:
        return None
    masked = asked.masked_from_analysis
    if masked is not None and (job := _analysis(masked.job, "eval.masked_from_analysis", names)):
        asked = reports.with_masks(asked, job, store, request)
    if asked.ablated is not None:
        _measured(asked.ablated.measurements, "eval.ablated.measurements", names)
    return _judged(asked, names)


def _judged(asked: SafetyEvaluation, names: model_names.Names) -> SafetyEvaluation:
    if asked.judge.model is None:
        return asked
    model = names.whole_model(asked.judge.model, "eval.judge.model")
    return asked.model_copy(update={"judge": asked.judge.model_copy(update={"model": model})})
