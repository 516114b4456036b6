"""The processes that train one job together, as one of them sees the others.

Control (wishes to stop, what rank 0 decided, where to wait) goes over gloo on the CPU, whatever carries gradients: it
waits for no GPU. `ALONE` is the one process of most jobs, for which every operation is the identity; torch is not
needed for it.
"""

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor

# Rank 0 merges, evaluates and saves while the others wait for it, which may take hours. A process that has died is
# noticed at once, by its connection or by the one that started it, and one that hangs by `supervisor.stall_s`.
WAIT_LIMIT = timedelta(days=7)
# Of all, at rank 0's address: some machines import more slowly than others.
MEETING_LIMIT = timedelta(minutes=30)
# Of errors that another process's end leaves behind in those that were connected with it (gloo, NCCL, TCP).
_TRACES = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


@dataclass(frozen=True)
class Address:
    """Where the processes of several machines meet: rank 0 answers there.

    Attributes:
        host: of rank 0's machine, as the others reach it.
        port: at that host.
        own: this machine's, as the others reach it.
        listening: a descriptor that listens at `port`, of rank 0's machine; -1 on others. A port that is known before
            the one that answers there runs, and that nobody can take meanwhile.
    """

    host: str
    port: int
    own: str
    listening: int = -1


@dataclass(frozen=True)
class Peers:
    """The group, seen from process `rank` of `size`; on `nodes` machines, each with as many, one after the other."""

    rank: int = 0
    size: int = 1
    nodes: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes the job's files."""
        return self.rank == 0

    @property
    def local_size(self) -> int:
        """Processes of one machine."""
        return self.size // self.nodes

    @property
    def local_rank(self) -> int:
        """Which of its machine's processes this is; so is its GPU's number."""
        return self.rank % self.local_size

    def join(self, meeting: Path | Address) -> None:
        """Meet the others, once and before anything else of this class is used.

        Args:
            meeting: a file of this group's own, the same for all; it is made here, and is no port that others on
                the machine could reach. Or, of several machines, an address.
        """
        import torch
        from torch import distributed

        # accelerate 1.15 passes what stages.arguments says by the name that it had before torch 2.15.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(self.local_rank)
        else:
            # accelerate 1.15 would number the CPU by the process, and copy every buffer to a device of that name.
            os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        # By interface: no machine's name needs to be resolvable, or to resolve to an address that others can reach.
        where: dict[str, Any] = {}
        if isinstance(meeting, Address):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(meeting.own))
            # accelerate 1.15 asks for them on several machines, though all have met by then.
            os.environ |= {"MASTER_ADDR": meeting.host, "MASTER_PORT": str(meeting.port)}
            where["store"] = self._meet_at(meeting)
        else:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            where["init_method"] = f"file://{meeting}"
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            rank=self.rank,
            world_size=self.size,
            timeout=WAIT_LIMIT,
            **where,
        )

    def _meet_at(self, address: Address) -> Any:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # of which its types say nothing

        if self.leads:
            assert address.listening >= 0, "rank 0 answers at the address"
        elif address.listening >= 0:  # open in the fork alone
            os.close(address.listening)
        door = {"master_listen_fd": address.listening} if self.leads else {}
        arguments: dict[str, Any] = {"timeout": MEETING_LIMIT, "wait_for_workers": False, **door}
        return TCPStore(address.host, address.port, self.size, self.leads, **arguments)

    def sum(self, value: "Tensor") -> "Tensor":
        """The sum over all processes, a new tensor without a gradient; the same bits in each of them."""
        if self.size == 1:
            return value.detach()
        from torch import distributed

        total = value.detach().clone()
        distributed.all_reduce(total)
        return total

    def sums(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes of numbers, in double precision."""
        if self.size == 1:
            return list(values)
        import torch

        return cast(list[float], self.sum(torch.tensor(values, dtype=torch.float64)).tolist())

    def most(self, value: float) -> float:
        """The greatest of all processes' values."""
        if self.size == 1:
            return value
        import torch
        from torch import distributed

        greatest = torch.tensor(value, dtype=torch.float64)
        distributed.all_reduce(greatest, op=distributed.ReduceOp.MAX)
        return float(greatest)

    def any(self, wish: bool) -> bool:
        """Whether it holds in any process."""
        return self.most(float(wish)) > 0

    def agreed[T](self, value: T) -> T:
        """Rank 0's value; the others wait for it."""
        if self.size == 1:
            return value
        import torch
        from torch import distributed

        told = [value]
        distributed.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        return told[0]

    def union(self, names: Iterable[str]) -> list[str]:
        """The names that any process has; in this order in all of them."""
        if self.size == 1:
            return list(names)
        from torch import distributed

        found: list[list[str]] = [[] for _ in range(self.size)]
        distributed.all_gather_object(found, sorted(names))
        return sorted({name for each in found for name in each})

    def wait(self) -> None:
        """Until all are here."""
        self.most(0.0)


ALONE = Peers()


def _interface(address: str) -> str:
    """Name of the network interface that has an address of this machine.

    Raises:
        OSError: none has.
    """
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return str(name)
    raise OSError(f"no network interface of this machine has the address {address}, by which Ray knows it")


def is_of_a_lost_peer(error: BaseException) -> bool:
    """Whether it may be the trace of another process's end, and no reason of its own."""
    return isinstance(error, RuntimeError) and any(trace in str(error) for trace in _TRACES)
