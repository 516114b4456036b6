"""What a JSON or YAML block of a page holds, and whether our own models accept it."""

import json
import re
from typing import Any

import yaml
from pydantic import TypeAdapter

from llama_stack_provider_moe.control.config_check import run_yaml
from llama_stack_provider_moe.control.guard.wire import RunShieldBody
from llama_stack_provider_moe.control.server import wire, wire_graders, wire_requests
from llama_stack_provider_moe.control.server.openai.requests import FineTuningRequest
from llama_stack_provider_moe.errors import RowProblem
from llama_stack_provider_moe.graders.document import sample_of
from llama_stack_provider_moe.shields.rules import ToolRulesFile
from llama_stack_provider_moe.spec import JOB_SPEC, Exports
from llama_stack_provider_moe.spec.evaluation_rows import canonical_own
from llama_stack_provider_moe.spec.graders import GRADER, GRADER_TYPES
from llama_stack_provider_moe.spec.graders_config import GradersConfig
from llama_stack_provider_moe.spec.guard_config import GuardConfig
from llama_stack_provider_moe.spec.pipelines import PipelineSpec
from llama_stack_provider_moe.spec.rewards import REWARDS, Grading
from llama_stack_provider_moe.spec.rows import canonical
from llama_stack_provider_moe.spec.rows.image_parts import ImageDoor
from llama_stack_provider_moe.spec.rows.images import ImageLimits
from llama_stack_provider_moe.spec.rows.values import BadRow
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from llama_stack_provider_moe.spec.sweeps import SweepSpec
from tests.contracts.reference import BLOCKS

JOB_FIELDS = {name for _, prefix, model, _ in BLOCKS if prefix == "" for name in model.model_fields} - {
    *ProviderConfig.model_fields,
    *GuardConfig.model_fields,
    *ToolRulesFile.model_fields,
}
# The least that each recipe needs beside a fragment of a job.
BASES: list[dict[str, Any]] = [
    {"recipe": "sft", "model": "m", "data": {"dataset_id": "d"}},
    {"recipe": "dpo", "model": "m", "data": {"dataset_id": "d"}},
    {"recipe": "kto", "model": "m", "data": {"dataset_id": "d"}},
    {"recipe": "reward", "model": "m", "data": {"dataset_id": "d"}},
    {"recipe": "distill", "model": "m", "teacher": "t", "data": {"dataset_id": "d"}},
    {"recipe": "circuit_breaker", "model": "m", "data": {"dataset_id": "d"},
     "circuit_breaker": {"retain": {"dataset_id": "r"}, "target_layers": "1,2"}},
    {"recipe": "routing_analysis", "model": "m", "data": {"sets": {"a": "d", "b": "e"}}},
    {"recipe": "ablation_measure", "model": "m", "data": {"sets": {"target": "d", "baseline": "e"}}},
    {"recipe": "probe", "model": "m", "data": {"sets": {"target": "d", "baseline": "e"}}},
    {"recipe": "ablation", "model": "m", "measurements": "job", "ablate": [{"layer": 1, "measurement": 1}]},
    {"recipe": "mix", "model": "m", "method": "btx",
     "branches": [{"name": "a", "model": "job-a"}, {"name": "b", "model": "job-b"}]},
    {"recipe": "surgery", "model": "m", "surgery": {"action": "prune", "drop": {"all": "1"}}},
    {"recipe": "export", "of": "job", "export": {"merged": True}},
]  # fmt: skip


# Columns of which every row has one; a row with one of ANSWERS must have an answer.
ROW_COLUMNS = {"messages", "dialog", "conversations", "prompt", "chat_completion_input", "instruction", "text",
               "chosen", "preferred_output", "answer"}  # fmt: skip
ANSWERS = {"messages", "dialog", "conversations", "completion", "expected_answer", "output", "text"}


class Part(dict[str, Any]):
    """Fields of an object, written without its braces."""


class Unaccepted(AssertionError):
    """A block holds what none of our models accepts, or nothing that we know."""


def parsed(text: str, language: str) -> list[Any]:
    """The values in a block: one, or one a line; a fragment `"field": ...` of an object counts as that object."""
    if language == "yaml":
        return [value for value in yaml.safe_load_all(text) if value is not None]
    try:
        return [json.loads(text)]
    except ValueError:
        pass
    try:
        return [Part(json.loads("{" + text.strip().rstrip(",") + "}"))]
    except ValueError:
        pass
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise Unaccepted(f"is neither JSON, nor fields of an object, nor a JSON value a line ({error})") from None


def require_accepted(value: Any) -> str:
    """What the value is, by what it holds.

    Raises:
        Unaccepted: nothing that we know, or not valid.
    """
    if isinstance(value, list):
        kinds = {require_accepted(each) for each in value}
        return " and ".join(sorted(kinds))
    if not isinstance(value, dict) or not value:
        raise Unaccepted(f"{value!r} is not an object that we know")
    keys = set(value)
    try:
        return _accepted(value, keys)
    except ValueError as error:
        raise Unaccepted(f"{sorted(keys)}: {error}") from error


