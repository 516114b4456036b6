"""A training process with Unsloth on a machine without a GPU: `PYTHON -m tests.support.unsloth_driverless FOLDER`.

Unsloth 2026.10.7 imports there, but FastModel.from_pretrained needs the GPU's name, its compute capability and
whether it supports bfloat16 before it loads anything. This module answers these three questions; everything else is
Unsloth's and runs on the CPU: loading, LoRA, and the models' passes. Its Triton kernels do not run here, nor does TRL
1.15's head, which is one (1.16 has it in plain torch too): our plain head replaces it. So neither of them is tested.
"""

import os
import sys
import tempfile
from pathlib import Path

from llama_stack_provider_moe.compute.models.unsloth.entry import import_unsloth
from llama_stack_provider_moe.compute.worker.main import flush, main


def answer_for_the_gpu() -> None:
    import torch
    from unsloth.models import _utils, loader, vision

    vision.get_device_stats = lambda: ("CPU. ", "No CUDA.", 0.0)
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    for module in (_utils, loader, vision):
        module.is_bfloat16_supported = lambda *_, **__: True
    from llama_stack_provider_moe.compute.train import trainer

    trainer.needs_plain_head = lambda _: True


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        import_unsloth(Path(folder))
        answer_for_the_gpu()
    code = main(sys.argv[1:])
    flush()
    os._exit(code)
