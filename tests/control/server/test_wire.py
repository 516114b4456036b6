"""Compares our wire models with those of llama-stack-api 0.6.1, and tests the mapping of requests."""

import re
import types
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from llama_stack_api import post_training as api
from llama_stack_api.common import training_types
from llama_stack_api.post_training import models as api_models
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from llama_stack_provider_moe.control.server import api_requests, wire, wire_requests
from llama_stack_provider_moe.errors import InvalidBody, InvalidInput
from llama_stack_provider_moe.jobdir import folder
from llama_stack_provider_moe.spec import DPO_LOSSES, JOB_SPEC, JobDefaults
from llama_stack_provider_moe.spec.validation_errors import invalid_body

BLOCKS = {"adapter", "moe", "options", "eval", "export", "resources", "labels", "note", "notify"}
PAIRS: list[tuple[type[BaseModel], type[BaseModel], set[str]]] = [
    # theirs, ours, additional fields of ours
    (api.DataConfig, wire_requests.DataConfig, set()),
    (api.OptimizerConfig, wire_requests.OptimizerConfig, set()),
    (api.EfficiencyConfig, wire_requests.EfficiencyConfig, set()),
    (api.TrainingConfig, wire_requests.TrainingConfig, set()),
    (api.LoraFinetuningConfig, wire_requests.LoraFinetuningConfig, set()),
    (api.DPOAlignmentConfig, wire_requests.DPOAlignmentConfig, set()),
    (api.SupervisedFineTuneRequest, wire_requests.SupervisedFineTuneRequest, BLOCKS),
    (api.PreferenceOptimizeRequest, wire_requests.PreferenceOptimizeRequest, BLOCKS),
    (api_models.CancelTrainingJobRequest, wire_requests.CancelTrainingJobRequest, set()),
    (api.PostTrainingJob, wire.PostTrainingJob, set()),
    (api.ListPostTrainingJobsResponse, wire.ListPostTrainingJobsResponse, {"has_more"}),
    (api.PostTrainingJobStatusResponse, wire.PostTrainingJobStatusResponse, set()),
    (api.PostTrainingJobArtifactsResponse, wire.PostTrainingJobArtifactsResponse, {"report"}),
    (api.PostTrainingJobLogStream, wire.PostTrainingJobLogStream, {"next_offset"}),
    (training_types.Checkpoint, wire.Checkpoint, {"kind", "step", "bytes", "name", "sha256", "verification"}),
    (training_types.PostTrainingMetric, folder.Metrics, set()),
]
# Intended differences, each documented in docs/getting-started/clients.md.
OTHER_DEFAULTS = {
    ("TrainingConfig", "max_steps_per_epoch"): 0,  # theirs: 1, one optimiser step
    ("TrainingConfig", "max_validation_steps"): 0,  # theirs: 1
}


