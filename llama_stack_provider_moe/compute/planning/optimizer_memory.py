"""The bytes that an optimiser keeps of a weight, and those that its step takes.

    sgd                           nothing
    adam, adamw                   two moments in the data type of the weight
    adamw_8bit, paged_adamw_8bit  two moments of a byte a number, and an fp32 scale for each 256 numbers of both; like
                                  paged_adamw for embeddings, and for weights below `optimizer.min_8bit_size`
    paged_adamw                   two moments in fp32

bitsandbytes pages the moments of weights with 100,000 numbers or more: CUDA keeps them in the GPU while there is room,
and in the machine's memory otherwise. So a GPU needs no more of them than those of the weight at work.
"""

from llama_stack_provider_moe.spec import Optimizer
from llama_stack_provider_moe.spec.blocks import IN_8_BITS, OF_BITSANDBYTES, PAGED

BLOCK = 256  # numbers that share a scale, as bitsandbytes fixes it
PAGED_FROM = 100_000  # numbers
_MOMENTS = {"adam": 2, "adamw": 2, "sgd": 0}  # tensors that torch's optimiser keeps for each weight


def in_8_bits(optimizer: Optimizer, numbers: int, looked_up: bool) -> bool:
    """Whether the moments of a weight take a byte a number.

    Args:
        optimizer: the job's.
        numbers: of the weight.
        looked_up: it is an embedding's.
    """
    return optimizer.optimizer_type in IN_8_BITS and numbers >= optimizer.min_8bit_size and not looked_up


def is_paged(optimizer: Optimizer, numbers: int) -> bool:
    """Whether CUDA may keep the moments of a weight in the machine's memory."""
    return optimizer.optimizer_type in PAGED and numbers >= PAGED_FROM


def state_bytes(optimizer: Optimizer, numbers: int, size: int, looked_up: bool = False) -> int:
    """The bytes that stay from step to step.

    Args:
        optimizer: the job's.
        numbers: of the weight.
        size: bytes of the weight, or of this process's share of it.
        looked_up: it is an embedding's.

    >>> state_bytes(Optimizer(), 1000, 4000), state_bytes(Optimizer(optimizer_type="adamw_8bit"), 5120, 10240)
    (8000, 10400)
    """
    if optimizer.optimizer_type not in OF_BITSANDBYTES:
        return _MOMENTS[optimizer.optimizer_type] * size
    if in_8_bits(optimizer, numbers, looked_up):
        return 2 * numbers + 2 * 4 * -(-numbers // BLOCK)
    return 2 * 4 * numbers


def step_bytes(optimizer: Optimizer, numbers: int, size: int, looked_up: bool, on_gpu: bool) -> int:
    """The bytes that the step of a weight takes at its peak, and frees again.

    Torch's step on a CPU makes two tensors as large as the weight; on a GPU it is one kernel. That of bitsandbytes
    decodes both moments on a CPU (gradient, root and quotient beside them) and is one kernel on a GPU. Steps with coded
    moments are bounded, which takes a copy of the weight. A bf16 weight is stepped as an fp32 copy, with its gradient,
    and rounded with noise (`compute.train.optimizers`).
    """
    if optimizer.optimizer_type not in OF_BITSANDBYTES:
        return 0 if on_gpu else 2 * size
    narrow, coded = size < 4 * numbers, in_8_bits(optimizer, numbers, looked_up)
    if on_gpu:
        moments = state_bytes(optimizer, numbers, size, looked_up) if is_paged(optimizer, numbers) else 0
        return moments + (13 if narrow or coded else 0) * numbers
    fp32 = 20 if coded else 12
    return (fp32 + (8 if narrow else 4 if coded else 0) + (1 if coded else 0)) * numbers
