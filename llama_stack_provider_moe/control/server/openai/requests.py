"""The request that creates a fine-tuning job, and the job that it asks for."""

import copy
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from llama_stack_provider_moe.control.server.api_requests import Draft
from llama_stack_provider_moe.control.server.openai import reinforcement
from llama_stack_provider_moe.control.server.openai.auto import IntegerOrAuto, NumberOrAuto
from llama_stack_provider_moe.control.server.openai.methods import BASE_LR, RECIPES, Recipe
from llama_stack_provider_moe.control.server.openai.reinforcement import (
    ReinforcementHyperparametersRequest,
    ReinforcementRequest,
)
from llama_stack_provider_moe.control.server.wire import JsonObject
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.blocks import BUILT_AT_ONCE, Block, Resources
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from llama_stack_provider_moe.spec.serving_config import gguf_of
from llama_stack_provider_moe.spec.validation_errors import validated

_SUFFIX = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"  # PROJECT_PATTERN: a suffix begins the name of a job
# Fields of a job that the block `moe` can't state, and where this request does.
_ELSEWHERE = {
    "recipe": "`method.type`", "model": "`model`", "model_from": "`model`", "job_uuid": "`suffix`",
    "metadata": "`metadata`", "beta": "`method.dpo.hyperparameters.beta`",
}  # fmt: skip


class HyperparametersRequest(Block):
    """Hyperparameters; `auto`, null and a field that is left out mean the server's choice."""

    n_epochs: IntegerOrAuto = Field(default=None, description="Passes over the training rows.")
    batch_size: IntegerOrAuto = Field(
        default=None, ge=1, le=1 << 20, description="Rows (or pairs) in one optimiser step of all processes."
    )
    learning_rate_multiplier: NumberOrAuto = Field(
        default=None, gt=0, le=1000, description="Learning rate divided by 1e-4 for supervised, by 5e-6 for dpo."
    )


class DPOHyperparametersRequest(HyperparametersRequest):
    """The same, with DPO's own."""

    beta: NumberOrAuto = Field(
        default=None, description="Weight of the penalty that keeps the model near the reference model."
    )


class SupervisedRequest(Block):
    """The block `supervised` of a method."""

    hyperparameters: HyperparametersRequest | None = None


class DPORequest(Block):
    """The block `dpo` of a method."""

    hyperparameters: DPOHyperparametersRequest | None = None


class MethodRequest(Block):
    """The method, and the block of its type."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: SupervisedRequest | None = None
    dpo: DPORequest | None = None
    reinforcement: ReinforcementRequest | None = None


class WandbRequest(Block):
    """Where Weights & Biases gets the figures."""

    project: str = Field(description="Name of the project.")
    entity: str | None = Field(default=None, description="User or team that owns the project.")
    name: str | None = Field(default=None, description="Not available: a run has the name of its job.")
    tags: list[str] | None = Field(default=None, description="Not available.")


class IntegrationRequest(Block):
    """A tracker for the figures of the job."""

    type: Literal["wandb"]
    wandb: WandbRequest


class FineTuningRequest(Block):
    """The body of a request for a fine-tuning job."""

    model_config = BUILT_AT_ONCE

    model: str = Field(description="Model to load: a hub id, the result of one of your jobs, or an allowed folder.")
    training_file: str = Field(
        description="Rows: a data set that you uploaded (`NAME`, `data:NAME`), or a file or data set of the host."
    )
    validation_file: str | None = Field(default=None, description="Held-out rows, named like `training_file`.")
    method: MethodRequest | None = Field(default=None, description="Left out: supervised.")
    hyperparameters: HyperparametersRequest | None = Field(
        default=None, description="The older place of supervised hyperparameters; `method` replaces it."
    )
    suffix: str | None = Field(
        default=None, pattern=_SUFFIX, description="Beginning of the name of the job and its result."
    )
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        default=None, max_length=16, description="Your own keys and texts, to find the job by."
    )
    seed: int | None = Field(default=None, description="Seed for new weights, row order and the validation split.")
    integrations: list[IntegrationRequest] | None = Field(default=None, max_length=1, description="At most one.")
    moe: JsonObject | None = Field(
        default=None,
        description="Extension: any blocks of a job (`adapter`, `moe`, `options`, `export`, `resources`, ...), for "
        "what this request has no field for.",
    )


class _Asked(NamedTuple):
    """The method of a request, with its hyperparameters and their place in the request."""

    recipe: Recipe
    hyperparameters: HyperparametersRequest | ReinforcementHyperparametersRequest
    place: str
    reinforcement: ReinforcementRequest | None = None


class _Writer:
    """Writes a request's fields into the body of a job, beside the blocks that `moe` states."""

    def __init__(self, moe: JsonObject) -> None:
        for key, where in _ELSEWHERE.items():
            if key in moe:
                raise InvalidInput(f"moe.{key}", moe[key], f"no value: {where} of the request states it")
        self.body: dict[str, Any] = copy.deepcopy(moe)
        self.names = {key: f"moe.{key}" for key in moe}

    def put(self, target: str, value: object, place: str) -> None:
        """Set the field `target` of the job.

        Raises:
            InvalidInput: `moe` states it too, or has something else where its block belongs.
        """
        *parents, last = target.split(".")
        block, path = self.body, "moe"
        for part in parents:
            path = f"{path}.{part}"
            if block.get(part) is None:
                block[part] = {}
            if not isinstance(block[part], dict):
                raise InvalidInput(path, block[part], "an object")
            block = block[part]
        if last in block:
            raise InvalidInput(f"{path}.{last}", block[last], f"no value: {place} states it")
        block[last] = value
        self.names[target] = place


