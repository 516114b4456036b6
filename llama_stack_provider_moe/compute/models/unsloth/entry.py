"""Import Unsloth before any other library, because its import changes transformers, PEFT and bitsandbytes.

Only jobs with `loader: unsloth` do this, in a process of a separate environment (`constraints-unsloth.txt`). This
package contains no code of Unsloth, and other jobs do not run it.
"""

import importlib
import importlib.metadata
import os
import sys
from pathlib import Path

from llama_stack_provider_moe.errors import ModelError

NOTICE = (
    "loader unsloth: Unsloth is Apache-2.0 and unsloth_zoo LGPL-3.0-or-later, but their Mixture-of-Experts kernels "
    "(unsloth/kernels/moe) and patches (files of unsloth_zoo/temporary_patches) are AGPL-3.0. The server's operator "
    "installed them, and they run in this process; this package contains none of their code"
)
LIBRARIES = ("unsloth", "unsloth_zoo")
_ENVIRONMENT = {
    "UNSLOTH_DISABLE_STATISTICS": "1",  # otherwise it downloads a file from the hub to count its users
    # Unsloth's tests set this variable to keep TRL's trainers unchanged. Jobs need the same, so that options keep their
    # meaning and the loss is TRL's. On a machine with a GPU it has no other effect (2026.10.7).
    "UNSLOTH_ALLOW_CPU": "1",
}


def import_unsloth(cache: Path) -> dict[str, str]:
    """Import Unsloth without its changes to TRL.

    Args:
        cache: folder for the modules that Unsloth writes and imports.

    Returns:
        The versions of its packages.

    Raises:
        ModelError: this environment can't import it, or it has replaced TRL's trainers anyway.
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
            raise ModelError(f"loader: this Unsloth replaced TRL's {trainer} by {module}; expected version 2026.10.7")
    return {name: importlib.metadata.version(name) for name in LIBRARIES}
