"""Keep the secrets in a training process's environment out of what it prints and reports.

A job's owner reads its log and events; the secrets belong to the server's operator.
"""

import json
import os
import sys
from collections.abc import Callable

from llama_stack_provider_moe.ground.redaction import known_secrets, scrubbed
from llama_stack_provider_moe.spec.server_config import SECRETS_VARIABLE


def environment_secrets() -> tuple[str, ...]:
    """The values in this process's environment that are secret."""
    return known_secrets(os.environ, json.loads(os.environ.get(SECRETS_VARIABLE, "[]")))


def redact_output() -> None:
    """From now on hide secrets in what Python code prints, logs or raises; not in what compiled code writes directly.

    The stream objects stay the same, because loggers already refer to them.
    """
    secrets = environment_secrets()
    for stream in (sys.stdout, sys.stderr):
        vars(stream).pop("write", None)  # from an earlier call, in a process that was forked or runs several jobs
        write = stream.write

        def hiding(text: str, write: Callable[[str], int] = write) -> int:
            write(scrubbed(text, secrets))
            return len(text)

        vars(stream)["write"] = hiding
