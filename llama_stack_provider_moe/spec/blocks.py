"""The blocks that every job has, whatever it trains: data, training length, optimiser, machine."""

import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

DType = Literal["fp32", "bf16", "fp16"]
RowFormat = Literal[
    "auto", "instruct", "dialog", "messages", "prompt_completion", "openai_preference", "sharegpt", "alpaca",
    "hh_rlhf", "preference", "text", "llama_stack",
]  # fmt: skip
ExecutorName = Literal["local", "ray"]
Strategy = Literal["auto", "ddp", "fsdp", "ep"]
OptimizerType = Literal["adam", "adamw", "sgd", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
OF_BITSANDBYTES: tuple[OptimizerType, ...] = ("adamw_8bit", "paged_adamw", "paged_adamw_8bit")
IN_8_BITS: tuple[OptimizerType, ...] = ("adamw_8bit", "paged_adamw_8bit")
PAGED: tuple[OptimizerType, ...] = ("paged_adamw", "paged_adamw_8bit")
MIN_8BIT_SIZE = 4096  # bitsandbytes' default
JOB_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
MAX_STEPS = 10**9
NUMBERS_PATTERN = r"^\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*$"
NUMBERS_LENGTH = 128  # characters: a long list of ranges must not keep the server counting
EXPERTS_LENGTH = 4096  # characters: half of a layer's 1,024 experts, one by one


def numbers(text: str) -> Iterator[int]:
    """`0-3,7` -> 0, 1, 2, 3, 7.

    Raises:
        ValueError: a range ends before it begins.
    """
    for first, last in spans(text):
        yield from range(first, last + 1)


def spans(text: str) -> Iterator[tuple[int, int]]:
    """`0-3,7` -> (0, 3), (7, 7).

    Raises:
        ValueError: a range ends before it begins.
    """
    for part in text.split(","):
        first, _, last = part.partition("-")
        if last and int(last) < int(first):
            raise ValueError(f"range {part!r} ends before it begins")
        yield int(first), int(last or first)


def ranges(ascending: Iterable[int]) -> list[str]:
    """0, 1, 2, 3, 7 -> `0-3`, `7`: the inverse of `numbers`, one part of the text each."""
    runs: list[list[int]] = []
    for number in ascending:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]


def _experts_by_layer(given: dict[str, str]) -> dict[str, str]:
    for layer, experts in given.items():
        if not layer.isdecimal() or len(layer) > 4:
            raise ValueError(f"{layer!r} is not the number of a layer")
        if len(experts) > EXPERTS_LENGTH or not re.fullmatch(NUMBERS_PATTERN, experts):
            raise ValueError(f"{experts[:128]!r} does not name experts; expected numbers and ranges such as 0-3,7")
        for _ in spans(experts):  # checks each range without expanding it: there may be thousands of layers
            pass
    return given


# Layer -> numbers of experts: {"3": "0-3,7"}.
ExpertsByLayer = Annotated[dict[str, str], AfterValidator(_experts_by_layer)]


# The keys under which a schema holds other schemas (see `pydantic_core.core_schema`).
_INNER = ("schema", "items_schema", "keys_schema", "values_schema", "choices")


def _guarded(schema: object, of: type[BaseModel]) -> object:
    """`schema` with a check before each number; schemas of other models, which check their own, stay as they are."""
    if isinstance(schema, list | tuple):  # a tuple's items, or a union's choices, which may have labels
        return type(schema)(_guarded(each, of) for each in schema)
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type")
    if kind == "int":
        return core_schema.no_info_before_validator_function(_no_bool_as_int, cast(CoreSchema, schema))
    if kind == "float":
        return core_schema.no_info_before_validator_function(_no_bool_as_float, cast(CoreSchema, schema))
    if kind == "model" and schema["cls"] is not of:
        return schema
    if kind == "model-fields":
        return {**schema, "fields": {name: _guarded(each, of) for name, each in schema["fields"].items()}}
    return {**schema, **{key: _guarded(schema[key], of) for key in _INNER if key in schema}}


