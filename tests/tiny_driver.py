"""What a cluster runs for a job in place of `training.on_ray FOLDER RUN`: a tiny child that heeds `cluster.json`."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from tiny_child import main

SIGNALS = {"stop": signal.SIGTERM, "kill": signal.SIGKILL}


def heed(folder: Path, run: str) -> None:
    """Do once what is wished."""
    while True:
        now = json.loads((folder / "cluster.json").read_text())
        number = signal.SIGKILL if now["run"] != run else SIGNALS.get(now["wish"])
        if number is not None:
            os.kill(os.getpid(), number)
            if number == signal.SIGTERM:
                return
        time.sleep(0.1)


if __name__ == "__main__":
    threading.Thread(target=heed, args=(Path(sys.argv[1]), sys.argv[2]), daemon=True).start()
    sys.exit(main(Path(sys.argv[1])))