def _accepted(value: dict[str, Any], keys: set[str]) -> str:
    if "recipe" in keys and not isinstance(value, Part):
        JOB_SPEC.validate_python(value)
        return "job"
    if keys & {"training_config", "algorithm_config"}:
        is_dpo = "beta" in (value.get("algorithm_config") or {})
        model = wire_requests.PreferenceOptimizeRequest if is_dpo else wire_requests.SupervisedFineTuneRequest
        TypeAdapter(model).validate_python(value)
        return "request"
    if {"job", "parameters"} <= keys:
        SweepSpec.model_validate(value)
        JOB_SPEC.validate_python(value["job"])
        return "request"
    if "parts" in keys:
        asked = PipelineSpec.model_validate(value)
        for at in range(len(asked.parts)):
            JOB_SPEC.validate_python(asked.job_of(at, "pipeline"))
        return "request"
    if "training_file" in keys:
        FineTuningRequest.model_validate(value)
        return "request"
    if value.get("type") in GRADER_TYPES and "name" in keys:
        GRADER.validate_python(value)
        return "grader"
    if "reward" in keys and keys <= {"reward", "grading"}:
        REWARDS.validate_python(value["reward"])
        Grading.model_validate(value.get("grading", {}))
        return "rewards"
    if "grader" in keys and "model_sample" in keys:
        wire_graders.RunGraderRequest.model_validate(value)
        return "request"
    if keys == {"judges"}:
        GradersConfig.model_validate(value)
        return "judges"
    if "output_text" in keys:
        sample_of(value, 1)
        return "answer"
    if keys == {"error"}:
        wire.Error.model_validate(value)
        return "error"
    if keys & ROW_COLUMNS:
        return _row(value, keys)
    if "providers" in keys:
        return _run_yaml(value)
    if keys == {"config"} and isinstance(value["config"], dict):
        value, keys = value["config"], set(value["config"])
    if keys <= set(GuardConfig.model_fields) and "on_failure" in keys:
        GuardConfig.model_validate(run_yaml.substituted(value, {}))
        return "server configuration"
    if {"version", "tools"} <= keys:
        ToolRulesFile.model_validate(value)
        return "rules"
    if {"shield_id", "messages"} <= keys:
        RunShieldBody.model_validate(value)
        return "request"
    if keys <= set(ProviderConfig.model_fields):
        ProviderConfig.model_validate(run_yaml.substituted(value, {}))
        return "server configuration"
    if keys <= set(Exports.model_fields):
        Exports.model_validate(value)
        return "export"
    if keys <= JOB_FIELDS:
        return _fragment(value)
    raise Unaccepted(f"holds {sorted(keys)}: not a job, a row, a request, an error or a server's configuration")


def _row(given: dict[str, Any], keys: set[str]) -> str:
    try:
        value = ImageDoor(ImageLimits(), lambda _content, _part: None).converted(given)
    except BadRow as bad:
        raise Unaccepted(f"{bad.field}: {bad.reason}") from None
    if "forbidden" in keys:
        found: Any = canonical_own(value, 1, "scenario")
    elif "answer" in keys:
        found = canonical_own(value, 1, "judged")
    elif "label" in keys:
        found = canonical(value, 1, "kto", "auto")
    elif keys & {"chosen", "rejected", "preferred_output"}:
        found = canonical(value, 1, "dpo", "auto")
    else:
        found = canonical(value, 1, "sft", "auto", answered=bool(keys & ANSWERS))
    if isinstance(found, RowProblem):
        raise Unaccepted(str(found))
    return "row"


def _run_yaml(value: dict[str, Any]) -> str:
    models = {run_yaml.PROVIDER_TYPE: ProviderConfig, run_yaml.GUARD_TYPE: GuardConfig}
    ours = [each for api in value["providers"].values() for each in api if each.get("provider_type") in models]
    if not ours:
        raise Unaccepted(f"has no provider {run_yaml.PROVIDER_TYPE} or {run_yaml.GUARD_TYPE}")
    for each in ours:
        settings = run_yaml.substituted(each.get("config") or {}, {"MOE_PROBE": "/probe"})
        models[each["provider_type"]].model_validate(settings)
        if each.get("module") != run_yaml.MODULE:
            raise Unaccepted(f"module is {each.get('module')!r}; expected {run_yaml.MODULE!r}")
    return "run YAML"


def _fragment(value: dict[str, Any]) -> str:
    """A part of a job is accepted where one recipe accepts it."""
    refusals = []
    for base in BASES:
        if value.get("recipe", base["recipe"]) != base["recipe"]:
            continue
        body = {**base, **value}
        if isinstance(value.get("circuit_breaker"), dict) and "circuit_breaker" in base:
            body["circuit_breaker"] = {**base["circuit_breaker"], **value["circuit_breaker"]}
        try:
            JOB_SPEC.validate_python(body)
        except ValueError as error:
            refusals.append(f"as {base['recipe']}: {' '.join(re.sub(r'https://[^ ]*', '', str(error)).split())[:300]}")
            continue
        return "part of a job"
    raise Unaccepted("no recipe accepts it; " + "; ".join(refusals))
