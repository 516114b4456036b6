"""Which interpreter runs a job: the training environment's, or that of Unsloth's, which needs versions of its own."""

import json
from contextlib import suppress
from pathlib import Path

from llama_stack_provider_moe.config import ProviderConfig
from llama_stack_provider_moe.jobs.folder import JobFolder


def interpreter(config: ProviderConfig, folder: Path) -> str:
    """The interpreter for the job in `folder`; a spec that can't be read is left to the training process to tell of.

    Raises:
        FileNotFoundError: the job wants Unsloth, and the server has no environment for it any more.
    """
    loader = None
    with suppress(OSError, ValueError, AttributeError):
        loader = json.loads(JobFolder(folder).spec.read_bytes()).get("loader")
    if loader != "unsloth":
        return config.training_python
    if config.unsloth_python is None:
        raise FileNotFoundError("loader: 'unsloth' needs `unsloth_python` in the server's config, which names none")
    return config.unsloth_python
