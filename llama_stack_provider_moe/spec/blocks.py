"""The blocks that every job has, whatever it trains: data, length, optimiser, machine."""

from collections.abc import Iterable, Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

DType = Literal["fp32", "bf16", "fp16"]
RowFormat = Literal["auto", "instruct", "dialog"]
ExecutorName = Literal["local", "ray"]
Strategy = Literal["auto", "ddp", "fsdp", "ep"]
JOB_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
NUMBERS_PATTERN = r"^\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*$"
NUMBERS_LENGTH = 128  # characters: who asks for a range after another must not keep the server counting


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
    """0, 1, 2, 3, 7 -> `0-3`, `7`: the parts of a text that `numbers` reads."""
    runs: list[list[int]] = []
    for number in ascending:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]


class Block(BaseModel):
    """Base of every block: unknown keys are errors, numbers are finite, nothing is coerced in silence."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=(), strict=False)


class Data(Block):
    """Which rows, and how they are read."""

    dataset_id: str = Field(min_length=1, max_length=512, description="Data set registered with the host.")
    validation_dataset_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="Held-out data set; left out, `options.validation_split` of the rows are held out.",
    )
    format: RowFormat = Field(
        default="auto",
        description="instruct: single-turn rows; dialog: rows of messages; auto: each row says by its keys.",
    )
    shuffle: bool = Field(default=True, description="Shuffle the training rows before every epoch.")
    packed: bool = Field(
        default=False, description="SFT: fill sequences of `options.max_length` tokens with several rows."
    )
    train_on_input: bool = Field(default=False, description="SFT: loss on prompt tokens too, not on the answers alone.")


class Training(Block):
    """How long, and in what pieces."""

    n_epochs: int = Field(default=1, ge=1, le=1000, description="Passes over the training rows.")
    max_steps_per_epoch: int = Field(
        default=0, ge=0, description="Optimiser steps after which an epoch ends; 0: the whole epoch."
    )
    batch_size: int = Field(
        default=4, ge=1, le=4096, description="Rows (or pairs) in one micro-batch of one process (`resources`)."
    )
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, le=4096, description="Micro-batches of each process in one optimiser step."
    )
    max_validation_steps: int = Field(
        default=0, ge=0, description="Micro-batches of each process in one evaluation; 0: all held-out rows."
    )
    dtype: DType = Field(default="bf16", description="Parameters of the model and autocast; adapters stay in fp32.")


class Optimizer(Block):
    """The optimiser and its learning-rate curve."""

    optimizer_type: Literal["adam", "adamw", "sgd"] = Field(
        default="adamw", description="torch.optim.Adam, AdamW (decoupled weight decay) or SGD (no momentum)."
    )
    lr: float = Field(default=1e-4, gt=0, le=10, description="Peak learning rate.")
    weight_decay: float = Field(default=0.0, ge=0, le=10, description="Weight decay.")
    num_warmup_steps: int = Field(
        default=0, ge=0, description="Optimiser steps over which the rate rises from 0 to `lr`."
    )


class Efficiency(Block):
    """Memory against time."""

    enable_activation_checkpointing: bool = Field(
        default=False,
        description="Recompute activations in backward; always non-reentrant, or the aux loss loses its gradient.",
    )


class Resources(Block):
    """What a job needs of the machine."""

    gpus: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="GPUs of its own, of each node, each with a process that trains on its share of every step's rows; "
        "left out: one where there are any, else the CPU.",
    )
    processes: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="With `gpus` 0: processes of each node, which train together on the CPU; left out: one. On GPUs "
        "there is always one for each.",
    )
    nodes: int = Field(
        default=1, ge=1, le=64, description="Machines, each with as many GPUs or processes; more than one by `ray`."
    )
    executor: ExecutorName | None = Field(
        default=None,
        description="Where the job runs; local: on the supervisor's machine; ray: on a Ray cluster that the server "
        "names; left out: where the server says (`executors.default`) if it trains, else local.",
    )
    strategy: Strategy = Field(
        default="auto",
        description="ddp: each process holds the whole model; fsdp: each holds its share of every weight, and "
        "gathers a layer when it runs (FSDP2); ep: each holds its share of every layer's experts, to which tokens are "
        "sent; auto: on GPUs the first of them whose memory fits by the planner's estimate, on the CPU ddp.",
    )
    cpu_offload: bool = Field(
        default=False,
        description="With strategy fsdp, `adapter` null and GPUs: weights, gradients and optimiser state lie in the "
        "machine's memory, and the optimiser steps there; a GPU has what is gathered.",
    )

    @model_validator(mode="after")
    def _several_machines_by_ray(self) -> "Resources":
        if self.nodes > 1 and self.executor == "local":
            raise ValueError(f"nodes: {self.nodes} is not valid with executor 'local', which has one machine; expected "
                             "1, or executor 'ray'")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _a_process_for_each_gpu(self) -> "Resources":
        if self.strategy not in ("auto", "ddp") and self.ranks == 1:
            raise ValueError(f"strategy: {self.strategy!r} is not valid with one process; expected gpus 2 or more, or "
                             "gpus 0 with processes 2 or more")  # fmt: skip
        if self.processes in (None, self.gpus) or self.gpus == 0 or (self.processes == 1 and self.gpus is None):
            return self
        if self.gpus is None:
            raise ValueError(f"processes: {self.processes} is not valid without gpus; expected gpus 0 beside it (the "
                             f"CPU), or gpus {self.processes} in its place")  # fmt: skip
        raise ValueError(f"processes: {self.processes} is not valid with gpus {self.gpus}; expected nothing, for there "
                         "is one process for each GPU")  # fmt: skip

    @property
    def ranks(self) -> int:
        """Processes that train together, on all nodes."""
        return self.nodes * self.ranks_a_node

    @property
    def ranks_a_node(self) -> int:
        """Those of one node."""
        return self.processes or self.gpus or 1

    @property
    def sharded(self) -> bool:
        """Whether no process holds the whole model: then what runs it runs in all of them.

        Asked of a job that has begun, whose strategy is no longer auto.
        """
        return self.strategy not in ("auto", "ddp")


class OneProcess(Resources):
    """Those of a recipe that does not divide its work."""

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
