"""One node's part of a job on a cluster: `python -m llama_stack_provider_moe.compute.worker.ray.node PLAN`.

The leader of the node's processes, which it forks as on one machine (`process_group`). Once a second it reads what the
supervisor wishes (`jobdir.cluster_run`) and sends the matching signal to the processes. It ends with the process that
started it. It writes how its processes ended to a file descriptor of that process, because the cause is found by
comparing all nodes.
"""

import ctypes
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from llama_stack_provider_moe.compute.runtime.peers import Address
from llama_stack_provider_moe.compute.worker import main as entry
from llama_stack_provider_moe.compute.worker.preload import preload
from llama_stack_provider_moe.compute.worker.process_group import (
    SET_PARENT_DEATH_SIGNAL,
    Ends,
    MachinePart,
    ProcessGroup,
)
from llama_stack_provider_moe.errors import ForkRefused
from llama_stack_provider_moe.ground.private import take_umask
from llama_stack_provider_moe.jobdir.cluster_run import HEED_S, read_run
from llama_stack_provider_moe.jobdir.folder import JobFolder


@dataclass(frozen=True)
class NodePlan:
    """One node's part of a job.

    Attributes:
        folder: the job's.
        run: the current run, see `jobdir.cluster_run`.
        node: number of this node.
        nodes: number of nodes.
        size: processes on each node.
        host: address where all processes meet, see `peers.Address`.
        port: port where they meet.
        own: address of this node.
        listening: file descriptor of the open port; -1: another node has it.
        telling: file descriptor for how the processes ended.
        parent: pid of the process that started this one.
    """

    folder: str
    run: str
    node: int
    nodes: int
    size: int
    host: str
    port: int
    own: str
    listening: int
    telling: int
    parent: int


def wished_signal(folder: Path, run: str) -> signal.Signals | None:
    """The signal to send to a run's processes, if any."""
    try:
        now = read_run(folder)
    except (OSError, ValueError):  # the file server has a problem; the next call reads again
        return None
    if now is None or now.run != run or now.wish == "kill":
        return signal.SIGKILL
    return signal.SIGTERM if now.wish == "stop" else None


def main(plan: NodePlan) -> int:
    """Run the node's processes to their end. The exit code does not say how they ended."""
    ctypes.CDLL(None, use_errno=True).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != plan.parent:
        return 1
    folder = JobFolder(Path(plan.folder))
    entry.be_quiet(folder)
    address = Address(plan.host, plan.port, plan.own, plan.listening) if plan.nodes > 1 else None
    part = MachinePart(plan.node, plan.nodes, address, lambda: wished_signal(folder.root, plan.run), HEED_S)
    try:
        preload()
        with open(1, "wb", buffering=0, closefd=False) as output:
            ends = ProcessGroup(
                plan.size, lambda peers, report: entry.train_as(folder, peers, report), output, part
            ).ends()
    except ForkRefused as refused:
        ends = Ends((entry.not_forked(plan.node * plan.size, refused),), {}, False)
    with open(plan.telling, "w", encoding="utf-8") as telling:
        json.dump(asdict(ends), telling)
    return 0


if __name__ == "__main__":
    take_umask(os.environ)
    code = main(NodePlan(**json.loads(sys.argv[1])))
    entry.flush()
    os._exit(code)
