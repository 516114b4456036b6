"""The trial of kernels with a fault in their product: `python -m tests.support.faulty_trial FAULT`.

quack-kernels' GEMM, which needs a GPU, is its documented arithmetic here. Start it as `kernel_trial` is started, with
TRITON_INTERPRET=1 where there is no GPU.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from llama_stack_provider_moe.compute.moe import kernel_trial
from llama_stack_provider_moe.compute.moe.kernels import grouped, quack
from tests.support import quack_gemm

_triton, _quack = grouped.product, quack.product


class OddError(BaseException):
    """Derived from no error that anybody handles."""


def _raise(*_: Any) -> None:
    raise OddError("the kernel has had enough")


FAULTS: dict[str, Callable[[Tensor], object]] = {
    "none": lambda out: None,
    "raises": _raise,
    "asserts": lambda out: os.abort(),
    "hangs": lambda out: time.sleep(600),
    "ends": lambda out: os._exit(0),
    "is killed": lambda out: os.kill(os.getpid(), signal.SIGKILL),
    "has a wrong tile": lambda out: out[:16, -16:].mul_(-1),
    "has a NaN": lambda out: out[3].fill_(float("nan")),
}


def faulty(
    product: Callable[..., tuple[Tensor, Tensor | None]], fault: str
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A product of kernels, then the fault."""

    def wrong(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        out, low = product(*arguments, **options)
        FAULTS[fault](out)
        return out, low

    return wrong


def main(fault: str) -> None:
    """The trial that standard input describes, with the fault."""
    grouped.product, quack.product = faulty(_triton, fault), faulty(_quack, fault)
    quack.gemm = lambda: quack_gemm.gemm  # type: ignore[assignment]
    kernel_trial.main()


if __name__ == "__main__":
    main(sys.argv[1])
