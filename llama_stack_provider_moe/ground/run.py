"""Run a module that imports torch: `python -m llama_stack_provider_moe.ground.run MODULE ...`.

It is `python -m MODULE ...` in two thirds of the time for a short command: no garbage is collected during the imports
(`uncollected_imports`), and the libraries are not torn down at the end. Ctrl-C ends it without a traceback.
"""

import importlib
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

from llama_stack_provider_moe.ground.imports import uncollected_imports


def command(python: str, module: str) -> list[str]:
    """The command line, to which the module's own words are added.

    Args:
        python: the interpreter.
        module: full name of one of our modules, whose `main()` returns its exit code.
    """
    return [python, "-m", __name__, module]


def main() -> NoReturn:
    """Import the module that is named first, and run its `main`."""
    name = sys.argv.pop(1)
    answers = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not in the background
    if answers:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # libraries written in C++ abort if their import is interrupted
    with uncollected_imports():
        module = importlib.import_module(name)
    if answers:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code: int = module.main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        raise  # not reached
    with suppress(BrokenPipeError):  # nobody reads the rest
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # a normal end would take the libraries' modules apart one by one


if __name__ == "__main__":
    main()
