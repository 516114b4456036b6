"""Unsloth's import, before any other library's: it changes transformers, PEFT and bitsandbytes as it is imported.

Only a job with `loader: unsloth` gets here, in a process of an environment of its own (`constraints-unsloth.txt`).
Nothing of Unsloth is copied into this package, and nothing of it runs for other jobs.
"""

import importlib
import importlib.metadata
import os
import sys
from pathlib import Path

from llama_stack_provider_moe.errors import ModelError

NOTICE = (
    "loader unsloth: Unsloth is Apache-2.0 and unsloth_zoo LGPL-3.0-or-later, but their Mixture-of-Experts kernels "
    "(unsloth/kernels/moe) and patches (files of unsloth_zoo/temporary_patches) are AGPL-3.0. They run in this "
    "process, installed by the server's operator; this package holds none of their code"
)
LIBRARIES = ("unsloth", "unsloth_zoo")
_ENVIRONMENT = {
    "UNSLOTH_DISABLE_STATISTICS": "1",  # else it fetches a file from the hub to count its users
    # Its name is of its tests', which leave TRL's trainers as they are with it. So do we: options mean what they say,
    # and a job computes TRL's loss. On a machine with a GPU nothing else hangs on it (2026.10.7).
    "UNSLOTH_ALLOW_CPU": "1",
}


def import_unsloth(cache: Path) -> dict[str, str]:
    """Import it, so that TRL stays TRL's; versions of its parts.

    Args:
        cache: folder for the modules that it writes and imports.

    Raises:
        ModelError: it can't be imported here, or has rewritten TRL's trainers all the same.
    """
    os.environ.update(_ENVIRONMENT)
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(cache / "unsloth_compiled")
    try:
        importlib.import_module("unsloth")
    except (ImportError, NotImplementedError, RuntimeError) as error:
        text = " ".join(str(error).split())[:300]
        raise ModelError(
            f"loader: 'unsloth' can't be imported by {sys.executable} ({type(error).__name__}: {text}); is that the "
            "environment of constraints-unsloth.txt?"
        ) from error
    for trainer in ("SFTTrainer", "DPOTrainer"):
        module = getattr(importlib.import_module("trl"), trainer).__module__
        if not module.startswith("trl."):
            raise ModelError(f"loader: this Unsloth has put {module} in place of TRL's {trainer}; expected 2026.10.7")
    return {name: importlib.metadata.version(name) for name in LIBRARIES}