def drafted(body: object, config: ProviderConfig) -> tuple[FineTuningRequest, Draft]:
    """Return the request in a body, and the job that it asks for.

    Raises:
        InvalidInput: the body is not such a request, or two of its fields contradict each other.
    """
    request = validated(FineTuningRequest, body)
    return request, _draft(request, config)


def _draft(request: FineTuningRequest, config: ProviderConfig) -> Draft:
    asked = _asked(request)
    writer = _Writer(request.moe or {})
    writer.body["recipe"] = asked.recipe
    writer.put("model", request.model, "model")
    writer.put("data.dataset_id", request.training_file, "training_file")
    if request.validation_file is not None:
        writer.put("data.validation_dataset_id", request.validation_file, "validation_file")
    if request.suffix is not None:
        writer.put("job_uuid", f"{request.suffix}-{uuid.uuid4().hex[:12]}", "suffix")
    if request.metadata is not None:
        writer.put("metadata", request.metadata, "metadata")
    if request.seed is not None:
        writer.put("options.seed", request.seed, "seed")
    for integration in request.integrations or []:
        _put_wandb(writer, integration.wandb)
    _put_hyperparameters(writer, asked, config)
    _ask_for_serving(writer.body, config)
    return Draft(writer.body, writer.names)


def _ask_for_serving(body: dict[str, Any], config: ProviderConfig) -> None:
    """Let the result be served where this server can, unless the request or the server's defaults say otherwise."""
    given = body.get("export", {})
    if given == {"serve": False}:  # as an export it would ask for nothing
        del body["export"]
        return
    complete = config.defaults.under(body)
    is_stated = not isinstance(given, dict) or "serve" in {**config.defaults.export, **given}
    if config.serving is None or is_stated:
        return
    if gguf_of(config.serving) is not None or complete.get("adapter") is not None:  # vLLM serves adapters alone
        body["export"] = {**given, "serve": True}


def _asked(request: FineTuningRequest) -> _Asked:
    method = request.method or MethodRequest(type="supervised")
    for other in ("supervised", "dpo", "reinforcement"):
        if other != method.type and getattr(method, other) is not None:
            raise InvalidInput(f"method.{other}", "a block", f"no value, because method.type is {method.type!r}")
    place = f"method.{method.type}.hyperparameters"
    if method.type == "reinforcement" and method.reinforcement is None:
        raise InvalidInput("method.reinforcement", None, "an object with the grader")
    block = method.supervised or method.dpo or method.reinforcement  # no other one is set
    given = None if block is None else block.hyperparameters
    if request.hyperparameters is not None:
        if method.type != "supervised" or given is not None:
            raise InvalidInput("hyperparameters", "a block", f"no value: {place} has them")
        place, given = "hyperparameters", request.hyperparameters
    return _Asked(RECIPES[method.type], given or HyperparametersRequest(), place, method.reinforcement)


def _put_wandb(writer: _Writer, wandb: WandbRequest) -> None:
    place = "integrations.0.wandb"
    if wandb.name is not None:
        raise InvalidInput(f"{place}.name", wandb.name, "no value: a run has the name of its job")
    if wandb.tags:
        raise InvalidInput(f"{place}.tags", wandb.tags, "no tags: this server does not send them")
    writer.put("trackers.wandb.project", wandb.project, f"{place}.project")
    if wandb.entity is not None:
        writer.put("trackers.wandb.entity", wandb.entity, f"{place}.entity")


def _put_hyperparameters(writer: _Writer, asked: _Asked, config: ProviderConfig) -> None:
    given = asked.hyperparameters
    if given.n_epochs is not None:
        writer.put("training.n_epochs", given.n_epochs, f"{asked.place}.n_epochs")
    if isinstance(given, DPOHyperparametersRequest) and given.beta is not None:
        writer.put("beta", given.beta, f"{asked.place}.beta")
    if given.learning_rate_multiplier is not None:
        lr = BASE_LR[asked.recipe] * given.learning_rate_multiplier
        writer.put("optimizer.lr", lr, f"{asked.place}.learning_rate_multiplier")
    complete = config.defaults.under(writer.body)  # of the server, with what the request states
    if "lr" not in _block(complete, "optimizer"):
        writer.put("optimizer.lr", BASE_LR[asked.recipe], f"{asked.place}.learning_rate_multiplier")
    if asked.reinforcement is not None:
        reinforcement.write(asked.reinforcement, writer.put, complete)
        writer.names["reward.0.grader"] = f"{reinforcement.PLACE}.grader"
    elif given.batch_size is not None:
        place = f"{asked.place}.batch_size"
        share = _micro_batches(complete)
        if given.batch_size % share:
            raise InvalidInput(place, given.batch_size, f"a multiple of {share}: each step has that many micro-batches "
                               "(gradient_accumulation_steps of each process)")  # fmt: skip
        writer.put("training.batch_size", given.batch_size // share, place)


def _micro_batches(complete: Mapping[str, object]) -> int:
    """The number of micro-batches in an optimiser step; 1 where a block is not valid, which is refused later."""
    accumulated = _block(complete, "training").get("gradient_accumulation_steps", 1)
    try:
        ranks = Resources.model_validate(_block(complete, "resources")).ranks
    except ValidationError:
        ranks = 1
    return ranks * (accumulated if type(accumulated) is int and accumulated > 0 else 1)


def _block(body: Mapping[str, object], name: str) -> Mapping[str, object]:
    block = body.get(name)
    return block if isinstance(block, Mapping) else {}
