"""A training process whose Triton product fails after some steps.

Start it by `python -m tests.support.faulty_training STEPS FOLDER`, with TRITON_INTERPRET=1 where there is no GPU. The
trial of kernels runs in another process, which is not faulty.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_stack_provider_moe.compute.moe.kernels import grouped
from llama_stack_provider_moe.compute.worker import main as entry

_product = grouped.product


def product(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """`grouped.product`; after the steps it fails as an illegal access does."""
    events = Path(sys.argv[2]) / "events.jsonl"
    if events.read_text(encoding="utf-8").count('"type":"step"') >= int(sys.argv[1]):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nMore of it.")
    return _product(*arguments, **options)


if __name__ == "__main__":
    grouped.product = product
    code = entry.main(sys.argv[2:])
    entry.flush()
    os._exit(code)
