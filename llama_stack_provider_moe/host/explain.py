"""What pydantic found wrong with a body -> one sentence for each problem: field, value, what is expected."""

import difflib
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from llama_stack_provider_moe.errors import InvalidBody, shorten
from llama_stack_provider_moe.spec import (
    JOB_ID_PATTERN,
    PROJECT_PATTERN,
    BreakerSpec,
    DPOSpec,
    ExportSpec,
    RoutingAnalysisSpec,
    SFTSpec,
)
from llama_stack_provider_moe.spec.destinations import HUB_REPO_PATTERN, OLLAMA_NAME_PATTERN
from llama_stack_provider_moe.spec.exports import SHARD_PATTERN

SHOWN = 8
A_BODY = "a JSON object, sent as content type application/json"
RECIPES: dict[str, type[BaseModel]] = {
    "sft": SFTSpec,
    "dpo": DPOSpec,
    "circuit_breaker": BreakerSpec,
    "routing_analysis": RoutingAnalysisSpec,
    "export": ExportSpec,
}
_TYPES = {
    "int": "an integer", "float": "a number", "bool": "true or false", "string": "text", "list": "a list",
    "dict": "an object", "model": "an object", "finite_number": "a finite number",
}  # fmt: skip
_NAME = "letters, digits, '.', '_' and '-', the first a letter or a digit"
_PATTERNS = {
    JOB_ID_PATTERN: f"1 to 128 {_NAME}",
    PROJECT_PATTERN: f"1 to 64 {_NAME}",
    SHARD_PATTERN: "a number of bytes, or of KB, MB or GB, as 5GB",
    HUB_REPO_PATTERN: "NAMESPACE/NAME, each of letters, digits, '.', '_' and '-'",
    OLLAMA_NAME_PATTERN: "[NAMESPACE/]MODEL[:TAG], of letters, digits, '_', '-' and '.'",
}
_BOUNDS = {
    "greater_than": ("gt", "> "), "greater_than_equal": ("ge", ">= "),
    "less_than": ("lt", "< "), "less_than_equal": ("le", "<= "),
}  # fmt: skip


def invalid_body(
    errors: Iterable[Mapping[str, Any]],
    model: type[BaseModel] | None,
    name: Callable[[str], str] = str,
    reworded: Callable[[str], str] = str,
) -> InvalidBody:
    """The error to raise for what `ValidationError.errors()` lists.

    Args:
        errors: as pydantic gives them.
        model: what the body was to be, for the list of the keys that it has; None for `JobSpec`, whose errors
            begin with the recipe.
        name: a field's dotted path -> the caller's name for it.
        reworded: the same for names inside a validator's own text.
    """
    problems = [_problem(error, model, name, reworded) for error in errors]
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return InvalidBody(problems[:SHOWN] + more)


def _problem(
    error: Mapping[str, Any],
    model: type[BaseModel] | None,
    name: Callable[[str], str],
    reworded: Callable[[str], str],
) -> str:
    location = list(error["loc"])
    if location and location[0] in ("body", "query", "header", "path"):
        location.pop(0)
    if model is None and location and location[0] in RECIPES:
        model = RECIPES[location.pop(0)]
    path = name(".".join(map(str, location))) or "the body"
    kind, context = error["type"], error.get("ctx", {})
    match kind:
        case "missing":
            return f"{path}: is missing"
        case "extra_forbidden":
            return f"{path}: unknown key{_known(location, model)}"
        case "value_error":
            text = reworded(str(context["error"]))
            return text if path == "the body" else f"{path}: {text}"
        case "union_tag_not_found":
            return f"recipe: is missing; expected one of {', '.join(map(repr, RECIPES))}"
        case "union_tag_invalid":
            return f"recipe: {shorten(context['tag'])} is not valid; expected one of {', '.join(map(repr, RECIPES))}"
        case "json_invalid":
            return f"the body is not JSON ({context['error']})"
        case "string_unicode":  # of a value, or of a key in what stands at `path`
            return f"{path}: {shorten(error['input'])} holds half of a surrogate pair, which is not text"
        case _ if not location:
            return f"the body: {shorten(error['input'])} is not valid; expected {A_BODY}"
        case _:
            return f"{path}: {shorten(error['input'])} is not valid; expected {_expected(error, context)}"


def _expected(error: Mapping[str, Any], context: Mapping[str, Any]) -> str:
    kind: str = error["type"]
    if kind in _BOUNDS:
        key, sign = _BOUNDS[kind]
        return f"{sign}{context[key]:.15g}"
    if kind in ("literal_error", "enum"):
        return str(context["expected"])
    if kind == "string_pattern_mismatch" and context["pattern"] in _PATTERNS:
        return _PATTERNS[context["pattern"]]
    if kind in ("string_too_short", "string_too_long"):
        least, most = context.get("min_length"), context.get("max_length")
        return f"at least {least} character(s)" if kind == "string_too_short" else f"at most {most} characters"
    family = kind if kind in _TYPES else kind.partition("_")[0]
    return _TYPES.get(family, str(error["msg"]))


def _known(location: list[Any], model: type[BaseModel] | None) -> str:
    """The keys that stand where an unknown one was found, the likeliest first."""
    for part in location[:-1]:
        field = model.model_fields.get(str(part)) if model else None
        model = _model_in(field.annotation) if field else None
    if model is None:
        return ""
    keys = list(model.model_fields)
    if not keys:
        return "; expected none"
    close = difflib.get_close_matches(str(location[-1]), keys, n=1)
    return f" (did you mean {close[0]}?)" if close else f"; expected {', '.join(keys)}"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) in (Union, types.UnionType):
        return next((found for found in map(_model_in, get_args(annotation)) if found), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
