"""pydantic's errors for a body -> one sentence for each problem: field, value, expectation."""

import difflib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Union, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from llama_stack_provider_moe.errors import InvalidBody, shorten
from llama_stack_provider_moe.spec import (
    JOB_ID_PATTERN,
    PROJECT_PATTERN,
)
from llama_stack_provider_moe.spec.blocks import NUMBERS_PATTERN
from llama_stack_provider_moe.spec.data import DOMAIN_PATTERN
from llama_stack_provider_moe.spec.destinations import HUB_REPO_PATTERN, OLLAMA_NAME_PATTERN
from llama_stack_provider_moe.spec.engines_config import ENGINE_NAME_PATTERN
from llama_stack_provider_moe.spec.error_words import expected
from llama_stack_provider_moe.spec.exports import SHARD_PATTERN
from llama_stack_provider_moe.spec.grader_base import GRADER_NAME_PATTERN, VARIABLE_NAME_PATTERN
from llama_stack_provider_moe.spec.graders import GRADER_TYPES
from llama_stack_provider_moe.spec.graders_config import JUDGE_NAME_PATTERN
from llama_stack_provider_moe.spec.guard_config import SHIELD_PATTERN, SHIELD_WORDS
from llama_stack_provider_moe.spec.labels import LABEL_KEY_PATTERN
from llama_stack_provider_moe.spec.notify import VARIABLE_PATTERN
from llama_stack_provider_moe.spec.pipelines import PART_PATTERN
from llama_stack_provider_moe.spec.recipes import RECIPES
from llama_stack_provider_moe.spec.rl_engines import ENGINE_TYPES
from llama_stack_provider_moe.spec.scorer_config import PROBE_NAME_PATTERN
from llama_stack_provider_moe.spec.server_config import HOST_NAME_PATTERN, MIRROR_URL_PATTERN

SHOWN = 8
KEY_SHOWN = 64  # characters of one part of a path, which may be any key that the caller sent
A_BODY = "a JSON object, sent as content type application/json"
_NAME = "letters, digits, '.', '_' and '-', the first a letter or a digit"
_PATTERNS = {
    JOB_ID_PATTERN: f"1 to 128 {_NAME}",
    PROJECT_PATTERN: f"1 to 64 {_NAME}",
    MIRROR_URL_PATTERN: "s3://BUCKET[/PREFIX] or file:///FOLDER",
    SHARD_PATTERN: "a number of bytes, or of KB, MB or GB, such as 5GB",
    HUB_REPO_PATTERN: "NAMESPACE/NAME, each of letters, digits, '.', '_' and '-'",
    NUMBERS_PATTERN: "numbers and ranges from 0 to 9999, such as '0-3,12'",
    PART_PATTERN: "1 to 32 lower-case letters, digits, '_' and '-', the first a letter or a digit",
    DOMAIN_PATTERN: "1 to 32 letters, digits, '_' and '-', the first a letter or a digit",
    HOST_NAME_PATTERN: "a host's name without a port, in small letters, such as moe.example.org",
    VARIABLE_PATTERN: "1 to 128 letters, digits and '_', the first a letter or '_'",
    LABEL_KEY_PATTERN: "1 to 63 letters, digits, '.', '_', '/' and '-', the first and the last a letter or a digit",
    PROBE_NAME_PATTERN: "1 to 64 letters, digits, '_' and '-', the first a letter or a digit",
    SHIELD_PATTERN: SHIELD_WORDS,
    GRADER_NAME_PATTERN: "1 to 64 letters, digits, spaces and . _ -, the first a letter or a digit",
    VARIABLE_NAME_PATTERN: "1 to 64 letters, digits and '_', the first a letter or '_'",
    JUDGE_NAME_PATTERN: "1 to 128 letters, digits and . _ / : -, the first a letter or a digit",
    ENGINE_NAME_PATTERN: f"1 to 128 {_NAME}",
    OLLAMA_NAME_PATTERN: "[NAMESPACE/]MODEL[:TAG], of letters, digits, '_', '-' and '.'",
}


