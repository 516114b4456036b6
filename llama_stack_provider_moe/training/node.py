"""One node's part of a job on a cluster: `python -m llama_stack_provider_moe.training.node PLAN`.

The leader of the node's processes, which it forks as `launch` does on one machine. It looks once a second at what the
supervisor wishes (`jobs.cluster_run`) and passes it on, and dies with the process that started it. How its processes
ended goes to a descriptor of that one, for who was the cause is judged over all nodes.
"""

import ctypes
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from llama_stack_provider_moe.jobs.cluster_run import HEED_S, read_run
from llama_stack_provider_moe.jobs.folder import JobFolder
from llama_stack_provider_moe.training import main as entry
from llama_stack_provider_moe.training.launch import SET_PARENT_DEATH_SIGNAL, Group, Part
from llama_stack_provider_moe.training.peers import Address
from llama_stack_provider_moe.training.warmth import warm_up


@dataclass(frozen=True)
class Plan:
    """What a node is to do."""

    folder: str
    run: str  # that counts, see `jobs.cluster_run`
    node: int
    nodes: int
    size: int  # processes, of each node
    host: str  # where they meet, see `peers.Address`
    port: int
    own: str
    listening: int
    telling: int  # descriptor for the ends
    parent: int  # pid


def heed(folder: Path, run: str) -> signal.Signals | None:
    """What the processes of a run are to be sent."""
    try:
        now = read_run(folder)
    except (OSError, ValueError):  # a file server that hiccups; it is asked again
        return None
    if now is None or now.run != run or now.wish == "kill":
        return signal.SIGKILL
    return signal.SIGTERM if now.wish == "stop" else None


def main(plan: Plan) -> int:
    """From start to end of the node's processes; its exit code says nothing of theirs."""
    ctypes.CDLL(None, use_errno=True).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != plan.parent:
        return 1
    folder = JobFolder(Path(plan.folder))
    entry.be_quiet(folder)
    warm_up()
    address = Address(plan.host, plan.port, plan.own, plan.listening) if plan.nodes > 1 else None
    part = Part(plan.node, plan.nodes, address, lambda: heed(folder.root, plan.run), HEED_S)
    with open(1, "wb", buffering=0, closefd=False) as output:
        ends = Group(plan.size, lambda peers, report: entry.train_as(folder, peers, report), output, part).ends()
    with open(plan.telling, "w", encoding="utf-8") as telling:
        json.dump(asdict(ends), telling)
    return 0


if __name__ == "__main__":
    code = main(Plan(**json.loads(sys.argv[1])))
    entry.flush()
    os._exit(code)