def choices(annotation: Any) -> Any:
    """An annotation in a form that both sides can be compared in."""
    if get_origin(annotation) in (Union, types.UnionType):
        return frozenset(choices(part) for part in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return choices(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return frozenset(get_args(annotation))
    if get_origin(annotation) is list:
        return ("list", choices(get_args(annotation)[0]))
    if get_origin(annotation) is dict:
        return "object"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return frozenset(member.value for member in annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.__name__
    return annotation


SAME_THING = {
    # theirs -> ours, where the two differ in form
    ("LoraFinetuningConfig", "alpha"): (int, float),  # every int is a float
    ("DPOAlignmentConfig", "loss_type"): (frozenset({"sigmoid", "hinge", "ipo", "kto_pair"}), str),  # ours has more
    ("SupervisedFineTuneRequest", "algorithm_config"): (
        frozenset({frozenset({"LoraFinetuningConfig", "QATFinetuningConfig"}), type(None)}),
        frozenset({"LoraFinetuningConfig", type(None)}),
    ),
    (
        "PostTrainingJobStatusResponse",
        "status",
    ): (  # a row that another version wrote is shown as it is
        frozenset({"scheduled", "in_progress", "completed", "failed", "cancelled"}),
        frozenset({"scheduled", "in_progress", "completed", "failed", "cancelled", "unreadable"}),
    ),
    ("ListPostTrainingJobsResponse", "data"): (("list", "PostTrainingJob"), ("list", "JobLine")),
    ("Checkpoint", "training_metrics"): (
        frozenset({"PostTrainingMetric", type(None)}),
        frozenset({"Metrics", type(None)}),
    ),
}


@pytest.mark.parametrize(("theirs", "ours", "extra"), PAIRS, ids=lambda value: getattr(value, "__name__", ""))
def test_field_by_field(theirs: type[BaseModel], ours: type[BaseModel], extra: set[str]) -> None:
    assert set(ours.model_fields) == set(theirs.model_fields) | extra
    for name, field in theirs.model_fields.items():
        mine, key = ours.model_fields[name], (theirs.__name__, name)
        assert mine.is_required() == field.is_required(), key
        if not field.is_required():
            assert value_of(mine) == OTHER_DEFAULTS.get(key, value_of(field)), key
        pair = (choices(field.annotation), choices(mine.annotation))
        assert pair[0] == pair[1] or pair == SAME_THING.get(key), key


@pytest.mark.parametrize(("key", "default"), OTHER_DEFAULTS.items(), ids=lambda value: str(value))
def test_other_defaults_are_documented(key: tuple[str, str], default: Any) -> None:
    page = (Path(__file__).parents[3] / "docs" / "getting-started" / "clients.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `\w+\.{key[1]}` \|.*$", page, re.MULTILINE)
    assert row.split(" | ")[2] == str(default)


def value_of(field: FieldInfo) -> Any:
    value = field.get_default(call_default_factory=True, validated_data={})
    return value.value if isinstance(value, Enum) else value


def leaves(model: type[BaseModel], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, field in model.model_fields.items():
        parts = get_args(field.annotation) or (field.annotation,)
        inner = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
        found |= leaves(inner[0], f"{prefix}{name}.") if inner else {prefix + name}
    return found


@pytest.mark.parametrize(
    ("model", "table"),
    [
        (wire_requests.SupervisedFineTuneRequest, api_requests.SFT_FIELDS),
        (wire_requests.PreferenceOptimizeRequest, api_requests.DPO_FIELDS),
    ],
)
def test_every_field_is_supported_or_refused(model: type[BaseModel], table: dict[str, str]) -> None:
    refused = {path for path in api_requests.REFUSED if path in leaves(model)}
    elsewhere = {"adapter", "algorithm_config.type"}  # merged with algorithm_config; only 'LoRA' passes
    assert leaves(model) - elsewhere == (set(table) | refused) - elsewhere
    assert not set(table) & set(api_requests.REFUSED)


def test_every_target_is_a_field_of_the_spec() -> None:
    for recipe, table in (("sft", api_requests.SFT_FIELDS), ("dpo", api_requests.DPO_FIELDS)):
        body: dict[str, Any] = {"recipe": recipe}
        for target in table.values():
            api_requests._put(body, target, None)
        body["adapter"] = body.get("adapter", {})
        errors = error_types(body)
        assert "extra_forbidden" not in errors.values(), errors


def error_types(body: dict[str, Any]) -> dict[str, str]:
    try:
        JOB_SPEC.validate_python(body)
    except ValidationError as error:
        return {".".join(map(str, each["loc"])): each["type"] for each in error.errors()}
    return {}


def sft(**changes: Any) -> dict[str, Any]:
    body: dict[str, Any] = {
        "job_uuid": "job-1",
        "model": "owner/name",
        "training_config": {
            "n_epochs": 2,
            "data_config": {"dataset_id": "rows", "batch_size": 3, "shuffle": False, "data_format": "dialog"},
            "optimizer_config": {"optimizer_type": "sgd", "lr": 0.5, "weight_decay": 0.1, "num_warmup_steps": 7},
        },
        "hyperparam_search_config": {},
        "logger_config": {},
    }
    return body | changes


def dpo(**changes: Any) -> dict[str, Any]:
    body = sft(algorithm_config={"beta": 0.3, "loss_type": "ipo"}, finetuned_model="owner/name")
    del body["model"]
    return body | changes


LORA = {
    "lora_attn_modules": ["q_proj"],
    "apply_lora_to_mlp": True,
    "apply_lora_to_output": False,
    "rank": 8,
    "alpha": 9,
}


def draft(body: dict[str, Any]) -> api_requests.Draft:
    model = (
        wire_requests.PreferenceOptimizeRequest
        if "finetuned_model" in body
        else wire_requests.SupervisedFineTuneRequest
    )
    return api_requests.draft(model.model_validate(body))


def test_requests_map_to_jobs() -> None:
    made = draft(sft())
    assert made.body == {
        "recipe": "sft", "job_uuid": "job-1", "model": "owner/name",
        "data": {"dataset_id": "rows", "shuffle": False, "format": "dialog"},
        "training": {"n_epochs": 2, "batch_size": 3},
        "optimizer": {"optimizer_type": "sgd", "lr": 0.5, "weight_decay": 0.1, "num_warmup_steps": 7},
        "trackers": {},
    }  # fmt: skip
    spec = JOB_SPEC.validate_python(made.body)
    assert spec.training.max_steps_per_epoch == 0
    assert spec.training.max_validation_steps == 0
    made = draft(dpo())
    assert (made.body["beta"], made.body["loss_type"], made.body["model"]) == (0.3, "ipo", "owner/name")
    assert "adapter" not in made.body


def test_null_means_left_out_and_a_stated_value_stays() -> None:
    body = sft()
    body["training_config"] |= {"dtype": None, "max_validation_steps": None, "max_steps_per_epoch": 1}
    body["training_config"]["data_config"] |= {"packed": None, "train_on_input": True}
    made = draft(body).body
    assert made["training"] == {"n_epochs": 2, "batch_size": 3, "max_steps_per_epoch": 1}
    assert made["data"] == {"dataset_id": "rows", "shuffle": False, "format": "dialog", "train_on_input": True}


def test_server_defaults_fill_in_missing_fields() -> None:
    defaults = JobDefaults(
        training={"dtype": "fp32", "n_epochs": 9}, adapter={"rank": 4}, moe={"router_z_loss_coef": 0.5}
    )

    def spec(body: dict[str, Any]) -> Any:
        return JOB_SPEC.validate_python(defaults.under(draft(body).body))

    plain = spec(sft())
    assert (plain.training.dtype, plain.training.n_epochs) == ("fp32", 2)
    assert plain.adapter.rank == 4
    assert plain.moe.router_z_loss_coef == 0.5
    assert spec(sft(adapter=None)).adapter is None  # all weights, said explicitly
    assert spec(sft(adapter={"alpha": 1})).adapter.model_dump(include={"rank", "alpha"}) == {"rank": 4, "alpha": 1}
    assert spec(sft(algorithm_config=LORA)).adapter.rank == 8
    assert spec(dpo(adapter={"rank": 2})).adapter.rank == 2
    smoothed = dpo(options={"label_smoothing": 0.25}, algorithm_config={"beta": 0.3, "loss_type": "robust"})
    assert spec(smoothed).options.label_smoothing == 0.25
    assert JOB_SPEC.validate_python(JobDefaults().under(draft(sft()).body)).adapter is None


def test_a_servers_default_evaluation() -> None:
    """With data sets it applies to every job that does not say null; without, it only provides settings."""
    sets = {"retain_dataset_id": "kept", "fail_if": {"capability_drop": 0.02}}
    always, how = JobDefaults(eval=sets), JobDefaults(eval={"max_new_tokens": 9, "fail_if": {"refusal_drop": 0.5}})

    def evaluation(defaults: JobDefaults, body: dict[str, Any]) -> Any:
        return JOB_SPEC.validate_python(defaults.under(draft(body).body)).eval

    assert evaluation(always, sft()).fail_if.capability_drop == 0.02
    assert evaluation(always, dpo()).retain_dataset_id == "kept"
    assert evaluation(always, sft(eval=None)) is None
    own = evaluation(always, sft(eval={"retain_dataset_id": "mine", "refuse_dataset_id": "no"}))
    assert (own.retain_dataset_id, own.refuse_dataset_id, own.fail_if.capability_drop) == ("mine", "no", 0.02)
    assert evaluation(how, sft()) is None
    assert evaluation(how, sft(eval={"refuse_dataset_id": "no"})).max_new_tokens == 9
    analysis = {"recipe": "routing_analysis", "model": "m", "data": {"sets": {"a": "x", "b": "y"}}}
    assert always.under(analysis) == analysis


@pytest.mark.parametrize(
    ("evaluation", "expected"),
    [
        ({"max_rows": 0}, "max_rows"),
        ({"maximum": 3}, "maximum"),
        ({"retain_dataset_id": "kept", "fail_if": {"refusal_drop": 0.1}}, "eval.fail_if.refusal_drop: needs eval.ref"),
        ({"masked_experts": {"0": "1"}}, "masked_experts: fits one model only"),
        ({"masked_from_analysis": {"job": "a", "set": "b", "top": 1}}, "masked_from_analysis: fits one model only"),
        ({"ablated": {"measurements": "a", "ablate": []}}, "ablated: fits one model only"),
    ],
)
def test_a_wrong_default_evaluation_stops_the_server(evaluation: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        JobDefaults(eval=evaluation)


def test_adapter_beside_algorithm_config_is_their_union() -> None:
    made = draft(sft(algorithm_config=LORA | {"type": "LoRA"}, adapter={"dropout": 0.5, "rank": 8}))
    assert made.body["adapter"] == LORA | {"dropout": 0.5}
    with pytest.raises(InvalidInput, match=r"adapter\.rank: 16 is not valid; expected 8, as in algorithm_config"):
        draft(sft(algorithm_config=LORA, adapter={"rank": 16}))
    with pytest.raises(InvalidInput, match="adapter: None"):
        draft(sft(algorithm_config=LORA, adapter=None))


@pytest.mark.parametrize("request_of", [sft, dpo])
def test_trackers_come_from_the_logger_config(request_of: Any) -> None:
    found = draft(request_of(logger_config={"tensorboard": {}, "wandb": {"project": "runs"}}))
    assert found.body["trackers"] == {"tensorboard": {}, "wandb": {"project": "runs"}}
    assert found.name("trackers.wandb.project") == "logger_config.wandb.project"
    merged = JobDefaults(trackers={"mlflow": {}, "wandb": {"project": "servers"}}).under(found.body)
    trackers = JOB_SPEC.validate_python(merged).trackers
    assert (trackers.mlflow is not None, trackers.trackio) == (True, None)
    assert trackers.wandb is not None
    assert trackers.wandb.project == "runs", "the job's setting takes precedence over the server's"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (sft(hyperparam_search_config={"trials": 3}), "hyperparam_search_config: ['trials']"),
        (sft(model=None), "model: None"),
        (sft(training_config={"n_epochs": 1}), "training_config.data_config: None"),
        *[
            (
                sft(training_config=sft()["training_config"] | {"efficiency_config": {name: True}}),
                f"training_config.efficiency_config.{name}: True is not valid; expected false",
            )
            for name in ("enable_activation_offloading", "memory_efficient_fsdp_wrap", "fsdp_cpu_offload")
        ],
    ],
)
def test_unsupported_fields_are_refused_by_name(body: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        draft(body)
    assert text in str(caught.value)


def test_unsupported_fields_may_be_off() -> None:
    off = dict.fromkeys(["enable_activation_offloading", "memory_efficient_fsdp_wrap", "fsdp_cpu_offload"], False) | {
        "enable_activation_checkpointing": True
    }
    body = sft(training_config=sft()["training_config"] | {"efficiency_config": off})
    body["algorithm_config"] = LORA | {"quantize_base": False, "use_dora": None}
    made = draft(body).body
    assert made["efficiency"] == {"enable_activation_checkpointing": True}
    assert made["adapter"] == LORA | {"quantize_base": False}


def test_the_apis_own_field_quantises_the_base() -> None:
    made = draft(sft(algorithm_config=LORA | {"quantize_base": True})).body
    assert JOB_SPEC.validate_python(made | {"recipe": "sft"}).adapter.quantize_base is True


def refusal(body: dict[str, Any]) -> str:
    """The text that a caller of a standard route gets."""
    made = draft(body)
    with pytest.raises(ValidationError) as caught:
        JOB_SPEC.validate_python(made.body)
    return str(invalid_body(caught.value.errors(), None, made.name, made.reworded))


def test_errors_name_the_fields_of_the_caller() -> None:
    body = sft()
    body["training_config"]["optimizer_config"]["lr"] = -1
    body["training_config"]["data_config"]["batch_size"] = 0
    assert refusal(body) == (
        "training_config.data_config.batch_size: 0 is not valid; expected >= 1; "
        "training_config.optimizer_config.lr: -1.0 is not valid; expected > 0"
    )
    text = refusal(dpo(algorithm_config={"beta": 0.1, "loss_type": "kto_pair"}))
    assert text.startswith("algorithm_config.loss_type: 'kto_pair' is not implemented by TRL; expected one of ")
    assert all(loss in text for loss in DPO_LOSSES)
    body = dpo()
    body["training_config"]["data_config"]["packed"] = True
    assert refusal(body) == "training_config.data_config.packed: true is for SFT only; preference pairs can't be packed"
    text = refusal(sft(algorithm_config=LORA | {"lora_attn_modules": ["q_proj", "gate_proj"]}))
    assert text.startswith("algorithm_config.lora_attn_modules.1: 'gate_proj' is not valid; expected 'q_proj', ")
    assert refusal(sft(adapter={"rank": 0})) == "adapter.rank: 0 is not valid; expected >= 1"
    assert refusal(sft(moe={"router_aux_loss_coeff": 1})) == (
        "moe.router_aux_loss_coeff: unknown key (did you mean router_aux_loss_coef?)"
    )
    assert refusal(sft(options={"label_smoothing": 0.1})).startswith("options.label_smoothing: unknown key; expected ")


def test_errors_of_the_wire_models() -> None:
    def text(body: dict[str, Any]) -> str:
        with pytest.raises(ValidationError) as caught:
            wire_requests.SupervisedFineTuneRequest.model_validate(body)
        return str(invalid_body(caught.value.errors(), wire_requests.SupervisedFineTuneRequest))

    assert text({}).startswith("job_uuid: is missing; training_config: is missing; hyperparam_search_config")
    assert text(sft(modle="x")) == "modle: unknown key (did you mean model?)"
    body = sft(training_config=sft()["training_config"] | {"n_epochs": "two"})
    assert text(body) == "training_config.n_epochs: 'two' is not valid; expected an integer"
    assert text(sft(algorithm_config={"type": "QAT", "quantizer_name": "int4", "group_size": 32})) == (
        "algorithm_config: type 'QAT' is not supported; expected 'LoRA', or no algorithm_config for the server's "
        "default"
    )
    long = "x" * 100_000
    assert len(text(sft(training_config=long))) < 200
    assert len(text(sft() | {f"key{index}": long for index in range(100)})) < 2000


def test_all_problems_are_counted() -> None:
    errors = [{"loc": (f"field{index}",), "type": "missing", "input": {}} for index in range(11)]
    error = invalid_body(errors, None)
    assert isinstance(error, InvalidBody)
    assert str(error).endswith("field7: is missing; and 3 more")
