"""Groups of two processes that do small work: `python -m tests.support.tiny_group FOLDER`.

Each work writes its verdict to FOLDER/<work>.json, and its output to FOLDER/<work>.log.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from llama_stack_provider_moe.compute.runtime.peers import Peers
from llama_stack_provider_moe.compute.worker import process_group
from llama_stack_provider_moe.compute.worker.process_group import End, ProcessGroup, Report
from tests.support.tiny_shards import shares_out


def completes(peers: Peers, report: Report) -> int:
    """The peers of a group, and their operations."""
    import torch

    assert peers.sums([peers.rank + 1.0, 0.1]) == [3.0, 0.2]
    assert peers.maximum(-float(peers.rank)) == 0.0
    assert peers.any(peers.rank == 1)
    assert not peers.any(False)
    assert peers.agreed({"of": peers.rank}) == {"of": 0}
    assert peers.union(["a", "b"] if peers.leads else ["b", "c"]) == ["a", "b", "c"]
    mine = torch.full((2,), peers.rank + 1.0, requires_grad=True)
    total = peers.sum(mine)
    assert (total.tolist(), total.requires_grad, mine.tolist()) == ([3.0, 3.0], False, [peers.rank + 1.0] * 2)
    peers.wait()
    report(End(peers.rank, "completed"))
    return 0


def shares_tiles(peers: Peers, report: Report) -> int:
    """Rank 0 tunes and both use its tiles: then neither times a kernel of these shapes, of whatever size."""
    import torch

    from llama_stack_provider_moe.compute.moe.kernels import tiles

    def tuned() -> list[tiles.Choice]:
        assert peers.leads, "only rank 0 tunes"
        tiles._CHOSEN["times", (32, "a shape")] = tiles.Tiles(32, 16, 64)
        return tiles.chosen()

    tiles.install(peers.decided(tuned))
    candidates = (tiles.Tiles(16, 16, 16), tiles.Tiles(16, 32, 16))
    call = tiles.Call(lambda _: None, (), lambda: ())  # nobody may time it: there is no device
    for rows in (16, 32, 512):
        assert tiles.best("times", (rows, "a shape"), candidates, torch.device("cuda", 0), call).inputs == 64
    report(End(peers.rank, "completed"))
    return 0


def one_hands_over(peers: Peers, report: Report) -> int:
    """A kernel of rank 1 fails, and rank 0 loses contact with it."""
    if peers.rank == 1:
        report(End(1, "handed_over", "a kernel failed"))
        return 5
    peers.wait()
    return 0


def one_fails(peers: Peers, report: Report) -> int:
    """The other is left waiting for it."""
    if peers.rank == 1:
        raise ValueError("row 7 is too strange")
    peers.wait()
    return 0


def both_fail(peers: Peers, report: Report) -> int:
    """Both fail for the same reason, and neither ends before the other has said so."""
    report(End(peers.rank, "failed", "ValueError: the model is too strange", "ValueError"))
    peers.wait()
    return 1


def one_is_killed(peers: Peers, report: Report) -> int:
    """The other is left waiting for it."""
    if peers.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    peers.wait()
    return 0


def one_hangs(peers: Peers, report: Report) -> int:
    """One hangs although the other has failed."""
    if peers.rank == 1:
        time.sleep(3600)
    raise ValueError("too strange")


def prints(peers: Peers, report: Report) -> int:
    """Print lines, and one without an end."""
    end = "no end" if peers.rank else ""
    print(f"first of {peers.rank}\nsecond of {peers.rank}\n" + "x" * 100_000 + f"\n{end}", end="", flush=True)
    return completes(peers, report)


def is_stopped(peers: Peers, report: Report) -> int:
    """Stop by a signal to the leader only; both save at the same step."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    step = 0
    while not peers.any(bool(asked)):
        step += 1
        if step == 3 and peers.leads:
            os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(0.01)
    report(End(peers.rank, "stopped", step=step))
    return 3


def leader_dies(peers: Peers, report: Report) -> int:
    """The leader dies, and so do the others immediately."""
    (Path(sys.argv[1]) / f"pid-{peers.rank}").write_text(str(os.getpid()))
    peers.wait()
    if peers.leads:
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(3600)
    return 0


WORKS: tuple[Callable[[Peers, Report], int], ...] = (
    completes, one_fails, both_fail, one_is_killed, one_hangs, prints, is_stopped, leader_dies,
    shares_out, shares_tiles, one_hands_over,
)  # fmt: skip

if __name__ == "__main__":
    import torch.distributed  # noqa: F401  once, for all

    process_group.GRACE_S = 1.0
    folder = Path(sys.argv[1])
    for work in WORKS:
        pid = os.fork()
        if pid == 0:
            with (folder / f"{work.__name__}.log").open("wb", buffering=0) as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                found = ProcessGroup(2, work, output).run()
            end = None if found.end is None else asdict(found.end)
            (folder / f"{work.__name__}.json").write_text(json.dumps({"end": end, "signal": found.signal}))
            os._exit(0)
        os.waitpid(pid, 0)
