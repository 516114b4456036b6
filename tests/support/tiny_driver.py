"""Runs in a cluster instead of `compute.worker.ray.group FOLDER RUN`: a child for `cluster.json`."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from tiny_child import main

SIGNALS = {"stop": signal.SIGTERM, "kill": signal.SIGKILL}


def follow(folder: Path, run: str) -> None:
    """Follow each request once."""
    while True:
        now = json.loads((folder / "cluster.json").read_text())
        number = signal.SIGKILL if now["run"] != run else SIGNALS.get(now["wish"])
        if number is not None:
            os.kill(os.getpid(), number)
            if number == signal.SIGTERM:
                return
        time.sleep(0.1)


if __name__ == "__main__":
    threading.Thread(target=follow, args=(Path(sys.argv[1]), sys.argv[2]), daemon=True).start()
    sys.exit(main(Path(sys.argv[1])))
