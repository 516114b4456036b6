"""The processes that train one job together, from the view of one of them.

Control messages (requests to stop, decisions of rank 0, barriers) use gloo on the CPU, whatever carries the gradients,
so they do not wait for a GPU. `ALONE` is the single process of most jobs: every operation is the identity and does not
need torch.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor
    from torch._C._distributed_c10d import Store

# Rank 0 merges, evaluates and saves while the others wait for it, which may take hours. A dead process is noticed
# immediately, by its connection or by the process that started it, and one that hangs by `supervisor.stall_s`.
WAIT_LIMIT = timedelta(days=7)
# For all processes to connect to rank 0's address: some machines import more slowly than others.
MEETING_LIMIT = timedelta(minutes=30)
# Parts of the errors that a process gets when a process that it is connected to ends (gloo, NCCL, TCP).
_TRACES = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


@dataclass(frozen=True)
class Address:
    """The address where processes on several machines connect: rank 0 listens there.

    Attributes:
        host: of rank 0's machine, as the others reach it.
        port: at that host.
        own: this machine's host, as the others reach it.
        listening: on rank 0's machine, a descriptor that listens at `port`; -1 on others. So the port is known before
            rank 0 runs, and no other process can take it in the meantime.
    """

    host: str
    port: int
    own: str
    listening: int = -1


@dataclass(frozen=True)
class Peers:
    """The group, seen from process `rank` of `size`. It runs on `nodes` machines, with equally many ranks on each."""

    rank: int = 0
    size: int = 1
    nodes: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is rank 0, which writes the job's files."""
        return self.rank == 0

    @property
    def local_size(self) -> int:
        """The number of processes on one machine."""
        return self.size // self.nodes

    @property
    def local_rank(self) -> int:
        """The number of this process on its machine, which is also its GPU's number."""
        return self.rank % self.local_size

    def join(self, meeting: Path | Address) -> None:
        """Connect to the other processes; call this once, before any other operation of this class.

        Args:
            meeting: on one machine, a file that only this group uses and that this call creates; unlike a port, other
                users of the machine can't reach it. On several machines, an address.
        """
        import torch
        from torch import distributed

        # accelerate 1.15 passes a setting of fit.arguments under the name that torch used before 2.15.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(self.local_rank)
        else:
            # accelerate 1.15 would number the CPU by the process, and copy every buffer to a device of that name.
            os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        # Gloo gets an interface, so that no machine's name has to resolve to an address that others can reach.
        store: Store | None = None
        method: str | None = None
        if isinstance(meeting, Address):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(meeting.own))
            # accelerate 1.15 needs these on several machines, although the processes are connected by then.
            os.environ |= {"MASTER_ADDR": meeting.host, "MASTER_PORT": str(meeting.port)}
            store = self._connect(meeting)
        else:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            method = f"file://{meeting}"
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            init_method=method,
            rank=self.rank,
            world_size=self.size,
            store=store,
            timeout=WAIT_LIMIT,
        )

    def _connect(self, address: Address) -> "Store":
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not export it to mypy

        if self.leads:
            assert address.listening >= 0, "rank 0 listens at the address"
        elif address.listening >= 0:  # inherited by the fork
            os.close(address.listening)
        arguments: dict[str, Any] = {"timeout": MEETING_LIMIT, "wait_for_workers": False}
        if self.leads:
            arguments["master_listen_fd"] = address.listening
        return cast("Store", TCPStore(address.host, address.port, self.size, self.leads, **arguments))

    def sum(self, value: "Tensor") -> "Tensor":
        """The sum over all processes, as a new tensor without a gradient; bitwise the same in all processes."""
        if self.size == 1:
            return value.detach()
        from torch import distributed

        total = value.detach().clone()
        distributed.all_reduce(total)
        return total

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum of each number over all processes, in double precision."""
        if self.size == 1:
            return list(values)
        import torch

        return cast(list[float], self.sum(torch.tensor(values, dtype=torch.float64)).tolist())

    def maximum(self, value: float) -> float:
        """The greatest value of all processes."""
        if self.size == 1:
            return value
        import torch
        from torch import distributed

        greatest = torch.tensor(value, dtype=torch.float64)
        distributed.all_reduce(greatest, op=distributed.ReduceOp.MAX)
        return float(greatest)

    def any(self, value: bool) -> bool:
        """Whether `value` is true in any process."""
        return self.maximum(float(value)) > 0

    def agreed[T](self, value: T) -> T:
        """Rank 0's value; the others wait for it."""
        if self.size == 1:
            return value
        import torch
        from torch import distributed

        values = [value]
        distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def decided[T](self, decide: Callable[[], T]) -> T:
        """What `decide` returns in rank 0; the others wait for it and do not call theirs."""
        return self.agreed(decide() if self.leads else cast(T, None))

    def union(self, names: Iterable[str]) -> list[str]:
        """The names that any process has, in the same order in all processes."""
        if self.size == 1:
            return list(names)
        from torch import distributed

        found: list[list[str]] = [[] for _ in range(self.size)]
        distributed.all_gather_object(found, sorted(names))
        return sorted({name for each in found for name in each})

    def gathered[T](self, value: T) -> list[T]:
        """The value of each process in the order of ranks, the same list in all of them."""
        if self.size == 1:
            return [value]
        from torch import distributed

        found: list[T] = [value] * self.size
        distributed.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self.maximum(0.0)


ALONE = Peers()


def _interface(address: str) -> str:
    """The name of the network interface that has this address.

    Raises:
        OSError: no interface has it.
    """
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return str(name)
    raise OSError(f"no network interface of this machine has the address {address} that Ray uses for it")


def is_of_a_lost_peer(error: BaseException) -> bool:
    """Whether the error may be only a consequence of another process's end."""
    return isinstance(error, RuntimeError) and any(trace in str(error) for trace in _TRACES)
