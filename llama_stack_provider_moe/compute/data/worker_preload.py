"""Prepare the process from which `options.dataloader_workers` are forked; it imports this first (see `workers`).

The import raises:
    ForkRefused: an import has started a thread, so a worker could hang.
"""

import gc
import os
import signal

from llama_stack_provider_moe.compute.runtime.threads import check_alone, forbid_threads
from llama_stack_provider_moe.ground.imports import uncollected_imports

forbid_threads(os.environ)

# For what a worker unpickles: rows, collators, and torch's worker loop.
with uncollected_imports():
    import datasets
    import torch.utils.data  # noqa: F401
    import trl.trainer.dpo_trainer
    import trl.trainer.kto_trainer
    import trl.trainer.sft_trainer  # noqa: F401

datasets.disable_progress_bars()
# A stop request is a signal to all processes of a job. The training process handles it, finishes the step and saves;
# workers end with it. The signal is blocked, not ignored: torch's worker loop sets its own handler and would end.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
check_alone()
gc.collect()
gc.freeze()
