"""A job file and `--set` -> the body of a job. The server checks the fields; this reads and edits them."""

from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from llama_stack_provider_moe.control.cli.job_file import parse_json, read_job_file
from llama_stack_provider_moe.errors import InvalidBody, InvalidInput
from llama_stack_provider_moe.ground.json_kinds import kind_of
from llama_stack_provider_moe.spec import JOB_SPEC, FromAnalysis, TrainingSpec
from llama_stack_provider_moe.spec.adapter import MAX_RANK, ExpertsOfAnalysis
from llama_stack_provider_moe.spec.error_words import problems_of
from llama_stack_provider_moe.spec.recipes import RECIPES
from llama_stack_provider_moe.spec.routing import made_for, masks_of, read_report, rules_of
from llama_stack_provider_moe.spec.validation_errors import invalid_body


def read_template(file: str, changes: Iterable[str]) -> dict[str, object]:
    """Return the job in `file` with `changes` applied, one after the other.

    Args:
        file: a path, `-` for standard input, or `@NAME` for a template of this package.
        changes: each is `block.field=value`.

    Raises:
        InvalidInput: the file is not a readable job file, a change does not fit into it, or an analysis that the
            job names can't be read.
    """
    body, beside = read_job_file(file)
    apply_changes(body, changes)
    return with_layer_experts(_with_masks(_with_experts(body, beside), beside), beside)


def apply_changes(body: dict[str, object], changes: Iterable[str]) -> None:
    """Apply each `block.field=value` to a job's body, in place.

    Raises:
        InvalidInput: a change does not fit into the body.
    """
    for change in changes:
        _change(body, change)


def training_job(body: object) -> TrainingSpec:
    """Check a job's fields before torch is imported.

    Raises:
        InvalidBody: they are not those of a job; it names each wrong field.
        InvalidInput: the job does not train.
    """
    try:
        spec = JOB_SPEC.validate_python(body)
    except ValidationError as error:
        raise invalid_body(error.errors(include_url=False), None) from None
    if not isinstance(spec, TrainingSpec):
        trained = ", ".join(recipe.name for recipe in RECIPES.values() if recipe.trains)
        raise InvalidInput("recipe", spec.recipe, f"one that trains: {trained}")
    return spec


def _with_experts(body: dict[str, object], beside: Path) -> dict[str, object]:
    """Replace `adapter.from_analysis.file`, a path on this machine, by its rules: a server does not read paths.

    Args:
        body: body of a job.
        beside: folder that relative paths start from.
    """
    adapter = body.get("adapter")
    asked = adapter.get("from_analysis") if isinstance(adapter, dict) else None
    if not isinstance(adapter, dict) or not isinstance(asked, dict) or "file" not in asked:
        return body
    field = "adapter.from_analysis"
    own_rules = adapter.get("rules", [])
    if not isinstance(own_rules, list):
        raise InvalidInput("adapter.rules", own_rules, f"a list; this is {kind_of(own_rules)}")
    wanted = _wanted(FromAnalysis, asked, field)
    rank = wanted.rank or adapter.get("rank")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise InvalidInput(f"{field}.rank", rank, f"a rank of 1 to {MAX_RANK}, here or as adapter.rank")
    path = beside / str(asked["file"])
    report = read_report(path, f"{field}.file")
    rules = [rule.model_dump() for rule in rules_of(report, wanted.set, wanted.top, rank, field)]
    origin = made_for(report, f"{path.name}, set {wanted.set}, top {wanted.top}").model_dump()
    kept = {name: value for name, value in adapter.items() if name != "from_analysis"}
    return {**body, "adapter": {**kept, "rules": [*rules, *own_rules], "rules_from": origin}}


def _with_masks(body: dict[str, object], beside: Path) -> dict[str, object]:
    """Replace `eval.masked_from_analysis.file` by `masked_experts` in the same way."""
    evaluation = body.get("eval")
    asked = evaluation.get("masked_from_analysis") if isinstance(evaluation, dict) else None
    if not isinstance(evaluation, dict) or not isinstance(asked, dict) or "file" not in asked:
        return body
    field = "eval.masked_from_analysis"
    if evaluation.get("masked_experts"):
        raise InvalidInput("eval.masked_experts", evaluation["masked_experts"], f"nothing beside {field}.file")
    wanted = _wanted(ExpertsOfAnalysis, asked, field)
    path = beside / str(asked["file"])
    report = read_report(path, f"{field}.file")
    kept = {name: value for name, value in evaluation.items() if name != "masked_from_analysis"}
    found = {
        "masked_experts": masks_of(report, wanted.set, wanted.top, field),
        "masked_from": made_for(report, f"{path.name}, set {wanted.set}, top {wanted.top}").model_dump(),
    }
    return {**body, "eval": {**kept, **found}}


def with_layer_experts(body: dict[str, object], beside: Path) -> dict[str, object]:
    """Replace `from_analysis.file` of an ablation by `layer_experts` in the same way."""
    asked, field = body.get("from_analysis"), "from_analysis"
    if not isinstance(asked, dict) or "file" not in asked:
        return body
    wanted = _wanted(ExpertsOfAnalysis, asked, field)
    path = beside / str(asked["file"])
    report = read_report(path, f"{field}.file")
    kept = {name: value for name, value in body.items() if name != field}
    found = {
        "layer_experts": masks_of(report, wanted.set, wanted.top, field),
        "layer_experts_from": made_for(report, f"{path.name}, set {wanted.set}, top {wanted.top}").model_dump(),
    }
    if body.get("layer_experts"):
        raise InvalidInput("layer_experts", body["layer_experts"], f"nothing beside {field}.file")
    return {**kept, **found}


def _wanted[Asked: ExpertsOfAnalysis](kind: type[Asked], asked: dict[str, object], field: str) -> Asked:
    if "job" in asked:
        raise InvalidInput(field, asked, "one of job and file")
    others = {name: value for name, value in asked.items() if name != "file"}
    try:
        return kind.model_validate({**others, "job": "none"})  # the file stands for the job
    except ValidationError as error:
        raise InvalidBody([f"{field}.{problem}" for problem in problems_of(error)]) from None


def _change(body: dict[str, object], change: str) -> None:
    """Apply `block.field=value` in place. Missing blocks are created."""
    path, equals, text = change.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise InvalidInput("--set", change, "block.field=value, such as training.n_epochs=3")
    block = body
    for depth, key in enumerate(keys[:-1], start=1):
        if block.get(key) is None:
            block[key] = {}
        inner = block[key]
        if not isinstance(inner, dict):
            where = ".".join(keys[:depth])
            raise InvalidInput("--set", change, f"a path through blocks; {where} is {kind_of(inner)}")
        block = inner
    block[keys[-1]] = _value(text)


def _value(text: str) -> object:
    try:
        return parse_json(text)
    except (ValueError, RecursionError):
        return text
