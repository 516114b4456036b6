"""Every number in a job and in a server's configuration has a minimum and a maximum; other values get a 400."""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from llama_stack_provider_moe.control.server.wire_requests import (
    JobChange,
    PreferenceOptimizeRequest,
    SupervisedFineTuneRequest,
)
from llama_stack_provider_moe.errors import InvalidBody
from llama_stack_provider_moe.spec import (
    AblationMeasureSpec,
    AblationSpec,
    BreakerSpec,
    DPOSpec,
    ExportSpec,
    PlaygroundSpec,
    ProbeSpec,
    RoutingAnalysisSpec,
    SFTSpec,
    SurgerySpec,
    validation_errors,
)
from llama_stack_provider_moe.spec.error_words import reason
from llama_stack_provider_moe.spec.playground import PromptRequest
from llama_stack_provider_moe.spec.routing import RoutingReport
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from llama_stack_provider_moe.spec.sweeps import SweepSpec
from llama_stack_provider_moe.spec.validation_errors import validated

ROOTS: tuple[type[BaseModel], ...] = (
    SFTSpec, DPOSpec, BreakerSpec, RoutingAnalysisSpec, AblationMeasureSpec, AblationSpec, SurgerySpec,
    ProbeSpec, ExportSpec, ProviderConfig, RoutingReport,
)  # fmt: skip
LARGEST = 2**53  # beyond it, JSON's numbers are not exact


class Found(BaseModel):
    """A number somewhere in a field."""

    model_config = {"arbitrary_types_allowed": True}

    where: str
    kind: type
    metadata: list[Any]


def numbers_in(annotation: Any, where: str, metadata: list[Any], seen: set[type]) -> Iterator[Found]:
    origin = get_origin(annotation)
    if origin is Annotated:
        base, *more = get_args(annotation)
        extra = [piece for each in more for piece in (each.metadata if isinstance(each, FieldInfo) else [each])]
        yield from numbers_in(base, where, [*metadata, *extra], seen)
    elif origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from numbers_in(part, where, metadata, seen)
    elif origin in (list, tuple, dict, set):
        for part in get_args(annotation):
            yield from numbers_in(part, f"{where}[]", [], seen)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from numbers_of(annotation, seen)
    elif annotation in (int, float):
        yield Found(where=where, kind=annotation, metadata=metadata)


def numbers_of(model: type[BaseModel], seen: set[type]) -> Iterator[Found]:
    if model in seen:
        return
    seen.add(model)
    for name, field in model.model_fields.items():
        yield from numbers_in(field.annotation, f"{model.__name__}.{name}", list(field.metadata), seen)


_SEEN: set[type] = set()
NUMBERS = [found for root in ROOTS for found in numbers_of(root, _SEEN)]


def test_the_walk_finds_numbers() -> None:
    names = {found.where for found in NUMBERS}
    assert {"Options.seed", "Curve.start", "ExpertRule.experts[]", "RayConfig.placement_s"} <= names
    assert len(names) > 80


@pytest.mark.parametrize("found", NUMBERS, ids=lambda found: found.where)
def test_every_number_is_bounded(found: Found) -> None:
    lows = [each.ge if isinstance(each, Ge) else each.gt for each in found.metadata if isinstance(each, Ge | Gt)]
    highs = [each.le if isinstance(each, Le) else each.lt for each in found.metadata if isinstance(each, Le | Lt)]
    assert lows, f"{found.where} has no least value"
    assert highs, f"{found.where} has no most value"
    assert -LARGEST <= lows[0] < highs[0] <= LARGEST, found
    adapter: TypeAdapter[Any] = TypeAdapter(Annotated[found.kind, *found.metadata])
    for absurd in (2**63, -(2**63), 1e308, -1e308, 10**400):
        with pytest.raises(ValidationError):
            adapter.validate_python(absurd)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from models_in(field.annotation)
    for part in get_args(annotation):
        yield from models_in(part)


