"""Import the training libraries without collecting garbage in between."""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected_imports() -> Iterator[None]:
    """Inside, which is for imports, no garbage is collected, unless this process has imported TRL, the last of them.

    torch, transformers, PEFT and TRL create 650,000 objects, of which nearly none is garbage. Looking for it takes 1.8
    of the 11 s of their import (Python 3.12), and again 0.4 s in each full collection that a trainer asks for. So the
    objects of such a process are frozen afterwards: no collection looks at them (`gc.freeze`) before its last.
    """
    if "trl" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # extensions report as leaked what is there after the interpreter's end