def validated[M: BaseModel](model: type[M], body: object, shown: int = SHOWN) -> M:
    """`body` as a `model`; raises `InvalidBody`, with the first `shown` problems, if it is not valid."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise invalid_body(error.errors(include_url=False), model, shown=shown) from None


def invalid_body(
    errors: Sequence[Mapping[str, object]],
    model: type[BaseModel] | None,
    name: Callable[[str], str] = str,
    reworded: Callable[[str], str] = str,
    shown: int = SHOWN,
) -> InvalidBody:
    """The error for what `ValidationError.errors()` lists.

    Args:
        errors: as pydantic gives them.
        model: the model that the body was checked with, to list its keys; None: `JobSpec`, whose errors begin with the
            recipe.
        name: a field's dotted path -> the caller's name for it.
        reworded: the same for names inside a validator's own text.
        shown: how many problems it explains; it counts the others.
    """
    problems = [_problem(cast(ErrorDetails, error), model, name, reworded) for error in errors[:shown]]
    more = [f"and {len(errors) - shown} more"] if len(errors) > shown else []
    return InvalidBody(problems + more)


def _problem(
    error: ErrorDetails,
    model: type[BaseModel] | None,
    name: Callable[[str], str],
    reworded: Callable[[str], str],
) -> str:
    location = list(error["loc"])
    if location and location[0] in ("body", "query", "header", "path"):
        location.pop(0)
    location = _without_tags(location)
    if model is None and location and location[0] in RECIPES:
        model = RECIPES[str(location.pop(0))].spec
    path = name(".".join(_cut(str(part)) for part in location)) or "the body"
    kind, context = error["type"], error.get("ctx", {})
    match kind:
        case "missing":
            return f"{path}: is missing"
        case "extra_forbidden":
            return f"{path}: unknown key{_known(location, model)}"
        case "value_error" | "assertion_error":
            text = reworded(str(context["error"]))
            return text if path == "the body" else f"{path}: {text}"
        case "union_tag_not_found" if context["discriminator"] == "'recipe'":
            return f"recipe: is missing; expected one of {', '.join(map(repr, RECIPES))}"
        case "union_tag_invalid" if context["discriminator"] == "'recipe'":
            return f"recipe: {shorten(context['tag'])} is not valid; expected one of {', '.join(map(repr, RECIPES))}"
        case "json_invalid":
            return f"the body is not JSON ({context['error']})"
        case "string_unicode":  # in a value, or in a key of the object at `path`
            return f"{path}: {shorten(error['input'])} holds half of a surrogate pair, which is not text"
        case _ if not location:
            return f"the body: {shorten(error['input'])} is not valid; expected {A_BODY}"
        case _:
            return f"{path}: {shorten(error['input'])} is not valid; expected {expected(error, _PATTERNS)}"


def _without_tags(location: list[str | int]) -> list[str | int]:
    """A path without types of graders and engines: pydantic puts a union's tag into it, where nobody wrote it."""
    return [
        part
        for at, part in enumerate(location)
        # A field may have the name of a type, as json_schema does; a tag stands right behind its grader alone.
        if not (
            part in GRADER_TYPES
            and (at == 0 or location[at - 1] == "grader" or (at > 1 and location[at - 2] == "graders"))
        )
        and not (part in ENGINE_TYPES and at > 0 and location[at - 1] == "engine")
    ]


def _cut(key: str) -> str:
    return key if len(key) <= KEY_SHOWN else f"{key[: KEY_SHOWN - 1]}…"


def _known(location: Sequence[str | int], model: type[BaseModel] | None) -> str:
    """The keys that are valid where an unknown one was found, the most similar first."""
    for part in location[:-1]:
        field = model.model_fields.get(str(part)) if model else None
        model = _model_in(field.annotation) if field else None
    if model is None:
        return ""
    keys = list(model.model_fields)
    if not keys:
        return "; expected none"
    close = difflib.get_close_matches(_cut(str(location[-1])), keys, n=1)
    return f" (did you mean {close[0]}?)" if close else f"; expected {', '.join(keys)}"


def _model_in(annotation: object) -> type[BaseModel] | None:
    if get_origin(annotation) in (Union, types.UnionType):
        return next((found for found in map(_model_in, get_args(annotation)) if found), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