def _no_bool_as_int[Given](value: Given) -> Given:
    if isinstance(value, bool):
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    return value


def _no_bool_as_float[Given](value: Given) -> Given:
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "Input should be a valid number")
    return value


class NoBoolAsNumber(BaseModel):
    """A model that refuses a boolean where a number is expected: unless it is strict, pydantic reads true as 1.

    Strict numbers would also refuse `1e3` and `"4"` for an integer, which JSON writers and environment variables give.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[BaseModel], handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check every number of the model's own fields first, however deep in lists, objects and unions."""
        return cast(CoreSchema, _guarded(handler(source), cls))


class Block(NoBoolAsNumber):
    """Base of every block: unknown keys are errors, numbers are finite, and nothing is converted silently."""

    # Validators are built when a block is first used: a process imports many more blocks than it needs.
    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, protected_namespaces=(), strict=False, defer_build=True
    )


# For a block that a route takes as it is: FastAPI would build its validator at the first request, on the event loop.
BUILT_AT_ONCE = ConfigDict(defer_build=False)


class Training(Block):
    """The length of training, and the sizes of its steps."""

    n_epochs: int = Field(default=1, ge=1, le=1000, description="Passes over the training rows.")
    max_steps_per_epoch: int = Field(
        default=0, ge=0, le=MAX_STEPS, description="Optimiser steps after which an epoch ends; 0: all rows are used."
    )
    batch_size: int = Field(
        default=4, ge=1, le=4096, description="Rows (or pairs) in one micro-batch of one process (`resources`)."
    )
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, le=4096, description="Micro-batches of each process in one optimiser step."
    )
    max_validation_steps: int = Field(
        default=0,
        ge=0,
        le=MAX_STEPS,
        description="Micro-batches of each process in one evaluation; 0: all held-out rows are used.",
    )
    dtype: DType = Field(
        default="bf16",
        description="Data type of the model's parameters and of autocast; LoRA's is `adapter.dtype`.",
    )


class Optimizer(Block):
    """The optimiser and its learning rate."""

    optimizer_type: OptimizerType = Field(
        default="adamw",
        description="Optimiser. adam, adamw (decoupled weight decay), sgd (without momentum): torch.optim's, with "
        "moments in the data type of the weights. adamw_8bit: bitsandbytes' AdamW with moments of one byte a number, "
        "and one scale for 256 numbers (arXiv 2110.02861). paged_adamw, paged_adamw_8bit: the same in 32 or 8 bits, "
        "in memory that CUDA moves to the machine when the GPU is full; GPUs only. All three in fp32 arithmetic, "
        "and bf16 weights are rounded at random after each step.",
    )
    min_8bit_size: int = Field(
        default=MIN_8BIT_SIZE,
        ge=1,
        le=2**31 - 1,
        description="Numbers below which a weight's moments stay in 32 bits; those of embeddings always do. Only for "
        "adamw_8bit and paged_adamw_8bit.",
    )
    lr: float = Field(default=1e-4, gt=0, le=10, description="Peak learning rate.")
    weight_decay: float = Field(default=0.0, ge=0, le=10, description="Weight decay; 0: none.")
    num_warmup_steps: int = Field(
        default=0,
        ge=0,
        le=MAX_STEPS,
        description="Optimiser steps over which the learning rate rises from 0 to `lr`; 0: no warm-up.",
    )

    @model_validator(mode="after")
    def _size_is_for_8_bits(self) -> "Optimizer":
        if self.min_8bit_size != MIN_8BIT_SIZE and self.optimizer_type not in IN_8_BITS:
            raise ValueError(f"min_8bit_size: is used only with optimizer_type {' or '.join(map(repr, IN_8_BITS))}")
        return self


