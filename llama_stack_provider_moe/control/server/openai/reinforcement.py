"""The method `reinforcement`: its block of a request, and what a job says of it.

OpenAI's `batch_size` counts prompts, ours counts answers. Its `compute_multiplier` is how much a prompt is explored,
which is the number of answers to it here.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

from pydantic import Field

from llama_stack_provider_moe.control.server.openai import objects
from llama_stack_provider_moe.control.server.openai.auto import IntegerOrAuto, NumberOrAuto
from llama_stack_provider_moe.control.server.openai.methods import BASE_ANSWERS
from llama_stack_provider_moe.control.server.wire import JsonObject
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec import GRPOSpec
from llama_stack_provider_moe.spec.blocks import Block

PLACE = "method.reinforcement"
type Put = Callable[[str, object, str], None]


class ReinforcementHyperparametersRequest(Block):
    """Hyperparameters; `auto`, null and a field that is left out mean the server's choice."""

    n_epochs: IntegerOrAuto = Field(default=None, description="Passes over the prompts.")
    batch_size: IntegerOrAuto = Field(default=None, ge=1, le=1 << 20, description="Prompts in one optimiser step.")
    learning_rate_multiplier: NumberOrAuto = Field(
        default=None, gt=0, le=1000, description="Learning rate divided by 1e-5."
    )
    compute_multiplier: NumberOrAuto = Field(
        default=None,
        gt=0,
        le=256,
        description="Answers to each prompt, divided by 4; the product is a whole number from 2 on.",
    )
    eval_interval: IntegerOrAuto = Field(
        default=None, description="Only `auto`: held-out prompts are answered after each epoch."
    )
    eval_samples: IntegerOrAuto = Field(
        default=None, description="`auto` or 1: each held-out prompt gets its likeliest answer."
    )
    reasoning_effort: Literal["default", "low", "medium", "high"] | None = Field(
        default=None, description="Only `default`: models have no such setting here."
    )


class ReinforcementRequest(Block):
    """The block `reinforcement` of a method."""

    grader: JsonObject = Field(description="Grader of each answer, with `type` and `name`; not `python`.")
    hyperparameters: ReinforcementHyperparametersRequest | None = None
    response_format: JsonObject | None = Field(
        default=None, description='Only `{"type": "text"}`: answers are not held to a form while they are generated.'
    )


def write(asked: ReinforcementRequest, put: Put, complete: Mapping[str, object]) -> None:
    """Write the grader, and what is counted in another way than in a job.

    Args:
        asked: the block.
        put: sets a field of the job: its name, the value, the name in the request.
        complete: the job as far as the request states it elsewhere, with the server's defaults.

    Raises:
        InvalidInput: a setting that this server does not have, or numbers that do not divide.
    """
    given = asked.hyperparameters or ReinforcementHyperparametersRequest()
    place = f"{PLACE}.hyperparameters"
    _refuse(asked, given, place)
    put("reward", [{"grader": asked.grader}], f"{PLACE}.grader")
    answers = _number(complete, "rl", "n_generations", BASE_ANSWERS)
    if given.compute_multiplier is not None:
        wanted = given.compute_multiplier * BASE_ANSWERS
        answers = round(wanted)
        if answers < 2 or not math.isclose(wanted, answers):
            raise InvalidInput(f"{place}.compute_multiplier", given.compute_multiplier, "a number whose product with "
                               f"{BASE_ANSWERS} is a whole number of answers to each prompt, at least 2")  # fmt: skip
        put("rl.n_generations", answers, f"{place}.compute_multiplier")
    micro_batches = _number(complete, "training", "gradient_accumulation_steps", 1)
    if given.batch_size is not None:
        total = given.batch_size * answers
        if total % micro_batches:
            raise InvalidInput(f"{place}.batch_size", given.batch_size, f"a number whose product with {answers}, the "
                               f"answers to each prompt, is a multiple of {micro_batches}, the micro-batches of a step "
                               "(gradient_accumulation_steps)")  # fmt: skip
        put("training.batch_size", total // micro_batches, f"{place}.batch_size")
    elif "batch_size" not in _block(complete, "training"):
        put("training.batch_size", answers, f"{place}.batch_size")  # auto: a prompt in each micro-batch


def _refuse(asked: ReinforcementRequest, given: ReinforcementHyperparametersRequest, place: str) -> None:
    form = asked.response_format
    if form is not None and form != {"type": "text"}:
        raise InvalidInput(f"{PLACE}.response_format", form.get("type"), "'text': this server does not hold answers to "
                           "a form while it generates them; a grader of type 'json_schema' rewards those that have "
                           "it")  # fmt: skip
    if given.eval_interval is not None:
        raise InvalidInput(f"{place}.eval_interval", given.eval_interval, "'auto': held-out prompts are answered after "
                           "each epoch")  # fmt: skip
    if given.eval_samples not in (None, 1):
        raise InvalidInput(f"{place}.eval_samples", given.eval_samples, "1 or 'auto': each held-out prompt gets its "
                           "likeliest answer")  # fmt: skip
    if given.reasoning_effort not in (None, "default"):
        raise InvalidInput(f"{place}.reasoning_effort", given.reasoning_effort, "'default': models have no such "
                           "setting here")  # fmt: skip


def _number(blocks: Mapping[str, object], block: str, name: str, default: int) -> int:
    """A number of a block that may not be valid, which is refused later."""
    found = _block(blocks, block).get(name, default)
    return found if type(found) is int and found > 0 else default


def _block(body: Mapping[str, object], name: str) -> Mapping[str, object]:
    block = body.get(name)
    return block if isinstance(block, Mapping) else {}


def described(spec: GRPOSpec, found: objects.FineTuningHyperparameters) -> objects.FineTuningMethod | None:
    """Return the method of a job; None where its rewards are more than one grader for all prompts."""
    (reward, *others) = spec.reward
    if others or reward.weight != 1:
        return None
    hyperparameters = objects.ReinforcementHyperparameters(
        **found.model_dump(), compute_multiplier=spec.rl.n_generations / BASE_ANSWERS
    )
    grader = reward.grader.model_dump(mode="json", exclude_none=True)
    if not grader.get("sampling_params", True):
        del grader["sampling_params"]
    block = objects.ReinforcementMethod(grader=grader, hyperparameters=hyperparameters)
    return objects.FineTuningMethod(type="reinforcement", reinforcement=block)


def prompts_of_a_step(spec: GRPOSpec) -> int | None:
    """Return the prompts of an optimiser step; None where the answers to a prompt are divided among steps."""
    training = spec.training
    answers = training.batch_size * training.gradient_accumulation_steps * spec.resources.ranks
    return None if answers % spec.rl.n_generations else answers // spec.rl.n_generations
