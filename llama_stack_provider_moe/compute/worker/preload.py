"""Import the libraries of every recipe, so that forks of this process can use them.

No import may start a thread or initialise CUDA, because a fork survives neither; both are checked. The heap is frozen
(`gc.freeze`), so that a child's garbage collector does not copy it page by page.
"""

import gc
import importlib
import os

from llama_stack_provider_moe.compute.runtime.threads import check_alone, forbid_threads
from llama_stack_provider_moe.ground.imports import uncollected_imports
from llama_stack_provider_moe.spec.recipes import RECIPES


def preload() -> None:
    """Import what every recipe needs.

    Raises:
        ForkRefused: this process has other threads; an import or earlier code started them.
    """
    forbid_threads(os.environ)
    # By default torch asks the CUDA runtime whether there is a device (bitsandbytes triggers this at import), and after
    # that no forked process can use CUDA. With this variable torch asks NVML instead.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    with uncollected_imports():
        import torch

        for recipe in RECIPES.values():
            importlib.import_module(recipe.module)
    initialised = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    assert not initialised, "an import has initialised CUDA: no child could use it"
    check_alone()
    gc.collect()
    gc.freeze()
