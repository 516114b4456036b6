"""`Node`: the Ray actor that holds one node's resources for a job, and runs the leader of its processes (`node`).

Ray gives it CPUs and GPUs, and kills it when the driver ends; with it ends its leader, and with that the processes.
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

from llama_stack_provider_moe.jobs.cluster_run import ClusterRun, read_run
from llama_stack_provider_moe.training.launch import End, Ends
from llama_stack_provider_moe.training.node import Plan

# What a network file system may take to show a new file to its other machines (nfs(5), acdirmax).
SHARED_S = 60.0
_LOOK_S = 1.0
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Look:
    """What came from a node since the last look; `ends` once its processes have ended."""

    output: bytes
    ends: Ends | None = None


class Node:
    """One node's part of a job, from its address to its end.

    Args:
        address: of this node, as the others reach it; left out: as Ray says.
    """

    def __init__(self, address: str | None = None) -> None:
        if address is None:
            import ray

            address = ray.util.get_node_ip_address()
        self._address = str(address)
        self._door: socket.socket | None = None

    def address(self) -> str:
        """Of this node."""
        return self._address

    def listen(self) -> int:
        """A port of the system's choice where the job's processes can meet, open at this node's address alone."""
        self._door = socket.create_server((self._address, 0), backlog=4096)
        return int(self._door.getsockname()[1])

    def sees(self, folder: str, run: str) -> str | None:
        """What is wrong, unless this node sees the job's folder as the supervisor does, and may write there."""
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
        """Start the node's processes; see `Plan`.

        Raises:
            OSError: they can't be started.
            ValueError: cluster.json is damaged, or of another run.
        """
        wanted = read_run(Path(folder))
        if wanted is None or wanted.run != run:
            raise ValueError(f"run {run} was replaced")
        self._rank, self._ends = node * size, tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        listening = -1 if self._door is None else self._door.fileno()
        telling = self._ends.fileno()
        plan = Plan(folder, run, node, nodes, size, host, port, self._address, listening, telling, os.getpid())
        self._process = subprocess.Popen(
            [sys.executable, "-m", "llama_stack_provider_moe.training.node", json.dumps(asdict(plan))],
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
        if self._door is not None:  # rank 0 answers, or nobody does
            self._door.close()

    def look(self) -> Look:
        """What they printed meanwhile, waited for a second at most."""
        pipe = self._process.stdout
        assert pipe is not None
        ended = self._process.poll() is not None  # asked first: what it printed before stands in the pipe by then
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            output = pipe.read(_READ_BYTES) if selector.select(0 if ended else _LOOK_S) else None
        if output == b"":  # all who could write have ended
            self._process.wait()
        if output or not ended:
            return Look(output or b"")
        return Look(b"", self._ended())

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
        reason = f"the leader of node {self._address} ended with exit code {code}; the log says more"
        return Ends((End(self._rank, "failed", reason, "RuntimeError"),), {}, False)


def environment(own: dict[str, str], wanted: ClusterRun, gpus: int) -> dict[str, str]:
    """Of the node's processes: its own, what it lacks, and what was decided for it.

    Ray's variables stay behind, and so does OMP_NUM_THREADS, which Ray sets by what an actor has reserved; here each
    process gets its share of that. Which GPUs are seen is Ray's to say; none, where the job asks for none.
    """
    kept = {name: value for name, value in own.items() if not name.startswith("RAY_") and name != "OMP_NUM_THREADS"}
    threads = {"OMP_NUM_THREADS": str(wanted.cpus_per_process)}
    unseen = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return wanted.environment | kept | threads | wanted.overrides | unseen