class Efficiency(Block):
    """Settings that trade time for memory."""

    enable_activation_checkpointing: bool = Field(
        default=False,
        description="Recompute activations in the backward pass, which saves memory and costs time; always "
        "non-reentrant, because the auxiliary loss would otherwise lose its gradient.",
    )
    offload_experts: bool = Field(
        default=False,
        description="Keep the frozen experts in the machine's memory (pinned if the job has a GPU); the device holds "
        "those of two layers, the one at work and the next, which is copied meanwhile. Needs `adapter.quantize_base`.",
    )


class Resources(Block):
    """What a job needs from the machine."""

    gpus: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="Number of GPUs on each node, for this job only; each has a process that trains on its share of "
        "every step's rows. 0: the CPU; left out: one GPU if the machine has any, else the CPU.",
    )
    processes: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="Number of processes on each node that train together on the CPU (`gpus` 0); left out: one. On "
        "GPUs there is always one process for each GPU.",
    )
    nodes: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Number of machines, each with as many GPUs or processes; more than one needs executor ray.",
    )
    executor: ExecutorName | None = Field(
        default=None,
        description="Place where the job runs. local: the supervisor's machine; ray: the Ray cluster in the server's "
        "configuration; left out: the server's `executors.default` if the job trains, else local.",
    )
    strategy: Strategy = Field(
        default="auto",
        description="Division of the model among processes. ddp: each process holds the whole model; fsdp: each holds "
        "its share of every weight, and gathers a layer to run it (FSDP2); ep: each holds its share of "
        "every layer's experts, and tokens are sent to them; auto: on GPUs the first of these whose "
        "memory fits by the planner's estimate, on the CPU ddp.",
    )
    cpu_offload: bool = Field(
        default=False,
        description="Keep weights, gradients and optimiser state in the machine's memory, and run the optimiser "
        "there; a GPU holds only the layers that are gathered. Needs strategy fsdp, `adapter` null and "
        "GPUs.",
    )

    @model_validator(mode="after")
    def _several_machines_need_ray(self) -> "Resources":
        if self.nodes > 1 and self.executor == "local":
            raise ValueError(f"nodes: {self.nodes} is not valid with executor 'local', which has one machine; expected "
                             "1, or executor 'ray'")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _one_process_for_each_gpu(self) -> "Resources":
        if self.strategy not in ("auto", "ddp") and self.ranks == 1:
            raise ValueError(f"strategy: {self.strategy!r} is not valid with one process; expected gpus 2 or more, or "
                             "gpus 0 with processes 2 or more")  # fmt: skip
        if self.processes in (None, self.gpus) or self.gpus == 0 or (self.processes == 1 and self.gpus is None):
            return self
        if self.gpus is None:
            raise ValueError(f"processes: {self.processes} is not valid without gpus; expected also gpus 0 (the "
                             f"CPU), or gpus {self.processes} instead")  # fmt: skip
        raise ValueError(f"processes: {self.processes} is not valid with gpus {self.gpus}; leave it out, because "
                         "there is one process for each GPU")  # fmt: skip

    @property
    def ranks(self) -> int:
        """Number of processes that train together, on all nodes."""
        return self.nodes * self.ranks_a_node

    @property
    def ranks_a_node(self) -> int:
        """Number of processes on one node."""
        return self.processes or self.gpus or 1

    @property
    def sharded(self) -> bool:
        """Whether no process holds the whole model, so that every process takes part whenever it runs.

        Valid for a job that has started: its strategy is no longer auto.
        """
        return self.strategy not in ("auto", "ddp")


class OneProcess(Resources):
    """Resources of a recipe that runs in one process."""

    @model_validator(mode="after")
    def _one_process(self) -> "OneProcess":
        if self.nodes > 1:
            raise ValueError(
                f"nodes: {self.nodes} is not valid with this recipe, which runs in one process; expected 1"
            )
        if self.ranks > 1:
            raise ValueError(f"{'gpus' if self.gpus else 'processes'}: {self.ranks} is not valid with this recipe, "
                             "which runs in one process; expected 0 or 1")  # fmt: skip
        return self
