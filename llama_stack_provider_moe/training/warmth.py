"""The libraries of every recipe, imported so that forks of this process can use them.

No import may start a thread or initialise CUDA, neither of which a fork survives; both are asserted. The heap is frozen
(`gc.freeze`), so that a child's collector does not copy it page by page.
"""

import gc
import importlib
import os
import threading


def warm_up() -> None:
    """Import what every recipe needs."""
    # Left to itself torch asks the CUDA runtime whether there is a device (bitsandbytes does so when it is imported),
    # and a process whose parent has done that can't use CUDA. NVML is asked instead.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    for recipe in ("sft", "dpo", "circuit_breaker", "routing_analysis", "export"):
        importlib.import_module(f"llama_stack_provider_moe.training.recipes.{recipe}")
    initialised = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    assert not initialised, "an import has initialised CUDA: no child could use it"
    others = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    assert not others, f"imports have started threads, which no child would have: {others}"
    gc.collect()
    gc.freeze()
