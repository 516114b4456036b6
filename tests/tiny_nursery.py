"""A nursery whose children are tiny ones: the real one's loop, without the imports."""

import os
import socket
import sys
import time
from pathlib import Path

from llama_stack_provider_moe.training.nursery import serve
from tests import tiny_child

WAITS_FOR = "TINY_NURSERY_WAITS_FOR"  # a file that must be there before it is ready: imports that take long

if __name__ == "__main__":
    while WAITS_FOR in os.environ and not Path(os.environ[WAITS_FOR]).exists():
        time.sleep(0.01)
    with socket.socket(fileno=int(sys.argv[1])) as door:
        serve(door, lambda arguments: tiny_child.main(Path(arguments[0])))
    os._exit(0)