NUMERIC_FIELDS = sorted(
    {
        (model, name)
        for root in (*ROOTS, SupervisedFineTuneRequest, PreferenceOptimizeRequest)
        for model in models_in(root)
        for name, field in model.model_fields.items()
        if any(True for _ in numbers_in(field.annotation, name, [], set()))
        and not any(True for _ in models_in(field.annotation))
    },
    key=lambda pair: (pair[0].__name__, pair[1]),
)


@pytest.mark.parametrize(("model", "name"), NUMERIC_FIELDS, ids=lambda each: getattr(each, "__name__", each))
def test_no_boolean_is_a_number(model: type[BaseModel], name: str) -> None:
    for value in (True, False, [True], {"0": True}, {"0": [True]}, {"attention": True}):
        with pytest.raises(ValidationError) as caught:
            model.model_validate({name: value})
        assert name in {error["loc"][0] for error in caught.value.errors() if error["loc"]}, value


def test_the_error_for_a_boolean_states_the_expectation() -> None:
    body = {
        "recipe": "sft", "model": "m", "data": {"dataset_id": "d"}, "training": {"n_epochs": True},
        "optimizer": {"lr": True}, "adapter": {"rules": [{"experts": {"0": True}}], "plan": "per_expert"},
    }  # fmt: skip
    with pytest.raises(InvalidBody) as caught:
        validated(SFTSpec, body)
    told = str(caught.value)
    assert "training.n_epochs: true is not valid; expected an integer" in told.replace("True", "true")
    assert "optimizer.lr: true is not valid; expected a number" in told.replace("True", "true")
    assert "adapter.rules.0.experts.0: true is not valid; expected an integer" in told.replace("True", "true")


@pytest.mark.parametrize("name", ["model", "model_from", "checkpoint_dir", "adapter.init_from"])
def test_no_name_is_empty(name: str) -> None:
    head, _, last = name.rpartition(".")
    body: dict[str, Any] = {"recipe": "sft", "model": "m", "data": {"dataset_id": "d"}}
    body |= {head: {last: ""}} if head else {last: ""}
    with pytest.raises(InvalidBody, match=rf"{name}: '' is not valid; expected at least 1 character"):
        validated(SFTSpec, body)


def test_the_error_for_layers_states_their_range() -> None:
    body = {"recipe": "sft", "model": "m", "data": {"dataset_id": "d"}, "adapter": {"layers": "0-999999999999"}}
    with pytest.raises(InvalidBody, match=r"adapter.layers: '0-999999999999' is not valid; expected numbers and ranges "
                       r"from 0 to 9999, such as '0-3,12'"):  # fmt: skip
        validated(SFTSpec, body)


WRONG: tuple[Any, ...] = (
    None, True, -1, 2**70, 0.5, float("nan"), "", "?", "x" * 200_000, [], [1], {}, {"?": 1}, [[{}]], ["x"] * 1100,
    {f"k{number}": {} for number in range(1100)}, b"x",
)  # fmt: skip


@pytest.mark.parametrize("root", [*ROOTS, PromptRequest, PlaygroundSpec, SweepSpec, JobChange])
def test_every_error_is_in_our_words(root: type[BaseModel]) -> None:
    """Pydantic's name Python's types, such as `List`, and begin with `Input should`."""
    for model in {*models_in(root)}:
        for name in model.model_fields:
            for value in WRONG:
                try:
                    model.model_validate({name: value})
                except ValidationError as error:
                    for each in error.errors(include_url=False):
                        told = reason(each)
                        assert each["type"] == "missing" or str(each["msg"]) not in told, (model, name, each["type"])


def test_every_pattern_has_words() -> None:
    """The error for a text that does not match says more than `text`."""
    patterns = {
        each.pattern
        for root in ROOTS
        for model in models_in(root)
        for field in model.model_fields.values()
        for each in field.metadata
        if getattr(each, "pattern", None) and model.__module__.startswith("llama_stack_provider_moe.spec")
    }
    assert patterns <= set(validation_errors._PATTERNS)
