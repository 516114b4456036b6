"""`Node`: the Ray actor that reserves one node's resources for a job, and starts the leader of its processes (`node`).

Ray gives it CPUs and GPUs, and kills it when the driver ends. Then its leader ends too, and so do the processes.
"""

import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from llama_stack_provider_moe.compute.worker.process_group import End, Ends
from llama_stack_provider_moe.compute.worker.ray.node import NodePlan
from llama_stack_provider_moe.jobdir.cluster_run import ClusterRun, read_run

# The time that a network file system may take to show a new file on other machines (nfs(5), acdirmax).
SHARED_S = 60.0
_LOOK_S = 1.0
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class NodeReport:
    """What a node reported since the last look.

    Attributes:
        output: what its processes printed.
        ends: how they ended; None while they run.
    """

    output: bytes
    ends: Ends | None = None


class Node:
    """One node's part of a job.

    Args:
        address: where other nodes reach this one; None: the address that Ray knows.
    """

    def __init__(self, address: str | None = None) -> None:
        if address is None:
            import ray

            address = ray.util.get_node_ip_address()
        self._address = str(address)
        self._listener: socket.socket | None = None

    def address(self) -> str:
        """Where other nodes reach this one."""
        return self._address

    def listen(self) -> int:
        """Open a port where the job's processes can meet, only on this node's address; the system chooses it."""
        self._listener = socket.create_server((self._address, 0), backlog=4096)
        return int(self._listener.getsockname()[1])

    def sees(self, folder: str, run: str) -> str | None:
        """Check that this node sees the job's folder as the supervisor does, and may write there.

        Args:
            folder: the job's.
            run: name of the run that the folder should have.

        Returns:
            None, or what is wrong.
        """
        until = time.monotonic() + SHARED_S
        while True:
            found = None
            try:
                found = read_run(Path(folder))
                problem = "does not see it"
            except OSError as error:
                problem = f"can't read it ({error})"
            if found is not None and found.run == run:
                may_write = os.access(folder, os.W_OK | os.X_OK)
                return None if may_write else f"node {self._address} may not write into the job's folder {folder}"
            if time.monotonic() >= until:
                break
            time.sleep(1)
        what = "finds another run of the job there" if found is not None else problem
        return (
            f"node {self._address} {what}: the job's folder {folder}; `state_dir` has to be a path that every node of "
            "the cluster shares with the server"
        )

    def begin(self, folder: str, run: str, node: int, nodes: int, size: int, host: str, port: int, gpus: int) -> None:
        """Start the node's processes.

        Args:
            folder: the job's.
            run: name of the run.
            node: number of this node.
            nodes: number of nodes.
            size: processes on each node.
            host: address where all processes meet.
            port: port where all processes meet.
            gpus: GPUs on each node.

        Raises:
            OSError: they can't be started.
            ValueError: cluster.json is damaged, or names another run.
        """
        wanted = read_run(Path(folder))
        if wanted is None or wanted.run != run:
            raise ValueError(f"run {run} was replaced")
        self._rank, self._ends = node * size, tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        listening = -1 if self._listener is None else self._listener.fileno()
        telling = self._ends.fileno()
        plan = NodePlan(folder, run, node, nodes, size, host, port, self._address, listening, telling, os.getpid())
        self._process = subprocess.Popen(
            [sys.executable, "-m", "llama_stack_provider_moe.compute.worker.ray.node", json.dumps(asdict(plan))],
            bufsize=0,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment(dict(os.environ), wanted, gpus),
            pass_fds=[telling, *([listening] if listening >= 0 else [])],
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        if self._listener is not None:  # from here on only rank 0 listens
            self._listener.close()

    def look(self) -> NodeReport:
        """Wait for output for at most a second, and return it."""
        pipe = self._process.stdout
        assert pipe is not None
        ended = self._process.poll() is not None  # checked first: then all of its output is in the pipe
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            output = pipe.read(_READ_BYTES) if selector.select(0 if ended else _LOOK_S) else None
        if output == b"":  # all processes with the pipe have ended
            self._process.wait()
        if output or not ended:
            return NodeReport(output or b"")
        return NodeReport(b"", self._ended())

    def _ended(self) -> Ends:
        self._ends.seek(0)
        told = self._ends.read()
        if told:
            found = json.loads(told)
            said = tuple(End(**end) for end in found["said"])
            killed = {int(rank): number for rank, number in found["killed"].items()}
            return Ends(said, killed, found["asked_to_stop"])
        code = self._process.returncode
        if code < 0:
            return Ends((), {self._rank: -code}, False)
        reason = f"the leader of node {self._address} ended with exit code {code}; see the log"
        return Ends((End(self._rank, "failed", reason, "RuntimeError"),), {}, False)


def environment(own: dict[str, str], wanted: ClusterRun, gpus: int) -> dict[str, str]:
    """The environment of the node's processes.

    It has the node's own variables, the run's `environment` where the node has no value, and the run's `overrides`.
    Ray's variables are left out, and so is OMP_NUM_THREADS: Ray sets it to the number of CPUs that an actor reserved,
    and here each process gets its share of them. Ray decides which GPUs are visible; a job without GPUs sees none.
    """
    kept = {name: value for name, value in own.items() if not name.startswith("RAY_") and name != "OMP_NUM_THREADS"}
    threads = {"OMP_NUM_THREADS": str(wanted.cpus_per_process)}
    unseen = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return wanted.environment | kept | threads | wanted.overrides | unseen
